"""Text that goes to a terminal, a file or another person: addresses without credentials, no control characters.

Applied where text leaves the program (console output, journals, receipts, cards), so that no caller has to remember it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mervcache.errors import UserError

HIDDEN = "***"  # in place of what an address held: its credentials, and what follows a "?" or "#"
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
# A password with an unescaped "/": what follows a ":" that is no port, up to the last "@".
_PASSWORD = re.compile(rf"({_SCHEME})[^/\s@:]*:(?!\d+(?:[/?#\s]|$))[^\s]*@")
_USERINFO = re.compile(rf"({_SCHEME})[^/\s]*@")
# Up to white space, or to a separator and the next address of a list.
_QUERY = re.compile(rf"({_SCHEME}[^\s?#;]*(?:;(?!\w+=)[^\s?#;]*)*)[?#;](?:(?!(?:::|[,|'\"]){_SCHEME})\S)+")
_TRAILING = re.compile(r"[)\]}>'\",.;:]+$")  # of a sentence, not of the address
_KEPT = "\n\t\u200c\u200d"  # lines, tabs, and the joiners that scripts and emoji need
_FOLDERS = re.compile(r"(?<![\w./:])(?:/|~/|[A-Za-z]:\\)(?:[^\s'\"/\\]+[/\\])+(?=[^\s'\"/\\])")  # of an absolute path
_SPACES = re.compile(r"\s+")


def redact(text: str) -> str:
    """The text with every address in it stripped of user, password, query and fragment.

    >>> redact("cannot read http://user:secret@host/x.tar?X-Amz-Signature=0f, try again")
    'cannot read http://***@host/x.tar?***, try again'
    """
    if "://" not in text:
        return text
    text = _USERINFO.sub(rf"\1{HIDDEN}@", _PASSWORD.sub(rf"\1{HIDDEN}@", text))
    return _QUERY.sub(_without_query, text)


def _without_query(found: re.Match[str]) -> str:
    trailing = _TRAILING.search(found[0])
    return f"{found[1]}?{HIDDEN}{trailing[0] if trailing else ''}"


def redact_all(value: Any) -> Any:
    """Plain data with every text in it redacted, the names in mappings too."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_all(key): redact_all(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    return [redact_all(item) for item in cast("Sequence[Any]", value)] if isinstance(value, list | tuple) else value


def check_not_redacted(address: str, give: str = "give the address again") -> None:
    """UserError for an address that `redact` stripped, as a journal keeps it: nothing can be read from there."""
    if re.search(rf"{_SCHEME}\*\*\*@|{_SCHEME}\S*\?\*\*\*", address):
        raise UserError(f"{address} was recorded without its credentials, which are never written down: {give}")


def printable(text: str) -> str:
    r"""The text with control characters, escape sequences and text-direction overrides spelled out; lines stay.

    >>> printable("\x1b[2Jmoved \u202egnp.exe")
    '\\x1b[2Jmoved \\u202egnp.exe'
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in _KEPT or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in text
    )


def one_line(text: str) -> str:
    """Printable and on one line: white space of any kind becomes a space."""
    return printable(_SPACES.sub(" ", text).strip())


def shareable(text: str) -> str:
    """The text on one line, without credentials and without the folders of absolute paths.

    >>> shareable("cannot read '/home/alice/media/a.mp4'")
    "cannot read 'a.mp4'"
    """
    return one_line(_FOLDERS.sub("", redact(text)))


def safe(text: str) -> str:
    """What a terminal or a log is given."""
    return printable(redact(text))

"""Every error a person or a caller can act on, sorted by what they would do about it.

    MervCacheError
    ├── UserError              the request cannot be done as asked: change the command, config or path
    ├── StoreError             something about one store
    │   ├── StoreNotFoundError     no store there: extract one, or fix the path
    │   ├── StoreFormatError       not a store we can read: newer version, foreign or hostile metadata
    │   ├── StoreDamagedError      bytes differ from their digest: verify, then repair
    │   ├── IdentityConflictError  the encoder is stored under another identity: explain, --new-identity
    │   ├── ClipUnavailableError   the clip has no committed tokens of that encoder
    │   └── AlreadyExistsError     an exclusive put lost: somebody was first, re-read what they wrote
    ├── MediaError             one clip cannot be decoded: quarantine it, carry on
    └── RunStoppedError        the machine, not the clip: disk full, share gone, credentials expired

Command lines print the message of a ``MervCacheError`` without a traceback; anything else is our bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def no_file(path: object) -> str:
    """The message for a media file that is not there, with the path as it was typed."""
    return f"there is no file {path}; give a video or an image that exists"


class MervCacheError(Exception):
    """Root of all errors that carry a message for a person: what is wrong, the values, what to do next."""


class UserError(MervCacheError):
    """The request cannot be done as asked."""


class ClusterError(MervCacheError):
    """The requested cluster cannot be started or reached."""


class StoreError(MervCacheError):
    """Something about one feature store."""


class StoreNotFoundError(StoreError):
    """There is no feature store at that path."""


class StoreFormatError(StoreError):
    """What is there is not a feature store that this version can read."""


class StoreDamagedError(StoreError):
    """Bytes in the store differ from the digest that covers them."""


class IdentityConflictError(StoreError):
    """The store holds this encoder under another identity."""


class ClipUnavailableError(StoreError):
    """A clip has no committed tokens of the encoder asked for."""


class AlreadyExistsError(StoreError):
    """An exclusive put found the name taken by other bytes."""


class MediaError(MervCacheError):
    """One clip cannot be decoded.

    ``str(error)`` is the reason that is stored in the receipt: it holds no measured values, hosts or absolute
    paths, so that the same broken file gives the same bytes on every machine.
    """


class RunStoppedError(MervCacheError):
    """The environment failed, not a clip: stop the run and quarantine nothing."""


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is in no table: the nearest known one, then all of them.

    >>> unknown_name("dataset", "videolava", ["demo", "videollava"])
    "unknown dataset 'videolava', the nearest known one is 'videollava'; known: demo, videollava"
    """
    listed = [str(entry) for entry in known]
    nearest = difflib.get_close_matches(str(name), listed, n=1, cutoff=0.5)
    hint = f", the nearest known one is {nearest[0]!r}" if nearest else ""
    return f"unknown {what} {name!r}{hint}; known: {', '.join(listed) or 'none'}"

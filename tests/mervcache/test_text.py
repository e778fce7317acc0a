"""What a terminal, a file or another person is given: no credentials and no control characters."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mervcache.console import console, echo, log_to_stderr, table
from mervcache.errors import UserError
from mervcache.text import check_not_redacted, one_line, printable, redact, redact_all, shareable

BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\x00\x7f\u2028" + BIDI


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:password@host/x.tar?X-Amz-Signature=0f", "http://***@host/x.tar?***"),
        ("https://token@host:8443/a", "https://***@host:8443/a"),
        ("http://user:pa/ss@host/x", "http://***@host/x"),
        ("http://user:pa?ss#word@host/x", "http://***@host/x"),
        ("s3://key:secret@bucket/folder", "s3://***@bucket/folder"),
        ("https://acc.blob.core.windows.net/c/x?sv=1&sig=a%2Fb'c", "https://acc.blob.core.windows.net/c/x?***"),
        ("https://host/x#access_token=1", "https://host/x?***"),
        ("https://host/x;jsessionid=1/y", "https://host/x?***"),
        ("simplecache::https://u:p@host/x", "simplecache::https://***@host/x"),
        ("https://a/{0..9}.tar?s=1::https://b:c@d/z?q=2", "https://a/{0..9}.tar?***::https://***@d/z?***"),
        ("cannot read 'https://h/x?sig=1': refused", "cannot read 'https://h/x?***': refused"),
        ("URL('https://u:p@h/x?sig=1')", "URL('https://***@h/x?***')"),
    ],
)
def test_an_address_is_shown_without_what_grants_access(text, expected):
    assert redact(text) == expected
    assert redact(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/user/repo@main/folder",
        "https://host:8080/a@b/{00000..00099}.tar",
        "tcp://10.0.0.1:8786",
        "see https://host/page; then go on",
        "a@b.c and 3:4 and no address",
    ],
)
def test_everything_else_stays_as_it_is(text):
    assert redact(text) == text


def test_an_address_that_lost_its_credentials_is_refused_with_what_to_do():
    for address in ("http://***@host/x.tar", "https://host/x?***"):
        with pytest.raises(UserError, match=r"recorded without its credentials.*give the option again"):
            check_not_redacted(address, "give the option again")
    check_not_redacted("https://host/x.tar")


def test_names_and_values_at_any_depth_are_redacted():
    given = {"a": [{"https://u:p@h": ("https://h/x?s", 3, None, 1.5, True)}]}
    assert redact_all(given) == {"a": [{"https://***@h": ["https://h/x?***", 3, None, 1.5, True]}]}


def test_a_reason_has_neither_folders_nor_lines():
    text = "cannot open '/home/alice/media/a b/x.mp4':\n/mnt/lab/y.mp4 at 24000/1001, C:\\Users\\alice\\z.mp4"
    assert shareable(text) == "cannot open 'a b/x.mp4': y.mp4 at 24000/1001, z.mp4"


@given(st.text(alphabet=st.characters(), max_size=50))
def test_no_text_keeps_a_control_character(text):
    shown = printable(text)
    assert not [c for c in shown if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or c in BIDI + "\u2028"]
    shown.encode()  # no lone surrogate: a terminal can print it
    assert "\n" not in one_line(text)


def test_scripts_that_need_joiners_are_kept():
    for text in ("نمی\u200cخواهم", "क्\u200dष", "👩\u200d🔬", "全角\u3000空白", "naïve"):
        assert printable(text) == text


def test_nothing_printed_holds_an_escape_sequence_or_a_password(capsys):
    secret = f"http://u:password@h/x?signature {HOSTILE}"
    echo(secret)
    log_to_stderr()
    logging.getLogger("pipeline.some").warning("about %s", secret)
    console().print(secret)
    table(("clip",), [(secret,), [f"a\nError: nothing is wrong {HOSTILE}"]])
    printed = "".join(capsys.readouterr())
    assert not [c for c in printed if not c.isprintable() and c != "\n"]
    assert "password" not in printed
    assert "signature" not in printed
    assert "\nError" not in printed  # what looks like a line of ours


def test_the_traceback_of_a_bug_holds_neither():
    message = f"https://u:password@h/{HOSTILE}"
    program = f"from mervcache.console import log_to_stderr; log_to_stderr(); raise ValueError({message!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: https://***@h/")
    assert last.isprintable()

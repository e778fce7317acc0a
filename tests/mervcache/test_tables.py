"""Tables: nothing is cut, numbers are aligned at the right, untrusted text does nothing."""

from __future__ import annotations

import contextlib
import io
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mervcache.console import table

ROWS = [("languagebind", "video", "1,080", "35.4 MB", "a reason of many words"), ("vivit", "image", "3", "9.0 kB", "")]
COLUMNS = ("encoder", "kind", "to do", "bytes", "reason")


def drawn(columns, rows, right=(), *, width: int | None = None) -> list[str]:
    """Lines of a table: in a file, or on a terminal of so many columns."""
    stream = io.StringIO()
    stream.isatty = lambda: width is not None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stream):
        patch.setenv("COLUMNS", str(width))
        table(columns, rows, right=right)
    return [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in stream.getvalue().split("\n")[:-1]]


def test_a_row_is_a_line_off_a_terminal():
    assert drawn(COLUMNS, ROWS, ("to do", "bytes")) == [
        "encoder       kind   to do    bytes  reason",
        "languagebind  video  1,080  35.4 MB  a reason of many words",
        "vivit         image      3   9.0 kB",
    ]


def test_a_long_row_is_a_line_off_a_terminal():
    rows = [(f"{number} " * 200, "x" * 500) for number in range(3)]
    assert len(drawn(("a", "b"), rows)) == 4


def test_columns_of_text_wrap_at_spaces_and_numbers_keep_their_units():
    assert drawn(COLUMNS, ROWS, ("to do", "bytes"), width=48) == [
        "encoder       kind   to do    bytes  reason",
        "languagebind  video  1,080  35.4 MB  a reason of",
        "                                     many words",
        "vivit         image      3   9.0 kB",
    ]


def test_a_heading_of_two_words_wraps():
    assert drawn(("changed media", "x"), [("1", "y")], ("changed media",), width=10) == [
        "changed",
        "  media  x",
        "      1  y",
    ]


WORDS = st.text(st.sampled_from("ab ü語"), max_size=12)


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=5), st.integers(1, 40))
def test_no_width_cuts_or_loses_a_word(rows, width):
    words = sorted(word for row in rows for cell in row for word in cell.split())
    assert sorted(" ".join(drawn(("", "", ""), rows, ("",), width=width)).split()) == words


def test_a_terminal_of_80_columns_is_kept_to(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    table(("clip", "encoders", "reason"), [("d/v1.mp4", "all encoders", "not a video: " + "invalid data " * 9)])
    lines = [re.sub(r"\x1b\[\d*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("word", ["d/x[/bar].mp4", "[bold]red", ":smile:"])
def test_markup_is_printed_as_it_is(capsys, word):
    table(("clip",), [(word,)])
    assert capsys.readouterr().out == f"clip\n{word}\n"


def test_control_characters_are_printed_as_codes(capsys):
    table(("clip",), [("a\x1b[31mb\tc",)])
    assert capsys.readouterr().out == "clip\na\\x1b[31mb\\tc\n"


def test_headings_are_untrusted_too(capsys):
    table(("question", "[bold]runs/\x1b[31m"), [("colour", "0.5")], right=("[bold]runs/\x1b[31m",))
    heading, row = capsys.readouterr().out.splitlines()
    assert heading == "question  [bold]runs/\\x1b[31m"
    assert row == "colour" + "0.5".rjust(len(heading) - len("colour"))


def test_without_headings_the_rows_are_named_by_their_first_column(capsys):
    table(("", ""), [("steps", "3"), ("clips of all", ["x", "y"])])
    assert capsys.readouterr().out == "steps         3\nclips of all  x\n              y\n"

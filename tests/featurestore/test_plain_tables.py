"""The look of all tables: nothing is cut, numbers stand to the right, a stranger's words do nothing."""

from __future__ import annotations

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mervcache.console import fitted, row_lines, table

ROWS = [("languagebind", "video", "1,080", "35.4 MB", "a reason of many words"), ("vivit", "image", "3", "9.0 kB", "")]
COLUMNS = ("encoder", "kind", "to do", "bytes", "reason")


def drawn(width: int | None) -> list[str]:
    grid, right = [COLUMNS, *ROWS], [name in ("to do", "bytes") for name in COLUMNS]
    widths, gap = fitted(grid, right, width)
    return [line for row in grid for line in row_lines(row, right, widths, gap)]


def test_a_row_is_a_line_where_there_is_room():
    assert drawn(None) == [
        "encoder       kind   to do    bytes  reason",
        "languagebind  video  1,080  35.4 MB  a reason of many words",
        "vivit         image      3   9.0 kB",
    ]


def test_columns_of_text_give_way_at_their_spaces_and_numbers_keep_their_units():
    assert drawn(45) == [
        "encoder      kind  to do   bytes reason",
        "languagebind video 1,080 35.4 MB a reason of",
        "                                 many words",
        "vivit        image     3  9.0 kB",
    ]


def test_a_heading_of_two_words_goes_over_two_lines():
    grid, right = [("changed media", "x"), ("1", "y")], [True, False]
    widths, gap = fitted(grid, right, 9)
    assert [line for row in grid for line in row_lines(row, right, widths, gap)] == [
        "changed x",
        "  media",
        "      1 y",
    ]


WORDS = st.text(st.sampled_from("ab ü語"), max_size=12)


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=5), st.integers(1, 40))
def test_no_width_cuts_or_loses_a_word(grid, width):
    right = [False, True, False]
    widths, gap = fitted(grid, right, width)
    for row in grid:
        told = " ".join(row_lines(row, right, widths, gap)).split()
        assert sorted(told) == sorted(word for cell in row for word in cell.split())


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


def test_without_headings_the_rows_are_named_by_their_first_column(capsys):
    table(("", ""), [("steps", "3"), ("clips of all", "x\ny")])
    assert capsys.readouterr().out == "steps         3\nclips of all  x\n              y\n"

"""Tables on stdout, in the one look of all commands: plain columns, numbers to the right, a bold line of headings.

Cells are a stranger's words: they are printed as they are, control characters as their codes. No word is ever cut: on a
terminal, columns of text give way at their spaces, and where that is not enough the line is longer than the terminal;
elsewhere a row is a line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

PIPED_WIDTH = 160  # characters of a sentence: rich would fold it at 80 where stdout is not a terminal

Grid = Sequence[Sequence[str]]


def console() -> Console:
    """Words as they are: paths and reasons are strangers', so that nothing in brackets is markup."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def strong(words: str) -> Text:
    return Text(words, style="bold")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """Print rows below their headings; columns named in `right` hold numbers.

    Without headings the first column names the rows, and is bold instead.
    """
    out, head = console(), [columns] if any(columns) else []
    grid = [[_printable(cell) for cell in row] for row in (*head, *rows)]
    at_right = [column in right for column in columns]
    widths, gap = fitted(grid, at_right, out.width if sys.stdout.isatty() else None)
    for number, row in enumerate(grid):
        for line in row_lines(row, at_right, widths, gap):
            text = Text(line)
            text.stylize("bold", 0, widths[0] if not head else 0 if number else None)
            out.print(text, soft_wrap=True)


def fitted(grid: Grid, at_right: Sequence[bool], room: int | None) -> tuple[list[int], str]:
    """Widths of the columns and what is between them: at most `room` characters in all, where words allow it."""
    widths = [max(_width(cell) for cell in column) for column in zip(*grid, strict=True)]
    gaps = len(widths) - 1
    if room is None or sum(widths) + 2 * gaps <= room:
        return widths, "  "
    least = [
        max(_narrowest(cell, is_number=is_number and line > 0) for line, cell in enumerate(column))
        for column, is_number in zip(zip(*grid, strict=True), at_right, strict=True)
    ]
    while sum(widths) + gaps > room:
        wide = [column for column in range(len(widths)) if widths[column] > least[column]]
        if not wide:
            break
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths, " "


def _narrowest(cell: str, *, is_number: bool) -> int:
    """The longest word; a number stays with its unit."""
    return _width(cell if is_number else "\n".join(cell.split()))


def _width(cell: str) -> int:
    return max(map(cell_len, cell.split("\n")))


def row_lines(row: Sequence[str], at_right: Sequence[bool], widths: Sequence[int], gap: str) -> list[str]:
    """A row as lines on the screen, as many as its tallest cell has."""
    cells = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
    lines = []
    for parts in zip_longest(*cells, fillvalue=""):
        pads = [" " * (width - cell_len(part)) for part, width in zip(parts, widths, strict=True)]
        padded = [pad + part if right else part + pad for part, pad, right in zip(parts, pads, at_right, strict=True)]
        lines.append(gap.join(padded).rstrip())
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many characters, broken at spaces only."""
    lines: list[str] = []
    for line in text.split("\n"):
        if cell_len(line) <= width:
            lines.append(line)
            continue
        words = line.split() or [""]
        lines.append(words[0])
        for word in words[1:]:
            longer = f"{lines[-1]} {word}"
            if cell_len(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
    return lines


def _printable(cell: Any) -> str:
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(cell))

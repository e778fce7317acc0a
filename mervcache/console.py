"""What all command lines share, so that they look and answer alike: settings, mistakes, interrupts, results.

Nothing heavy is imported, not even click: `--help` reads this room, and a store that is read in a script needs none.

Tables on stdout, in the one look of all commands: plain columns, numbers to the right, a bold line of headings.

Cells are a stranger's words: they are printed as they are, control characters as their codes. No word is ever cut: on a
terminal, columns of text give way at their spaces, and where that is not enough the line is longer than the terminal;
elsewhere a row is a line.

How far a long call is: what it tells, and to whom it makes no difference.

Whoever calls may show it; `SILENT` is the default everywhere.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any, Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from mervcache.errors import MervCacheError

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

CONTEXT = {"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 110}  # of click


def says(*errors: type[Exception], interrupted: str) -> Decorator:
    """Decorator: the message of these errors without a traceback and exit code 1; `interrupted` and 130 after Ctrl-C.

    Everything else is a bug and keeps its traceback. It goes on top, right below the command's own decorator, for what
    is below may fail too.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                return command(*args, **kwargs)
            except errors as error:
                say(f"Error: {error}")
                sys.exit(1)
            except KeyboardInterrupt:
                say(f"\n{interrupted}")
                sys.exit(130)

        return wrapped

    return decorate


def stacked(*decorators: Decorator) -> Decorator:
    """One decorator of several, the first on top: options that commands share."""

    def decorate(command: Command) -> Command:
        for each in reversed(decorators):
            command = each(command)
        return command

    return decorate


def say(line: str) -> None:
    """A line on stderr: stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def show_result(result: Any, as_json: bool, show: Callable[[], None], *, indent: int | None = None) -> None:
    """JSON on stdout for a program, else what `show` prints for a person."""
    if as_json:
        print(json.dumps(result, indent=indent, default=str), flush=True)
    else:
        show()


def tell_kept(keep: Callable[[], str]) -> None:
    """Keep a measurement in the journal where the store can be written; it is worth printing all the same."""
    try:
        say(f"kept as {keep()}")
    except MervCacheError as error:
        say(f"not kept in the store: {error}")


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


class ProgressCallback(Protocol):
    """Is told how far a call is; `advance` may come from any thread."""

    def start(self, total: int) -> None:
        """So many items are ahead; a second start is that of a next pass, counted from nothing."""

    def advance(self, items: int = 1, **amounts: float) -> None:
        """So many more are done; `amounts` are what rates are made of besides, such as MB, by name."""


class _Silent:
    def start(self, total: int) -> None:
        """Nobody asked."""

    def advance(self, items: int = 1, **amounts: float) -> None:
        """Nobody asked."""


SILENT: ProgressCallback = _Silent()

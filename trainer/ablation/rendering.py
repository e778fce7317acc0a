"""Tables of results as text for a terminal, Markdown, CSV, LaTeX or JSON, from the same rows.

CSV and JSON hold the values themselves, the others what a column's format makes of them. Notes belong to the result:
CSV, which has no place for them, leaves them to the caller.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Format = Literal["text", "markdown", "csv", "latex", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
ABSENT = "-"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: its key in rows, CSV and JSON, its heading, and the text of a value; numbers are right-aligned."""

    key: str
    heading: str
    text: Callable[[Any], str] = str
    is_number: bool = True


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows by column key; a value of None is absent."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()

    def cells(self) -> list[list[str]]:
        """The text of every value."""
        return [
            [ABSENT if row[column.key] is None else column.text(row[column.key]) for column in self.columns]
            for row in self.rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        rows = [{column.key: row[column.key] for column in self.columns} for row in self.rows]
        return {"title": self.title, "rows": rows, "notes": list(self.notes)}


def print_tables(tables: Sequence[Table], format: Format) -> None:
    """Print the tables on stdout; of CSV the notes go to stderr."""
    from mervcache.console import echo, table

    if format != "text":
        print(render(tables, format), end="", flush=True)
        for note in dict.fromkeys(note for each in tables for note in each.notes) if format == "csv" else ():
            echo(note)
        return
    for index, each in enumerate(tables):
        print(f"\n{each.title}" if index else each.title)
        right = [column.heading for column in each.columns if column.is_number]
        table([column.heading for column in each.columns], each.cells(), right=right)
    for note in dict.fromkeys(note for each in tables for note in each.notes):
        print(f"- {note}")


def render(tables: Sequence[Table], format: Format) -> str:
    """The tables as one text that ends with a line break; CSV has a block per table, an empty line between."""
    if format == "json":
        return json.dumps({each.name: each.to_dict() for each in tables}, indent=1) + "\n"
    make = {"markdown": _markdown, "csv": _csv, "latex": _latex}[format]
    return "\n".join(make(each) for each in tables)


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        escaped = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(escaped)} |\n"

    marks = ["---:" if column.is_number else "---" for column in table.columns]
    head = line([column.heading for column in table.columns]) + f"| {' | '.join(marks)} |\n"
    notes = "".join(f"- {note}\n" for note in table.notes)
    return f"**{table.title}**\n\n{head}{''.join(map(line, table.cells()))}" + (f"\n{notes}" if notes else "")


def _csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.key for column in table.columns])
    writer.writerows([row[column.key] for column in table.columns] for row in table.rows)
    return out.getvalue()


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    character: f"\\{character}" for character in "&%$#_{}"
}


def _latex(table: Table) -> str:
    """A `tabular` with the rules of booktabs; notes are comments."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in cells) + r" \\" + "\n"

    alignment = "".join("r" if column.is_number else "l" for column in table.columns)
    notes = "".join(f"% {note}\n" for note in (table.title, *table.notes))
    head = line([column.heading for column in table.columns])
    body = "".join(map(line, table.cells()))
    return (
        f"{notes}\\begin{{tabular}}{{{alignment}}}\n\\toprule\n{head}\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"
    )

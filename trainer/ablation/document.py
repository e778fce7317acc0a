"""What the commands of the ablations print, apart from how it is written: sections of typed cells, and notes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

# A share of 1 is shown in percent, a change with its sign, a size as `4.19 M`, tera in units of 10^12.
Unit = Literal[
    "text",
    "flag",
    "count",
    "share",
    "points",
    "change",
    "nats",
    "number",
    "decimal",
    "size",
    "tera",
    "seconds",
    "bytes",
]
Row = tuple["Cell", ...]
TIME = "time"  # block of a sweep's wall times


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its interval, and the p value of "it is 0" where that is tested."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None  # adjusted for all tests of the block and metric
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class NotComputed:
    """A cell that cannot be filled, with the reason."""

    reason: str


Cell = str | int | float | Estimate | NotComputed | None


@dataclass(frozen=True, kw_only=True)
class Column:
    """Heading and unit of a column; columns of text name what a row is about."""

    name: str
    unit: Unit = "text"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """How a page draws a table: a line for each value of a column, or each set of them."""

    x: str  # names of columns
    y: str
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One table."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    block: str = ""  # retrained, post-hoc or one-shot; "": of no block
    metric: str = ""
    notes: tuple[str, ...] = ()
    plot: Plot | None = None

    def map_cells(self, change: Callable[[Cell], Cell]) -> Section:
        """The section with every cell changed."""
        return replace(self, rows=tuple(tuple(change(cell) for cell in row) for row in self.rows))

    @property
    def not_computed(self) -> dict[str, str]:
        """Reason -> which cells cannot be filled for it: `Capacity of dinov2, vivit`."""
        found: dict[str, dict[str, list[str]]] = {}
        for row in self.rows:
            label = ", ".join(cell for cell, column in self._labelled(row) if column.unit == "text" and cell)
            for cell, column in self._labelled(row):
                if isinstance(cell, NotComputed):
                    found.setdefault(cell.reason, {}).setdefault(column.name, []).append(label)
        texts = {}
        for reason, columns in found.items():
            by_rows: dict[str, list[str]] = {}
            for name, labels in columns.items():
                by_rows.setdefault(" / ".join(labels), []).append(name)
            texts[reason] = "; ".join(f"{', '.join(names)} of {rows}" for rows, names in by_rows.items())
        return texts

    def _labelled(self, row: Row) -> zip:
        return zip(row, self.columns, strict=True)


@dataclass(frozen=True, kw_only=True)
class Document:
    """Everything that a command prints."""

    title: str
    sections: tuple[Section, ...]
    facts: dict[str, str] = field(default_factory=dict)  # what it was measured on
    methods: tuple[str, ...] = ()  # how the statistics are computed
    missing: tuple[str, ...] = ()  # runs without answers, and the next command
    footnotes: tuple[str, ...] = ()
    questions: Section | None = field(default=None, repr=False)  # of a sweep: credit of every question in every run

"""The table of a snapshot: one line per clip, five columns per encoder group.

GROUP.row and GROUP.digest are the clip's newest committed ok row (-1 and null if none); GROUP.failed_row, .failed_scope
and .failed_reason tell of its newest failure. Columns are numpy while receipts are applied, Arrow when stored.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from featurestore.clips import KINDS
from featurestore.errors import StoreDamagedError, StoreFormatError
from featurestore.receipts import Receipt

# column suffix -> (Arrow type, value where there is none)
GROUP_COLUMNS: dict[str, tuple[pa.DataType, int | None]] = {
    "row": (pa.int64(), -1),
    "digest": (pa.string(), None),
    "failed_row": (pa.int64(), -1),
    "failed_scope": (pa.string(), None),
    "failed_reason": (pa.string(), None),
}


# state of a row -> the column of its number, then columns and what of the outcome they hold
_TOLD_BY = {
    "ok": ("row", ("digest", "digest")),
    "failed": ("failed_row", ("failed_scope", "scope"), ("failed_reason", "reason")),
}


def snapshot_schema(groups: Iterable[str]) -> pa.Schema:
    """Columns of a snapshot of these groups."""
    fields = [("clip_id", pa.string()), ("kind", pa.string())]
    for group in sorted(groups):
        fields += [(column(group, suffix), arrow_type) for suffix, (arrow_type, _) in GROUP_COLUMNS.items()]
    return pa.schema(fields)


def complete(table: pa.Table, what: str) -> pa.Table:
    """The table, if every clip has an id and a kind and every row is a number, as a snapshot's writer leaves it."""
    for name in table.column_names:
        if (name in ("clip_id", "kind") or name.endswith("row")) and table[name].null_count:
            raise StoreFormatError(f"{what} has clips without {name}; open an older snapshot or publish a new one")
    return table


def column(group: str, suffix: str) -> str:
    return f"{group}.{suffix}"


class SnapshotTable:
    """What is known of every clip, in the order in which clips first got a row."""

    def __init__(self, clip_ids: pa.Array, kinds: pa.Array, clip_of_row: dict[str, np.ndarray]) -> None:
        self._clip_ids = clip_ids
        self._kinds = kinds
        self._clip_of_row = clip_of_row  # kind -> clip's line by row, -1 where a row is unused
        self._columns: dict[str, dict[str, np.ndarray]] = {}

    @classmethod
    def extend(cls, parent: pa.Table | None, clips: pa.Table) -> SnapshotTable:
        """The parent's table made longer by the clips that are new; clip parts only grow, so lines keep their place."""
        encoded = clips["clip_id"].combine_chunks().dictionary_encode()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.combine_chunks()
        lines = encoded.indices.to_numpy()
        clip_ids = encoded.dictionary
        _, first = np.unique(lines, return_index=True)
        kinds = clips["kind"].combine_chunks().take(pa.array(first))
        state = cls(clip_ids, kinds, _lines_by_row(clips, lines))
        if parent is not None:
            state._adopt(parent)
        return state

    def _adopt(self, parent: pa.Table) -> None:
        count = parent.num_rows
        if not parent["clip_id"].combine_chunks().equals(self._clip_ids.slice(0, count)):
            raise StoreDamagedError("the newest snapshot does not begin with the clips of the clip parts")
        groups = {name.rsplit(".", 1)[0] for name in parent.column_names if name not in ("clip_id", "kind")}
        for group in groups:
            columns = self.ensure_columns(group)
            for suffix in GROUP_COLUMNS:
                columns[suffix][:count] = parent[column(group, suffix)].to_numpy(zero_copy_only=False)

    def ensure_columns(self, group: str) -> dict[str, np.ndarray]:
        """The columns of a group, empty if it is new."""
        if group not in self._columns:
            self._columns[group] = {
                suffix: np.full(len(self._clip_ids), none, dtype=np.int64 if none == -1 else object)
                for suffix, (_, none) in GROUP_COLUMNS.items()
            }
        return self._columns[group]

    def apply(self, receipt: Receipt) -> None:
        """Take over a receipt: a later row of a clip wins over an earlier one, whatever order receipts come in."""
        columns, first = self.ensure_columns(receipt.group), receipt.first_row()
        for state, (number, *told) in _TOLD_BY.items():
            outcomes = [(first + n, outcome) for n, outcome in enumerate(receipt.rows) if outcome.state == state]
            if not outcomes:
                continue
            rows = np.fromiter((row for row, _ in outcomes), np.int64, len(outcomes))
            lines = self._lines_of(receipt, rows)
            newer = rows > columns[number][lines]  # rows ascend: of two rows of one clip the later one stays
            columns[number][lines[newer]] = rows[newer]
            for suffix, name in told:
                values = np.array([getattr(outcome, name) for _, outcome in outcomes], dtype=object)
                columns[suffix][lines[newer]] = values[newer]

    def _lines_of(self, receipt: Receipt, rows: np.ndarray) -> np.ndarray:
        """Lines of the clips that have these rows."""
        lines = self._clip_of_row[receipt.kind]
        found, is_given = np.full(len(rows), -1), rows < len(lines)
        found[is_given] = lines[rows[is_given]]
        if (found < 0).any():
            row = rows[found < 0][0]
            raise StoreFormatError(
                f"a receipt of {receipt.kind}/{receipt.group} speaks of row {row}, which no clip has"
            )
        return found

    def to_arrow(self) -> pa.Table:
        arrays: dict[str, pa.Array] = {"clip_id": self._clip_ids, "kind": self._kinds}
        for group in sorted(self._columns):
            for suffix, (arrow_type, _) in GROUP_COLUMNS.items():
                arrays[column(group, suffix)] = pa.array(self._columns[group][suffix], type=arrow_type)
        return pa.table(arrays)


def _lines_by_row(clips: pa.Table, lines: np.ndarray) -> dict[str, np.ndarray]:
    rows, kinds = clips["row"].to_numpy(), clips["kind"].to_numpy(zero_copy_only=False)
    by_row: dict[str, np.ndarray] = {}
    for kind in KINDS:
        mine = kinds == kind
        by_row[kind] = np.full(int(rows[mine].max()) + 1 if mine.any() else 0, -1, dtype=np.int64)
        by_row[kind][rows[mine]] = lines[mine]
    return by_row

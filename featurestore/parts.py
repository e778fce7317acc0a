"""Clip parts: the append-only `clips/part-N.parquet` files that say which clip each row is.

Creating a part exclusively is how rows are given out. Parts are cheap to list and never change, so a `ClipIndex` reads
each once. Parquet bytes depend on the content alone (fixed writer options, no time).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore.clips import KINDS, Clip
from featurestore.columns import CLIP_SCHEMA, clips_to_table
from featurestore.errors import StoreFormatError
from featurestore.layout import MAX_BLOCK_ROWS, PARTS, part_key, part_numbers, sealed_blocks
from featurestore.parquet import read_table, table_bytes, table_file
from featurestore.places.objects import Objects

__all__ = ["ClipIndex", "allocate", "part_bytes", "read_table", "table_bytes"]


class ClipIndex:
    """All clip parts of a store, read as they appear: which rows are given out, and so which blocks."""

    def __init__(self, objects: Objects, block_rows: Mapping[str, int]) -> None:
        self._objects = objects
        self.block_rows = block_rows
        self.tables: list[pa.Table] = []
        self._rows: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}

    def refresh(self) -> ClipIndex:
        """Read the parts that are new since the last call."""
        for number in part_numbers(self._objects.list_names(PARTS))[len(self.tables) :]:
            key = part_key(number)
            table = read_table(table_file(self._objects, key), CLIP_SCHEMA, key)
            rows, kinds = table["row"].to_numpy(), table["kind"].to_numpy(zero_copy_only=False)
            for kind in KINDS:
                mine = rows[kinds == kind]
                # No gap within a part and less than a block before it: rows decide how long the snapshot's tables are.
                first = self.max_row(kind) + 1
                if len(mine) and (not first <= mine[0] < first + MAX_BLOCK_ROWS or (np.diff(mine) != 1).any()):
                    raise StoreFormatError(f"{key}: rows of {kind} must follow one another from {first} on")
                self._rows[kind].append(mine)
            if sum(len(rows[kinds == kind]) for kind in KINDS) != len(rows):
                raise StoreFormatError(f"{key}: kinds must be {' or '.join(KINDS)}")
            self.tables.append(table)
        return self

    @property
    def table(self) -> pa.Table:
        """Every part, in order: `CLIP_SCHEMA`."""
        return pa.concat_tables(self.tables) if self.tables else CLIP_SCHEMA.empty_table()

    def max_row(self, kind: str, *, parts: int | None = None) -> int:
        """Highest row given out (by the first `parts` parts); -1 if none."""
        return max((int(rows[-1]) for rows in self._rows[kind][:parts] if len(rows)), default=-1)

    def sealed_blocks(self, kind: str) -> int:
        """Blocks given out so far: work exists for 0..n-1."""
        return sealed_blocks(self.refresh().max_row(kind), self.block_rows[kind])

    def planned_rows(self, kind: str, block: int) -> list[int]:
        """Rows of a block that belong to a clip; the rest of the block is unused."""
        size = self.block_rows[kind]
        if block * size > self.max_row(kind):
            self.refresh()
        return self.rows_between(kind, block * size, (block + 1) * size)

    def rows_between(self, kind: str, first: int, stop: int) -> list[int]:
        """Rows given out in [first, stop)."""
        found: list[int] = []
        for rows in self._rows[kind]:
            low, high = np.searchsorted(rows, (first, stop))
            found.extend(rows[low:high].tolist())
        return found

    def rows_of_clips(self, kind: str, clip_ids: Collection[str]) -> set[int]:
        """Every row of these clips."""
        wanted = pa.array(sorted(clip_ids), pa.string())
        found: set[int] = set()
        for table in self.tables:
            mine = table.filter(pc.and_(pc.equal(table["kind"], kind), pc.is_in(table["clip_id"], wanted)))
            found.update(mine["row"].to_pylist())
        return found

    def clip_ids(self, *, from_part: int = 0) -> set[str]:
        return {clip_id for table in self.tables[from_part:] for clip_id in table["clip_id"].to_pylist()}

    def datasets(self) -> list[str]:
        return sorted(set(self.table["dataset"].unique().to_pylist()))


def allocate(clips: Iterable[Clip], first_rows: dict[str, int]) -> list[tuple[int, Clip]]:
    """Rows for clips, per kind from its first row on, in the order given."""
    following = dict(first_rows)
    rows: list[tuple[int, Clip]] = []
    for clip in clips:
        rows.append((following[clip.kind], clip))
        following[clip.kind] += 1
    return rows


def part_bytes(rows: Sequence[tuple[int, Clip]]) -> bytes:
    return table_bytes(clips_to_table(rows))

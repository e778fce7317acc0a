"""The plan: which rows of which blocks each encoder still has to compute.

Resume, a new encoder and a retried quarantine follow one rule: an encoder computes the newest row of a clip, unless an
older row already holds the clip's tokens. Committed blocks are found by listing names; receipts are read only for clips
with several rows, and clips stay Arrow columns until a block becomes a task, so that a million are planned in seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore.clips import Clip
from featurestore.group_writer import GroupWriter
from featurestore.identity import FeatureIdentity
from featurestore.layout import block_of
from featurestore.records import Receipt, driver_runs, tombstoned_clips
from featurestore.schemas import table_to_clips
from featurestore.writer import StoreWriter

NOTHING_STALE: Mapping[str, Collection[str]] = MappingProxyType({})


class StoreView:
    """An open store and what a run reads of it, each once: removed clips and the records of earlier runs."""

    def __init__(self, writer: StoreWriter) -> None:
        self.writer, self.objects = writer, writer.objects

    @cached_property
    def removed(self) -> frozenset[str]:
        """Clips that a tombstone names."""
        return frozenset(tombstoned_clips(self.objects))

    @cached_property
    def runs(self) -> list[dict[str, Any]]:
        """Records of the store's extractions, oldest first."""
        return driver_runs(self.objects)

    def refresh(self) -> None:
        """Read removed clips again at the next use: another process may have removed some before the lease was held."""
        self.__dict__.pop("removed", None)


@dataclass(frozen=True, kw_only=True)
class PlannedBlock:
    """One block with something left to compute."""

    kind: str
    block: int
    clips: pa.Table = field(repr=False)  # every planned row of the block, CLIP_SCHEMA
    wanted: Mapping[str, frozenset[int]]  # encoder -> rows to compute
    batch: int  # clips per forward, of every encoder wanted

    @property
    def rows(self) -> tuple[tuple[int, Clip], ...]:
        """Every planned row of the block and its clip, made and checked anew at each call."""
        return tuple(table_to_clips(self.clips))

    @property
    def num_clips(self) -> int:
        return len(frozenset().union(*self.wanted.values()))

    @property
    def clip_ids(self) -> set[str]:
        """Clips that some encoder has to compute here."""
        return set().union(*self.clip_ids_by_encoder.values())

    @property
    def clip_ids_by_encoder(self) -> dict[str, set[str]]:
        ids = dict(zip(self.clips["row"].to_pylist(), self.clips["clip_id"].to_pylist(), strict=True))
        return {name: {ids[row] for row in rows} for name, rows in self.wanted.items()}


def plan_blocks(
    view: StoreView,
    identities: Mapping[str, FeatureIdentity],
    *,
    clip_ids: Collection[str],
    stale: Mapping[str, Collection[str]] = NOTHING_STALE,
) -> list[PlannedBlock]:
    """Blocks that hold any of `clip_ids` and miss tokens of an encoder, in the order of their rows.

    `stale` names clips by encoder whose older tokens do not count: their media changed. Encoders whose groups were made
    with different batch shapes get a block each: one shape gives one set of bytes.
    """
    store, planned = view.writer, []
    table = store.clips()
    for kind in sorted(table["kind"].unique().to_pylist(), reverse=True):
        of_kind = table.filter(pc.equal(table["kind"], kind)).sort_by("row").combine_chunks()
        rows = _Rows(of_kind, store.block_rows[kind])
        requested = rows.blocks_with(clip_ids)
        if not requested:
            continue
        wanted: dict[tuple[int, int], dict[str, frozenset[int]]] = defaultdict(dict)  # by block and batch shape
        for name, identity in identities.items():
            group = store.open_group(kind, identity.group_name)
            committed = group.committed_blocks()
            done = _clips_done_earlier(group, rows.older, committed, rows.block_rows)
            done = done.difference(stale.get(name, ())) | view.removed
            for block in requested:
                if block not in committed and (encoder_rows := rows.wanted(block, done)):
                    wanted[block, group.batch_shape][name] = encoder_rows
        planned += [
            PlannedBlock(kind=kind, block=block, clips=rows.table_of(block), wanted=by_encoder, batch=batch)
            for (block, batch), by_encoder in sorted(wanted.items(), key=lambda item: item[0])
        ]
    return planned


class _Rows:
    """The rows of one kind, ascending, as columns; a block is a slice of them."""

    def __init__(self, table: pa.Table, block_rows: int) -> None:
        self.block_rows = block_rows
        self._table = table
        self._rows: list[int] = table["row"].to_pylist()
        self._ids: list[str] = table["clip_id"].to_pylist()
        blocks, starts = np.unique(np.asarray(self._rows) // block_rows, return_index=True)
        stops = [*starts[1:].tolist(), len(self._rows)]
        self._slices = {
            block: slice(*ends) for block, *ends in zip(blocks.tolist(), starts.tolist(), stops, strict=True)
        }
        self._newest = dict(zip(self._ids, self._rows, strict=True))  # a later row replaces an earlier one
        self.older: dict[str, list[int]] = defaultdict(list)  # clips with several rows -> those before the newest
        if len(self._newest) < len(self._ids):
            for row, clip_id in zip(self._rows, self._ids, strict=True):
                if self._newest[clip_id] != row:
                    self.older[clip_id].append(row)

    def blocks_with(self, clip_ids: Collection[str]) -> list[int]:
        """Blocks that hold any of the clips."""
        is_requested = clip_ids.__contains__
        return [block for block, part in self._slices.items() if any(map(is_requested, self._ids[part]))]

    def wanted(self, block: int, done: Collection[str]) -> frozenset[int]:
        """Rows of a block to compute: the newest of each clip that is not done."""
        part = self._slices[block]
        pairs = zip(self._rows[part], self._ids[part], strict=True)
        return frozenset(row for row, clip_id in pairs if self._newest[clip_id] == row and clip_id not in done)

    def table_of(self, block: int) -> pa.Table:
        """The columns of a block's rows; nothing is copied."""
        part = self._slices[block]
        return self._table.slice(part.start, part.stop - part.start)


def _clips_done_earlier(
    group: GroupWriter, older: Mapping[str, list[int]], committed: Collection[int], block_rows: int
) -> set[str]:
    """Clips whose tokens of this encoder are in a row before their newest one."""
    receipts: dict[int, Receipt] = {}
    done = set()
    for clip_id, rows in older.items():
        for row in rows:
            block = block_of(row, block_rows)
            if block not in committed:
                continue
            if block not in receipts:
                receipts[block] = group.receipt(block)
            if receipts[block].outcome(row).state == "ok":
                done.add(clip_id)
    return done

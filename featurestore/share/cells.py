"""Cells of a store: what one encoder made of one clip, with its outcome, ready to be laid into another store.

A cell is named by (encoder identity, clip id), whatever store it lies in. `StoreCells` reads them from a store at its
newest snapshot; `exported.py` reads the same from exported files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np

from featurestore.canaries import Canaries, read_canaries
from featurestore.clips import Clip
from featurestore.errors import StoreDamagedError
from featurestore.find import Place
from featurestore.groups import GroupRecord, read_arrays
from featurestore.layout import block_of, shard_key, slot_of
from featurestore.metadata import ArraySpec
from featurestore.places.by_url import in_parallel, open_objects
from featurestore.reader import ShardCache
from featurestore.receipts import Receipt, RowOutcome, read_receipt, row_digest
from featurestore.samples import Sample
from featurestore.shards import decode_row, encode_row
from featurestore.snapshot_table import column
from featurestore.snapshots import load_snapshot, read_snapshot_table
from featurestore.store import FeatureStore
from featurestore.tombstones import Tombstone

MAX_RECEIPTS = 512  # kept at hand


@dataclass(frozen=True, kw_only=True)
class CellGroup(GroupRecord):
    """One encoder of one kind, as its cells' source has it."""

    codec: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is known of a clip and encoder without opening a shard."""

    is_ok: bool
    digest: str | None  # of the stored row, where ok


@dataclass(frozen=True, kw_only=True)
class LoadedCell:
    """A cell with its outcome and, where ok, its encoded chunks by array."""

    outcome: RowOutcome
    chunks: Mapping[str, bytes]


class CellSource(Protocol):
    """Where cells come from."""

    name: str
    block_rows: Mapping[str, int]
    parallel_reads: int

    def clips(self) -> list[Clip]: ...

    def groups(self) -> dict[str, CellGroup]: ...  # by "kind/group"

    def cells(self, name: str) -> dict[str, Cell]: ...  # by clip id: what was committed or failed

    def load(self, name: str, clip_id: str, specs: Mapping[str, ArraySpec]) -> LoadedCell: ...  # checked by digest

    def media(self) -> dict[str, str]: ...  # sha256 of the media by clip id, of clips that have tokens

    def canaries(self, name: str) -> Canaries | None: ...  # of a group, checked by their digest

    def samples(self) -> dict[str, list[Sample]]: ...

    def journal(self) -> Iterable[tuple[str, dict[str, Any]]]: ...

    def provenance(self) -> dict[str, Any]: ...

    def tombstones(self) -> Iterable[Tombstone]: ...  # removals that hold wherever its clips go


class StoreCells:
    """The cells of a store at its newest snapshot, or the one named."""

    def __init__(self, place: Place, *, snapshot: str | None = None) -> None:
        self._store = FeatureStore.open(place, snapshot=snapshot, cache=False)
        self.name = self._store.path
        self._objects = open_objects(place)
        self._record = load_snapshot(self._objects, self._store.snapshot)
        self.block_rows = self._record.block_rows
        self.parallel_reads = self._objects.parallel_reads
        self._shards = ShardCache(self._objects)
        self._rows: dict[str, dict[str, tuple[int, bool]]] = {}  # "kind/group" -> clip id -> row, is it ok
        self._specs: dict[str, dict[str, ArraySpec]] = {}
        self._receipt = lru_cache(MAX_RECEIPTS)(self._read_receipt)
        self._kinds = {clip.clip_id: clip.kind for clip in self.clips()}

    def tombstones(self) -> list[Tombstone]:
        return list(self._store.tombstones.values())

    def clips(self) -> list[Clip]:
        names = ("dataset", "path", "kind", "start_s", "end_s", "end_frame")
        return [Clip(**record) for record in self._store.clips.select(names).to_pylist()]

    def groups(self) -> dict[str, CellGroup]:
        return {
            name: CellGroup(
                identity=summary.identity,
                weights=summary.weights,
                batch_shape=summary.batch_shape,
                codec=self._stored_specs(name)["tokens"].codec,
            )
            for name, summary in self._record.groups.items()
        }

    def cells(self, name: str) -> dict[str, Cell]:
        kind, group = name.split("/")
        columns = [column(group, suffix) for suffix in ("row", "digest", "failed_row")]
        table = read_snapshot_table(self._objects, self._record, ["clip_id", *columns])
        found: dict[str, Cell] = {}
        rows: dict[str, tuple[int, bool]] = {}
        for clip_id, row, digest, failed in zip(*(table[c].to_pylist() for c in table.column_names), strict=True):
            if self._kinds.get(clip_id) == kind and max(row, failed) >= 0:
                found[clip_id] = Cell(is_ok=row >= 0, digest=digest)
                rows[clip_id] = (row, True) if row >= 0 else (failed, False)
        self._rows[name] = rows
        return found

    def load(self, name: str, clip_id: str, specs: Mapping[str, ArraySpec]) -> LoadedCell:
        kind, group = name.split("/")
        if name not in self._rows:
            self.cells(name)
        row, is_ok = self._rows[name][clip_id]
        size = self.block_rows[kind]
        block, slot = block_of(row, size), slot_of(row, size)
        outcome = self._receipt(kind, group, block).outcome(row)
        if (outcome.state == "ok") != is_ok:
            raise StoreDamagedError(f"{self.name}: the receipt of {clip_id} and the snapshot differ; verify that store")
        chunks: dict[str, bytes] = {}
        stored: dict[str, np.ndarray] = {}
        for array, spec in self._stored_specs(name).items() if is_ok else ():
            shard = self._shards.get(shard_key(kind, group, array, block), spec)
            chunk, items = shard.chunk(slot), shard.decode(slot)
            if chunk is None or items is None:
                raise StoreDamagedError(f"{self.name}: {clip_id} is missing in its shard; verify that store")
            stored[array] = items
            same = specs[array].codec == spec.codec
            chunks[array] = chunk.tobytes() if same else encode_row(specs[array], items)
        check_cell(self.name, clip_id, outcome, stored)
        return LoadedCell(outcome=outcome, chunks=chunks)

    def media(self) -> dict[str, str]:
        """Read from receipts; one encoder's are enough where it has all clips."""
        found: dict[str, str] = {}
        for name in self._record.groups:
            kind, group = name.split("/")
            size, wanted = self.block_rows[kind], defaultdict(list)
            self.cells(name)
            for clip_id, (row, is_ok) in self._rows[name].items():
                if is_ok and clip_id not in found:
                    wanted[block_of(row, size)].append((row, clip_id))
            read = partial(self._receipt, kind, group)
            for receipt in in_parallel(read, sorted(wanted), self.parallel_reads):
                for row, clip_id in wanted[receipt.block]:
                    if sha256 := receipt.outcome(row).media_sha256:
                        found[clip_id] = sha256
        return found

    def canaries(self, name: str) -> Canaries | None:
        if name not in self._record.canaries:
            return None
        return read_canaries(self._objects, name.split("/")[0], self._record.groups[name].identity)

    def samples(self) -> dict[str, list[Sample]]:
        return {name: self._store.samples(name) for name in self._store.sample_names}

    def journal(self) -> Iterable[tuple[str, dict[str, Any]]]:
        return self._store.journal()

    def provenance(self) -> dict[str, Any]:
        return {"store": self.name, "snapshot": self._store.snapshot}

    def _stored_specs(self, name: str) -> dict[str, ArraySpec]:
        if name not in self._specs:
            kind = name.split("/")[0]
            identity = self._record.groups[name].identity
            self._specs[name] = read_arrays(self._objects, kind, identity, self.block_rows[kind])
        return self._specs[name]

    def _read_receipt(self, kind: str, group: str, block: int) -> Receipt:
        return read_receipt(self._objects, kind, group, block, self.block_rows[kind])


def check_cell(source: str, clip_id: str, outcome: RowOutcome, stored: Mapping[str, np.ndarray]) -> None:
    """Refuse tokens that are not the ones that were committed."""
    if outcome.state == "ok" and row_digest(stored) != outcome.digest:
        raise StoreDamagedError(f"{source}: the tokens of {clip_id} differ from their digest; verify it, then repair")


def decoded_cell(cell: LoadedCell, specs: Mapping[str, ArraySpec]) -> dict[str, np.ndarray]:
    """Stored items of an ok cell, by array."""
    stored: dict[str, np.ndarray] = {}
    for name, spec in specs.items():
        stored[name] = np.empty(spec.row_shape, dtype=spec.dtype)
        decode_row(spec, np.frombuffer(cell.chunks[name], dtype=np.uint8), stored[name])
    return stored

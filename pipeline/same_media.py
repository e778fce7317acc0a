"""The same media in two datasets of one store are encoded once: cells are copied from clips made of the same bytes.

Only bytes decide: a decode process takes the sha256 of the media that it is about to decode, and the worker copies the
cells of another clip of the store with this sha256, the same kind and span, under the same identity. The clip is then
not decoded. The block is still computed, written and committed by one task. Digests are read from the receipts of the
other datasets, once per worker, and only where the store has other datasets under the same identity.
"""

from __future__ import annotations

import posixpath
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore.clips import Clip
from featurestore.identity import FeatureIdentity
from featurestore.layout import block_of, slot_of
from featurestore.objects.open import in_parallel
from featurestore.records import Receipt, tombstoned_clips
from featurestore.shards import ShardCache
from featurestore.store import FeatureStore
from featurestore.transfer.merge import LoadedCell, check_cell
from featurestore.writer import StoreWriter
from mervcache.errors import StoreDamagedError
from pipeline.decode.sampling import has_substitutes
from pipeline.plan import PlannedBlock

MAX_RECEIPTS = 64  # kept in memory
SHAPE = tuple(each.name for each in fields(Clip) if each.name not in ("dataset", "path"))  # kind and span


@dataclass(frozen=True)
class SameMediaTask:
    """Where a worker may find cells of the same media for one block; small and picklable."""

    dataset: str  # of the block's new clips: those of all others are searched
    groups: tuple[tuple[str, str], ...]  # (encoder, group) that hold cells of other datasets
    snapshot: str | None  # newest at the run's start; what was committed before is searched


def same_media_tasks(
    store: StoreWriter,
    blocks: Iterable[PlannedBlock],
    identities: Mapping[str, FeatureIdentity],
    dataset: str,
    snapshot: str | None,
) -> dict[str, SameMediaTask | None]:
    """Kind -> its task, given encoder -> identity; None where no other dataset has cells of any of the identities."""
    return {
        kind: same_media_task(store, kind, identities, dataset, snapshot) for kind in {block.kind for block in blocks}
    }


def same_media_task(
    store: StoreWriter, kind: str, identities: Mapping[str, FeatureIdentity], dataset: str, snapshot: str | None
) -> SameMediaTask | None:
    """The task of one kind."""
    table = store.clips()
    rows = table.filter(pc.and_(pc.equal(table["kind"], kind), pc.not_equal(table["dataset"], dataset)))["row"]
    if not len(rows):
        return None
    blocks = set(np.unique(rows.to_numpy() // store.block_rows[kind]).tolist())
    groups = {name: identity.group_name for name, identity in identities.items()}
    stored = store.encoder_groups(kind)  # a new encoder has none
    groups = {name: group for name, group in groups.items() if group in stored}
    held = {name: group for name, group in groups.items() if blocks & store.open_group(kind, group).committed_blocks()}
    return SameMediaTask(dataset, tuple(held.items()), snapshot) if held else None


def seem_held(store: FeatureStore, identity: FeatureIdentity, dataset: str, clips: Iterable[Clip]) -> set[str]:
    """Ids of clips that other datasets hold under this identity by file name, kind and span; bytes are not compared."""
    key = next((key for key, stored in store.encoders.items() if stored.id == identity.id), None)
    if key is None:
        return set()
    table = store.clips
    held = table.filter(pc.and_(table[key], pc.not_equal(table["dataset"], dataset))).select(["path", *SHAPE])
    columns = [held[name].to_pylist() for name in ("path", *SHAPE)]
    known = {(posixpath.basename(path), *shape) for path, *shape in zip(*columns, strict=True)}
    shapes = ((clip, tuple(getattr(clip, name) for name in SHAPE)) for clip in clips)
    return {clip.clip_id for clip, shape in shapes if (posixpath.basename(clip.path), *shape) in known}


class StoredMedia:
    """The cells of one kind that clips of other datasets have, by the sha256 of their media. Safe among threads."""

    def __init__(self, place: str, kind: str, task: SameMediaTask) -> None:
        store = StoreWriter.open(place)
        self._block_rows, self._kind = store.block_rows[kind], kind
        self._groups = {name: store.open_group(kind, group) for name, group in task.groups}
        self._shards = ShardCache(store.objects)
        self._receipt = lru_cache(MAX_RECEIPTS)(self._read_receipt)
        table = store.clips()
        removed = pa.array(sorted(tombstoned_clips(store.objects)), pa.string())
        is_other = pc.and_(pc.equal(table["kind"], kind), pc.not_equal(table["dataset"], task.dataset))
        table = table.filter(pc.and_(is_other, pc.invert(pc.is_in(table["clip_id"], removed)))).sort_by("row")
        self._clips = table.select(["row", *SHAPE]).combine_chunks()
        self._rows = self._clips["row"].to_numpy()
        self._keys, self._key_rows = self._read_digests(store)

    def cells(
        self, sha256: str, clip: Clip, encoders: Collection[str], *, accept_damaged: bool
    ) -> dict[str, LoadedCell]:
        """Encoder -> a whole cell made of these bytes and this span; encoders without such a cell are left out.

        Cells of damaged media, with substituted frames, are taken only where such frames are accepted.
        """
        found: dict[str, LoadedCell] = {}
        first, stop = (np.searchsorted(self._keys, _key(sha256), side) for side in ("left", "right"))
        for row in self._key_rows[first:stop].tolist():
            stored = self._clips.slice(int(np.searchsorted(self._rows, row)), 1).to_pylist()[0]
            if any(stored[name] != getattr(clip, name) for name in SHAPE):
                continue
            for name in set(encoders).intersection(self._groups) - found.keys():
                cell = self._cell(name, row, sha256)
                if cell is not None and (accept_damaged or not has_substitutes(cell.outcome.decoder)):
                    found[name] = cell
        return found

    def _cell(self, encoder: str, row: int, sha256: str) -> LoadedCell | None:
        """The cell of a row, if it was made of these bytes and is whole; damage is for `verify` to report."""
        group = self._groups[encoder]
        try:
            outcome = self._receipt(encoder, block_of(row, self._block_rows)).outcome(row)
            if outcome.state != "ok" or outcome.media_sha256 != sha256:
                return None
            chunks, stored = {}, {}
            for name, spec in group.specs.items():
                shard = self._shards.get(self._kind, group.name, spec, block_of(row, self._block_rows))
                chunk, items = (read(slot_of(row, self._block_rows)) for read in (shard.chunk, shard.decode))
                if chunk is None or items is None:
                    return None
                chunks[name], stored[name] = chunk.tobytes(), items.copy()
            check_cell(group.name, f"row {row}", outcome, stored)
        except (FileNotFoundError, StoreDamagedError):
            return None
        return LoadedCell(outcome=outcome, chunks=chunks)

    def _read_digests(self, store: StoreWriter) -> tuple[np.ndarray, np.ndarray]:
        """uint64 keys of all digests, ascending, and their rows; of each block, the first encoder's receipt."""
        blocks: dict[int, str] = {}
        wanted = set(np.unique(self._rows // self._block_rows).tolist())
        for name, group in self._groups.items():
            blocks |= dict.fromkeys(wanted & group.committed_blocks() - blocks.keys(), name)
        rows, keys, mine = [], [], set(self._rows.tolist())
        read = [(name, block) for block, name in sorted(blocks.items())]
        for receipt in in_parallel(lambda each: self._read_receipt(*each), read, store.objects.parallel_reads):
            for row, outcome in enumerate(receipt.rows, start=receipt.first_row()):
                if outcome.media_sha256 is not None and row in mine:
                    rows.append(row)
                    keys.append(_key(outcome.media_sha256))
        order = np.argsort(np.array(keys, np.uint64), kind="stable")
        return np.array(keys, np.uint64)[order], np.array(rows, np.int64)[order]

    def _read_receipt(self, encoder: str, block: int) -> Receipt:
        return self._groups[encoder].receipt(block)


def _key(sha256: str) -> np.uint64:
    """The first 64 bits: what digests are sorted by; whole digests are compared in the receipts."""
    return np.uint64(int(sha256[:16], 16))


_lock = threading.Lock()


def stored_media(place: str, kind: str, task: SameMediaTask) -> StoredMedia:
    """This process's `StoredMedia`, made once for all blocks of a run."""
    with _lock:
        return _opened(place, kind, task)


_opened = lru_cache(4)(StoredMedia)

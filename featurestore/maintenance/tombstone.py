"""Erasing: what tombstones name is taken off the disk, wherever it lies in a store.

Comes in: a store with tombstones, its own or brought by a pull or union. Goes out: the same store without the tokens
and conversations of their clips. All is found by looking, nothing is remembered, so it may be killed and run again, and
running it once too often changes nothing. Orphan shards are emptied as well: their rows would be adopted.

Same media: the other clips of a store that were made from the bytes of a clip's file, whatever they are called.

A video that two datasets share has two ids; so have two spans of one film, and a file under two names. Receipts hold
the sha256 of the file behind every row, whole whatever the span: that is what is compared. A clip that was never
computed has no receipt and is not found, nor is the same film encoded anew.

Putting other bytes in the place of a committed block: what only `repair` and `tombstone` may do.

Shards first, each replaced whole and in one step, the receipt last and numbered: it names the one before. Chunks that
stay are kept as they are, so doing it again after a kill gives the same bytes, whatever was done already.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from featurestore.clips import KINDS
from featurestore.layout import SAMPLES, block_of, receipt_key, samples_files, samples_key, shard_key, slot_of
from featurestore.lease import StoreLease
from featurestore.locate import Place
from featurestore.objects.base import Objects
from featurestore.objects.open import in_parallel
from featurestore.parquet import read_table, table_bytes, table_file
from featurestore.reader import Shard, build_shard
from featurestore.records import (
    Receipt,
    RowOutcome,
    Tombstone,
    put_tombstone,
    read_tombstones,
    row_digest,
    tombstoned_clips,
)
from featurestore.schemas import SAMPLE_SCHEMA
from featurestore.snapshots import ClipIndex
from featurestore.store import clips_named
from featurestore.writer import GroupWriter, StoreWriter
from featurestore.zarr_metadata import ArraySpec, encoder_groups
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import StoreDamagedError, UserError
from mervcache.files import sha256_hex


def clips_of_same_media(writer: StoreWriter, clip_ids: Collection[str]) -> list[str]:
    """Sorted ids of all other clips that share a file with one of these; reads every receipt of the store once."""
    index = ClipIndex(writer.objects, writer.block_rows).refresh()
    groups = [writer.open_group(kind, name) for kind in KINDS for name in writer.encoder_groups(kind)]
    rows = {kind: index.rows_of_clips(kind, clip_ids) for kind in KINDS}
    media = {
        sha256
        for group in groups
        for block in {block_of(row, group.block_rows) for row in rows[group.kind]} & group.committed_blocks()
        for row, sha256 in _media(group, block).items()
        if row in rows[group.kind]
    }
    if not media:
        return []
    blocks = [(group, block) for group in groups for block in sorted(group.committed_blocks())]

    def found_in(entry: tuple[GroupWriter, int]) -> list[tuple[str, int]]:
        return [(entry[0].kind, row) for row, sha256 in _media(*entry).items() if sha256 in media]

    same = {pair for pairs in in_parallel(found_in, blocks, writer.objects.parallel_reads) for pair in pairs}
    columns = [index.table[name].to_pylist() for name in ("clip_id", "kind", "row")]
    found = {clip_id for clip_id, kind, row in zip(*columns, strict=True) if (kind, row) in same}
    return sorted(found - set(clip_ids))


def _media(group: GroupWriter, block: int) -> dict[int, str]:
    """Row -> sha256 of its media, of clips that failed as well: they have conversations."""
    receipt = group.receipt(block)
    rows = enumerate(receipt.rows, start=receipt.first_row())
    return {row: outcome.media_sha256 for row, outcome in rows if outcome.media_sha256 is not None}


def erase_rows(group: GroupWriter, block: int, rows: Collection[int]) -> bool:
    """Take rows out of a block's shards and its receipt; False if they were not there.

    The rows of other clips must be whole: damage is never put under a new receipt.
    """
    receipt = group.receipt(block) if block in group.committed_blocks() else None
    shards = open_shards(group.objects, group.kind, group.name, block, group.specs)
    places = {slot_of(row, group.block_rows) for row in rows}
    try:
        is_in_shard = {name: bool(places & set(shard.rows())) for name, shard in shards.items()}
        skipped = receipt is None or all(receipt.rows[place].state in ("skipped", "empty") for place in places)
        if skipped and not any(is_in_shard.values()):
            return False
        if receipt is not None:
            _check_others(receipt, shards, places)
        pieces = {name: _without(shard, places) for name, shard in shards.items() if is_in_shard[name]}
    finally:
        for shard in shards.values():
            shard.close()
    for name, data in pieces.items():
        group.objects.replace(shard_key(group.kind, group.name, name, block), data)
    if receipt is not None:
        outcomes = [
            RowOutcome(state="skipped") if place in places and outcome.state != "empty" else outcome
            for place, outcome in enumerate(receipt.rows)
        ]
        put_numbered(group.objects, replace(receipt, rows=tuple(outcomes)), receipt, group.specs)
    return True


def put_numbered(objects: Objects, receipt: Receipt, before: Receipt, specs: Mapping[str, ArraySpec]) -> Receipt:
    """Replace a block's receipt by one of what the shards on disk hold."""
    shards = open_shards(objects, receipt.kind, receipt.group, receipt.block, specs)
    numbered = replace(
        receipt,
        shards={name: shard.record() for name, shard in shards.items()},
        generation=before.generation + 1,
        replaces=before.digest,
    )
    for shard in shards.values():
        shard.close()
    objects.replace(receipt_key(receipt.kind, receipt.group, receipt.block), numbered.to_bytes())
    return numbered


def open_shards(
    objects: Objects, kind: str, group: str, block: int, specs: Mapping[str, ArraySpec]
) -> dict[str, Shard]:
    """A block's shards that are there."""
    keys = {name: shard_key(kind, group, name, block) for name in specs}
    return {name: Shard(specs[name], objects.open(key)) for name, key in keys.items() if objects.exists(key)}


def _without(shard: Shard, places: Collection[int]) -> bytes:
    kept = {place: shard.chunk(place) for place in shard.rows() if place not in places}
    return b"".join(
        build_shard(shard.spec, {place: chunk.tobytes() for place, chunk in kept.items() if chunk is not None})
    )


def _check_others(receipt: Receipt, shards: Mapping[str, Shard], places: Collection[int]) -> None:
    for place, outcome in enumerate(receipt.rows):
        if outcome.state != "ok" or place in places:
            continue
        stored = {name: shard.decode(place) for name, shard in shards.items()}
        whole = set(stored) == set(receipt.shards) and all(array is not None for array in stored.values())
        if not whole or row_digest(stored) != outcome.digest:
            raise StoreDamagedError(
                f"block {receipt.block} of {receipt.kind}/{receipt.group} is damaged at row "
                f"{receipt.first_row() + place}: run `merv-pipeline repair` first, then the same command again"
            )


def tombstone(
    path: Place,
    names: Iterable[str],
    *,
    reason: str,
    date: str | None = None,
    all_copies: bool | None = None,
    progress: ProgressLine = SILENT,
) -> dict[str, object]:
    """Remove clips from a store for good; returns what was done.

    Clips are named as `featurestore.store` has it. From the record on, readers that open the store list and read
    none of them. A clip that the store has never seen is a mistake.

    Where other clips were made from the same media, `all_copies` says whether these go too: a consent is about the
    video, a licence may be about one dataset's copy. Neither can be undone or is safe to guess, so without a word
    nothing is removed and an error names them.
    """
    writer = StoreWriter.open(path)
    with StoreLease(path, "tombstone"):
        clips = sorted(set(clips_named(writer.clips()["clip_id"].to_pylist(), names)))
        if not clips:
            raise UserError("name at least one clip id; `merv-pipeline inspect` finds ids by path")
        known = tombstoned_clips(writer.objects)
        new = [clip for clip in clips if clip not in known]  # none: a removal that was cut short is finished
        same = [clip for clip in clips_of_same_media(writer, new) if clip not in known] if new else []
        if same and all_copies is None:
            raise UserError(_undecided(same))
        removed = [*new, *same] if all_copies else new
        if removed:
            _put_tombstone(writer.objects, removed, reason, date)
        blocks = erase_tombstoned(writer, progress)
        snapshot = writer.publish_snapshot()
    return {
        "clips": sorted({*clips, *removed}),
        "already removed": len(clips) - len(new),
        "others of the same media": {"removed" if all_copies else "left": same},
        "blocks rewritten": blocks,
        "snapshot": snapshot,
    }


def _put_tombstone(objects: Objects, clips: Sequence[str], reason: str, date: str | None) -> None:
    """The record of the removal, from which on it holds; it names the samples files that will be erased."""
    holding = _samples_holding(objects, set(clips))
    put_tombstone(objects, clips, reason, date or datetime.now(UTC).strftime("%Y-%m-%d"), holding.values())


def _undecided(same: Sequence[str]) -> str:
    shown = ", ".join(same[:20]) + (f" and {len(same) - 20} more" if len(same) > 20 else "")
    others = "1 other clip of this store was" if len(same) == 1 else f"{len(same)} other clips of this store were"
    return (
        f"nothing was removed: {others} made from the same media: {shown}. Say "
        "--all-copies to remove these as well (a consent withdrawn is about the video, whatever its name), or "
        "--exact-ids to leave them (a licence may be about one dataset's copy)"
    )


def erase_tombstoned(writer: StoreWriter, progress: ProgressLine = SILENT) -> int:
    """Take whatever the store's tombstones name off the disk; returns how many blocks were rewritten.

    For a store that took over tombstones from another one (pull, union), and for one whose tombstone was cut short.
    """
    stones = read_tombstones(writer.objects)
    removed = {clip: stone for stone in stones.values() for clip in stone.clips}
    if not removed:
        return 0
    _erase_samples(writer.objects, removed, {sha for stone in stones.values() for sha in stone.erased})
    index, rewritten = ClipIndex(writer.objects, writer.block_rows).refresh(), 0
    for kind in KINDS:
        blocks = _by_block(index.rows_of_clips(kind, removed), writer.block_rows[kind])
        groups = encoder_groups(writer.objects, kind) if blocks else ()
        progress.start(len(blocks) * len(groups))
        for name in groups:
            group = GroupWriter.open(writer.objects, index, kind, name)
            for block, rows in sorted(blocks.items()):
                rewritten += erase_rows(group, block, rows)
                progress.advance()
    return rewritten


def _by_block(rows: Collection[int], block_rows: int) -> dict[int, set[int]]:
    blocks: dict[int, set[int]] = defaultdict(set)
    for row in rows:
        blocks[block_of(row, block_rows)].add(row)
    return blocks


def _samples_holding(objects: Objects, clips: Collection[str]) -> dict[str, str]:
    """File name -> sha256 of every version of every samples file that speaks of any of the clips."""
    wanted, found = pa.array(sorted(clips), pa.string()), {}
    for file in samples_files(objects.list_names(SAMPLES)):
        data = table_file(objects, f"{SAMPLES}/{file}")
        table = read_table(data, SAMPLE_SCHEMA, f"{SAMPLES}/{file}", columns=["clip_id"])
        if pc.any(pc.is_in(table["clip_id"], wanted)).as_py():
            found[file] = sha256_hex(data)
    return found


def _erase_samples(objects: Objects, removed: Mapping[str, Tombstone], known: Collection[str]) -> None:
    """Put a version of each name without the clips' conversations; delete the versions that have them."""
    holding = _samples_holding(objects, removed.keys())
    if not holding:
        return
    if new := set(holding.values()) - set(known):  # of a store that the tombstone was not made in
        stone = next(iter(removed.values()))
        put_tombstone(objects, removed, stone.reason, stone.date, new)
    files = samples_files(objects.list_names(SAMPLES))
    for name in {files[file][0] for file in holding}:
        newest = max((version, file) for file, (other, version) in files.items() if other == name)
        if newest[1] in holding:
            _put_without(objects, f"{SAMPLES}/{newest[1]}", samples_key(name, newest[0] + 1), removed.keys())
    for file in holding:
        objects.delete(f"{SAMPLES}/{file}")


def _put_without(objects: Objects, key: str, target: str, removed: Collection[str]) -> None:
    table = read_table(objects.get(key), SAMPLE_SCHEMA, key)
    gone = pc.fill_null(pc.is_in(table["clip_id"], pa.array(sorted(removed), pa.string())), False)
    objects.put_exclusive(target, table_bytes(table.filter(pc.invert(gone))))

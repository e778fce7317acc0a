"""Erasing: what tombstones name is taken off the disk, wherever it lies in a store.

Comes in: a store with tombstones, its own or brought by a pull or union. Goes out: the same store without the tokens
and conversations of their clips. All is found by looking, nothing is remembered, so it may be killed and run again, and
running it once too often changes nothing. Orphan shards are emptied as well: their rows would be adopted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from featurestore.clip_names import clips_named
from featurestore.clips import KINDS
from featurestore.columns import SAMPLE_SCHEMA
from featurestore.digests import sha256_hex
from featurestore.errors import UserError
from featurestore.find import Place
from featurestore.groups import GroupWriter, encoder_groups
from featurestore.keep.rewrite import erase_rows
from featurestore.keep.same_media import clips_of_same_media
from featurestore.layout import SAMPLES, block_of, samples_files, samples_key
from featurestore.lease import StoreLease
from featurestore.parquet import read_table, table_bytes, table_file
from featurestore.parts import ClipIndex
from featurestore.places.objects import Objects
from featurestore.progress import SILENT, Progress
from featurestore.tombstones import Tombstone, put_tombstone, read_tombstones, tombstoned_clips
from featurestore.writer import StoreWriter


def tombstone(
    path: Place,
    names: Iterable[str],
    *,
    reason: str,
    date: str | None = None,
    everywhere: bool | None = None,
    progress: Progress = SILENT,
) -> dict[str, object]:
    """Remove clips from a store for good; returns what was done.

    Clips are named as `featurestore.clip_names` has it. From the record on, readers that open the store list and read
    none of them. A clip that the store has never seen is a mistake.

    Where other clips were made from the same media, `everywhere` says whether these go too: a consent is about the
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
        if same and everywhere is None:
            raise UserError(_undecided(same))
        removed = [*new, *same] if everywhere else new
        if removed:
            _put_tombstone(writer.objects, removed, reason, date)
        blocks = erase_tombstoned(writer, progress)
        snapshot = writer.publish_snapshot()
    return {
        "clips": sorted({*clips, *removed}),
        "already removed": len(clips) - len(new),
        "others of the same media": {"removed" if everywhere else "left": same},
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
        "--everywhere to remove these as well (a consent withdrawn is about the video, whatever its name), or "
        "--only-these to leave them (a licence may be about one dataset's copy)"
    )


def erase_tombstoned(writer: StoreWriter, progress: Progress = SILENT) -> int:
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
    objects.put_new(target, table_bytes(table.filter(pc.invert(gone))))

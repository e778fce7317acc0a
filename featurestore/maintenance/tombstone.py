"""Tombstones: clips are removed for good, their tokens and conversations erased from the files.

From the record on, readers neither list nor read the clips. What to erase is found by listing, so an erasure that was
killed, or that a store took over by a pull or union, is simply run again. Replacing a block is what only `repair` and
`tombstone` may do: shards first, each in one step, the receipt last; it is numbered and names the one before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from featurestore.clip_names import clips_named
from featurestore.clips import KINDS
from featurestore.group_writer import GroupWriter
from featurestore.layout import SAMPLES, block_of, receipt_key, samples_files, samples_key, shard_key, slot_of
from featurestore.lease import StoreLease
from featurestore.locate import Place
from featurestore.objects.base import Objects
from featurestore.objects.open import in_parallel
from featurestore.parquet import read_table, table_bytes, table_file
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
from featurestore.shards import Shard, build_shard, decode_all
from featurestore.snapshots import ClipIndex
from featurestore.windows import videos_in_windows, window_length
from featurestore.writer import StoreWriter
from featurestore.zarr_metadata import ArraySpec, encoder_groups
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import StoreDamagedError, UserError
from mervcache.files import sha256_hex

_SHOWN = 20  # clip ids in an error


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

    Clips are named as in `featurestore.clip_names.clips_named`; a video that is stored as windows names all of them.
    Where other clips were made from the same media, `all_copies` decides whether they go too: a consent is about the
    video, a licence may be about one dataset's copy.
    Neither can be undone or is safe to guess, so with None nothing is removed and an error names them.
    """
    writer = StoreWriter.open(path)
    with StoreLease(path, "tombstone"):
        stored = set(writer.clips()["clip_id"].to_pylist())
        videos = _videos(writer, stored)
        named = clips_named(stored | videos.keys(), names)
        clips = sorted({clip for name in named for clip in videos.get(name, {name})})
        if not clips:
            raise UserError("name at least one clip id; `merv-pipeline inspect` finds ids by path")
        known = tombstoned_clips(writer.objects)
        new = [clip for clip in clips if clip not in known]  # none: a removal that was interrupted is finished
        same = [clip for clip in clips_of_same_media(writer, new) if clip not in known] if new else []
        if same and all_copies is None:
            raise UserError(_undecided(same))
        removed = [*new, *same] if all_copies else new
        if removed:
            gone = {*known, *removed}  # conversations about a video go with the last of its windows
            entries = [*removed, *sorted(video for video, windows in videos.items() if windows <= gone)]
            date = date or datetime.now(UTC).strftime("%Y-%m-%d")
            put_tombstone(writer.objects, entries, reason, date, _samples_with(writer.objects, set(entries)).values())
        blocks = erase_tombstoned(writer, progress)
        snapshot = writer.publish_snapshot()
    return {
        "clips": sorted({*clips, *removed}),
        "already removed": len(clips) - len(new),
        "others of the same media": {"removed" if all_copies else "left": same},
        "blocks rewritten": blocks,
        "snapshot": snapshot,
    }


def _videos(writer: StoreWriter, stored: Collection[str]) -> dict[str, set[str]]:
    """Videos that are stored as windows -> their windows: whole files, and what conversations name."""
    rules = {identity.frame_rule for identity in writer.encoder_groups("video").values()}
    if all(window_length(rule) is None for rule in rules):
        return {}
    named = {clip_id.partition("#t=")[0] for clip_id in stored if "#t=" in clip_id}
    for file in samples_files(writer.objects.list_names(SAMPLES)):
        key = f"{SAMPLES}/{file}"
        table = read_table(table_file(writer.objects, key), SAMPLE_SCHEMA, key, columns=["clip_id"])
        named.update(filter(None, table["clip_id"].to_pylist()))
    return videos_in_windows(named, stored)


def _undecided(same: Sequence[str]) -> str:
    shown = ", ".join(same[:_SHOWN]) + (f" and {len(same) - _SHOWN} more" if len(same) > _SHOWN else "")
    others = "1 other clip of this store was" if len(same) == 1 else f"{len(same)} other clips of this store were"
    return (
        f"nothing was removed: {others} made from the same media: {shown}. Give "
        "--all-copies to remove these as well (a consent withdrawn is about the video, whatever its name), or "
        "--exact-ids to leave them (a licence may be about one dataset's copy)"
    )


def clips_of_same_media(writer: StoreWriter, clip_ids: Collection[str]) -> list[str]:
    """Sorted ids of all other clips made from the same file as one of these; reads every receipt of the store once.

    Receipts hold the sha256 of the file behind every row, whatever its span, name and dataset. A clip that was never
    computed has no receipt and is not found, nor is the same film encoded anew.
    """
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

    def rows_of_media(entry: tuple[GroupWriter, int]) -> list[tuple[str, int]]:
        return [(entry[0].kind, row) for row, sha256 in _media(*entry).items() if sha256 in media]

    same = {pair for pairs in in_parallel(rows_of_media, blocks, writer.objects.parallel_reads) for pair in pairs}
    columns = [index.table[name].to_pylist() for name in ("clip_id", "kind", "row")]
    others = {clip_id for clip_id, kind, row in zip(*columns, strict=True) if (kind, row) in same}
    return sorted(others - set(clip_ids))


def _media(group: GroupWriter, block: int) -> dict[int, str]:
    """Row -> sha256 of its media, of clips that failed as well: they have conversations."""
    receipt = group.receipt(block)
    rows = enumerate(receipt.rows, start=receipt.first_row())
    return {row: outcome.media_sha256 for row, outcome in rows if outcome.media_sha256 is not None}


def erase_tombstoned(writer: StoreWriter, progress: ProgressLine = SILENT) -> int:
    """Erase what the store's tombstones name from its files; returns how many blocks were rewritten.

    Shards without a receipt are emptied as well: the next extraction would adopt their rows.
    """
    tombstones = read_tombstones(writer.objects)
    removed = {clip: tombstone for tombstone in tombstones.values() for clip in tombstone.clips}
    if not removed:
        return 0
    _erase_samples(writer.objects, removed, {sha256 for each in tombstones.values() for sha256 in each.erased})
    index, rewritten = ClipIndex(writer.objects, writer.block_rows).refresh(), 0
    for kind in KINDS:
        rows_of: dict[int, set[int]] = defaultdict(set)
        for row in index.rows_of_clips(kind, removed):
            rows_of[block_of(row, writer.block_rows[kind])].add(row)
        groups = encoder_groups(writer.objects, kind) if rows_of else ()
        progress.start(len(rows_of) * len(groups))
        for name in groups:
            group = GroupWriter(writer.objects, index, kind, name)
            for block, rows in sorted(rows_of.items()):
                rewritten += _erase_rows(group, block, rows)
                progress.advance()
    return rewritten


def _erase_samples(objects: Objects, removed: Mapping[str, Tombstone], known: Collection[str]) -> None:
    """Put a version of each name without the clips' conversations; delete the versions that have them."""
    holding = _samples_with(objects, removed.keys())
    if not holding:
        return
    if new := set(holding.values()) - set(known):  # of a store that the tombstone was not made in
        first = next(iter(removed.values()))
        put_tombstone(objects, removed, first.reason, first.date, new)
    files = samples_files(objects.list_names(SAMPLES))
    for name in {files[file][0] for file in holding}:
        version, file = max((version, file) for file, (other, version) in files.items() if other == name)
        if file in holding:
            table = read_table(objects.get(f"{SAMPLES}/{file}"), SAMPLE_SCHEMA, f"{SAMPLES}/{file}")
            is_removed = pc.is_in(table["clip_id"], pa.array(sorted(removed), pa.string()))
            kept = table.filter(pc.invert(pc.fill_null(is_removed, False)))
            objects.put_exclusive(samples_key(name, version + 1), table_bytes(kept))
    for file in holding:
        objects.delete(f"{SAMPLES}/{file}")


def _samples_with(objects: Objects, clips: Collection[str]) -> dict[str, str]:
    """File name -> sha256 of every version of every samples file with conversations about any of the clips."""
    wanted = pa.array(sorted(clips), pa.string())
    holding: dict[str, str] = {}
    for file in samples_files(objects.list_names(SAMPLES)):
        data = table_file(objects, f"{SAMPLES}/{file}")
        table = read_table(data, SAMPLE_SCHEMA, f"{SAMPLES}/{file}", columns=["clip_id"])
        if pc.any(pc.is_in(table["clip_id"], wanted)).as_py():
            holding[file] = sha256_hex(data)
    return holding


def _erase_rows(group: GroupWriter, block: int, rows: Collection[int]) -> bool:
    """Take rows out of a block's shards and its receipt; False if they were not there.

    The rows of other clips must be whole: damage is never put under a new receipt. Their chunks are kept as they are,
    so doing it again after a kill gives the same bytes.
    """
    receipt = group.receipt(block) if block in group.committed_blocks() else None
    shards = open_shards(group.objects, group.kind, group.name, block, group.specs)
    slots = {slot_of(row, group.block_rows) for row in rows}
    data: dict[str, bytes] = {}
    try:
        holding = {name: shard for name, shard in shards.items() if slots & set(shard.rows())}
        is_skipped = receipt is None or all(receipt.rows[slot].state in ("skipped", "empty") for slot in slots)
        if is_skipped and not holding:
            return False
        if receipt is not None:
            _check_other_rows(receipt, shards, slots)
        for name, shard in holding.items():
            kept = {slot: shard.chunk(slot) for slot in shard.rows() if slot not in slots}
            chunks = {slot: chunk.tobytes() for slot, chunk in kept.items() if chunk is not None}
            data[name] = b"".join(build_shard(shard.spec, chunks))
    finally:
        for shard in shards.values():
            shard.close()
    for name, shard_bytes in data.items():
        group.objects.replace(shard_key(group.kind, group.name, name, block), shard_bytes)
    if receipt is not None:
        outcomes = [
            RowOutcome(state="skipped") if slot in slots and outcome.state != "empty" else outcome
            for slot, outcome in enumerate(receipt.rows)
        ]
        shards = open_shards(group.objects, group.kind, group.name, block, group.specs)
        numbered = replace(
            receipt,
            rows=tuple(outcomes),
            shards={name: shard.record() for name, shard in shards.items()},
            generation=receipt.generation + 1,
            replaces=receipt.digest,
        )
        for shard in shards.values():
            shard.close()
        group.objects.replace(receipt_key(group.kind, group.name, block), numbered.to_bytes())
    return True


def _check_other_rows(receipt: Receipt, shards: Mapping[str, Shard], slots: Collection[int]) -> None:
    for slot, outcome in enumerate(receipt.rows):
        if outcome.state != "ok" or slot in slots:
            continue
        stored = decode_all(shards, slot)
        if stored is None or set(stored) != set(receipt.shards) or row_digest(stored) != outcome.digest:
            raise StoreDamagedError(
                f"block {receipt.block} of {receipt.kind}/{receipt.group} is damaged at row "
                f"{receipt.first_row() + slot}: run `merv-pipeline repair` first, then the same command again"
            )


def open_shards(
    objects: Objects, kind: str, group: str, block: int, specs: Mapping[str, ArraySpec]
) -> dict[str, Shard]:
    """The shards of a block that exist."""
    keys = {name: shard_key(kind, group, name, block) for name in specs}
    return {name: Shard(specs[name], objects.open(key)) for name, key in keys.items() if objects.exists(key)}

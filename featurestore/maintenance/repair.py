"""Repair: what `verify` finds damaged is put right, and nothing else is touched.

Comes in: a store, perhaps another copy of it, perhaps a way to compute blocks again. Goes out: what was done, object by
object. In order: what others are checked by comes first (removals, snapshots, clip parts, documents), then receipts,
then shards. Every step replaces one object whole, so a repair that was killed is simply run again. What cannot be put
right stays as it is and is named. How a file is mended stands in `repair_files.py` and `repair_shards.py`.

Mending one file that is no shard: from its own bytes, from another copy, from what others say of it.

Comes in: the key of a file that a verification found damaged. Goes out: what was done, in words. In order: one flipped
bit undone, the same file of another copy, made again from what it describes or what names it. What depends on nothing
and cannot be restored is removed: a snapshot is made again from the receipts, canaries by the next extract, and a
journal changes no byte.

Mending a shard whose receipt is sound: a flipped bit undone, another copy fetched, or computed again.

A shard is put back only if it has the sha256 that its receipt names. Other bytes need somebody's word for it, and get a
receipt with a number.

Documents (`zarr.json`) made again from what they describe: rows, identities and what snapshots remember of them.

A receipt that is lost, made again from the shards and from what the newest snapshot knows of their rows.

Media digests and decoders stand in receipts only, so the new one has none and a number that says it replaced another.
Rows are taken over only where the shards have the digests that the snapshot names.

A clip part that is lost, made again from what the newest snapshot lists; it counts only with the digest it had.

Snapshots list clips in the order in which they got rows, rows follow one another, and a clip's id says all of it, so
the bytes can be known. They cannot where the part gave second rows to clips (a retry), and where another version of the
Parquet library would write the same table in other bytes: then the digest differs, and nothing is put.

One flipped bit, undone: what a failing disk or memory does most often needs no copy to be mended.

Bytes whose sha256 is known are searched for the one bit that makes it right (quadratic, so for small files only); bytes
that end in their crc32c tell the place of the bit by themselves, in linear time. Nothing is believed without a sha256.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import google_crc32c
import numpy as np

from featurestore.clips import KINDS, Clip
from featurestore.identity import FeatureIdentity
from featurestore.layout import (
    ARRAYS,
    CANARIES,
    JOURNAL,
    MAX_BLOCK_ROWS,
    PARTS,
    RECEIPTS,
    ROOT_METADATA,
    SAMPLES,
    SNAPSHOTS,
    TOMBSTONES,
    array_metadata_key,
    next_batch_row,
    receipt_key,
    receipt_place,
    record_name,
    reference_clip_place,
    rows_of,
    samples_files,
    sealed_blocks,
    shard_key,
    shard_place,
    snapshot_keys,
)
from featurestore.lease import StoreLease
from featurestore.locate import Place, no_store_at
from featurestore.maintenance.tombstone import erase_tombstoned, open_shards
from featurestore.maintenance.verify import Finding, Verification
from featurestore.objects.base import Objects, get_bounded
from featurestore.objects.open import open_objects
from featurestore.parquet import MAX_TABLE_BYTES, own_digest_holds, read_table, table_file
from featurestore.reader import ABSENT, Shard
from featurestore.records import (
    MAX_JOURNAL_BYTES,
    Receipt,
    RowOutcome,
    Tombstone,
    max_receipt_bytes,
    parse_journal,
    row_digest,
)
from featurestore.records import MAX_RECORD_BYTES as MAX_TOMBSTONE_BYTES
from featurestore.reference_clips import ReferenceClips, max_reference_clip_bytes
from featurestore.schemas import CLIP_SCHEMA
from featurestore.snapshots import MAX_RECORD_BYTES as MAX_SNAPSHOT_BYTES
from featurestore.snapshots import ClipIndex, Snapshot, allocate, column, load_snapshot, part_bytes, read_snapshot_table
from featurestore.writer import GroupWriter, StoreWriter
from featurestore.zarr_metadata import (
    CODECS,
    ArraySpec,
    GroupRecord,
    array_specs,
    document_bytes,
    group_document,
    parse_array,
    parse_group,
    parse_root,
    read_document,
    read_group,
    root_document,
)
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import MediaError, MervCacheError, StoreError, StoreFormatError, StoreNotFoundError, UserError
from mervcache.files import sha256_hex

SEARCH_BYTES = 64 << 10  # 11 s; 16 KiB take 0.7 s
_HEAD_BYTES = 400  # of a JSON file: its digest's own field lies there
_TAIL_BYTES = 3
_POLYNOMIAL = 0x82F63B78  # of crc32c (Castagnoli), reflected
_DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})",?')


def undo_flip(data: bytes, sha256: str) -> bytes | None:
    """The bytes one bit away from `data` that have this digest, or None."""
    if len(data) > SEARCH_BYTES:
        return None
    prefix = hashlib.sha256()
    view = memoryview(data)
    for place, byte in enumerate(data):
        rest = view[place + 1 :]
        for bit in range(8):
            trial = prefix.copy()
            trial.update(bytes([byte ^ (1 << bit)]))
            trial.update(rest)
            if trial.hexdigest() == sha256:
                return flipped(data, place, bit)
        prefix.update(view[place : place + 1])
    return None


def undo_document_flip(data: bytes, is_whole: Callable[[bytes], bool]) -> bytes | None:
    """A JSON file of ours, which holds the sha256 of what stands around (or beside) its digest; `is_whole` decides."""
    ends = [*range(min(_HEAD_BYTES, len(data))), *range(max(0, len(data) - _TAIL_BYTES), len(data))]
    if found := first_whole(data, ends, is_whole):
        return found
    digest = _DIGEST.search(data)
    if digest is None:
        return None
    claimed, start, stop = digest[1].decode(), digest.start(), digest.end()
    for first, last in ((0, len(data) - 1), (data.find(b"{", stop), len(data) - 2)):
        before = data[first:start] if first < start else b""
        after = data[max(stop, first) : last]
        mended = undo_flip(before + after, claimed)
        if mended is None:
            continue
        head = mended[: len(before)] + data[start:stop] if before else data[: max(stop, first)]
        trial = head + mended[len(before) :] + data[last:]
        if is_whole(trial):
            return trial
    return None


def first_whole(data: bytes, places: Iterable[int], is_whole: Callable[[bytes], bool]) -> bytes | None:
    """The first of the bytes one bit away, at any of the places, that is whole."""
    for place in places:
        for bit in range(8):
            if is_whole(trial := flipped(data, place, bit)):
                return trial
    return None


def flip_by_crc(data: bytes | bytearray | memoryview) -> tuple[int, int] | None:
    """(byte, bit) that was flipped in bytes that end in their crc32c; None if they agree, or if more is wrong.

    A flipped bit changes the checksum by the polynomial, stepped once for every bit behind it, whatever the bytes are.
    """
    payload, stored = bytes(data[:-4]), int.from_bytes(data[-4:], "little")
    difference = google_crc32c.value(payload) ^ stored
    if difference == 0:
        return None
    if difference.bit_count() == 1:
        bit = difference.bit_length() - 1
        return len(payload) + bit // 8, bit % 8
    state = _POLYNOMIAL
    for behind in range(8 * len(payload)):
        if state == difference:
            place = 8 * len(payload) - 1 - behind
            return place // 8, place % 8
        state = (state >> 1) ^ (_POLYNOMIAL if state & 1 else 0)
    return None


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """A block computed once more, elsewhere."""

    receipt: Receipt
    shards: Mapping[str, bytes]  # array -> bytes


Recompute = Callable[[GroupWriter, Receipt], Recomputed]


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What was done about one object."""

    key: str
    done: str  # in words
    is_mended: bool = True


def mend_block(
    group: GroupWriter,
    block: int,
    arrays: set[str],
    *,
    other: Objects | None,
    recompute: Recompute | None,
    new_bytes: bool,
) -> list[Repaired]:
    """Put the shards of these arrays back."""
    receipt = group.receipt(block)
    left, done = set(arrays), []
    for name in sorted(arrays & receipt.shards.keys()):  # a crafted receipt may leave one out
        key = shard_key(group.kind, group.name, name, block)
        for words, data in _copies(group.objects, other, key, group.specs[name], receipt.shards[name]["bytes"]):
            if _is(data, receipt, name):
                group.objects.replace(key, data)
                done.append(Repaired(key=key, done=words))
                left.discard(name)
                break
    if left:
        done += _recomputed(group, receipt, left, recompute, new_bytes)
    return done


def _copies(objects: Objects, other: Objects | None, key: str, spec: ArraySpec, num_bytes: int):
    """(words, bytes) of what may be the shard, the cheapest first; none is larger than its receipt says."""
    with suppress(FileNotFoundError, StoreError):
        data = get_bounded(objects, key, num_bytes)
        if (mended := undo_shard_flip(data, spec)) is not None:
            yield "one flipped bit was undone", mended
    if other is not None:
        with suppress(FileNotFoundError, StoreError):
            yield "fetched from the other copy", get_bounded(other, key, num_bytes)


def _is(data: bytes, receipt: Receipt, name: str) -> bool:
    entry = receipt.shards.get(name)
    return entry is not None and len(data) == entry["bytes"] and sha256_hex(data) == entry["sha256"]


def undo_shard_flip(data: bytes, spec: ArraySpec) -> bytes | None:
    """The shard with the one bit turned back that its checksums tell of."""
    start = len(data) - spec.index_bytes
    if start < 0:
        return None
    if place := flip_by_crc(memoryview(data)[start:]):
        return flipped(data, start + place[0], place[1])
    index = np.frombuffer(data[start:-4], dtype="<u8").reshape(-1, 2)
    for offset, length in index[index[:, 0] != ABSENT].tolist():
        if (
            offset + length <= start
            and length > 4
            and (place := flip_by_crc(memoryview(data)[offset : offset + length]))
        ):
            return flipped(data, offset + place[0], place[1])
    return None


def _recomputed(
    group: GroupWriter, receipt: Receipt, left: set[str], recompute: Recompute | None, new_bytes: bool
) -> list[Repaired]:
    keys = {name: shard_key(group.kind, group.name, name, receipt.block) for name in sorted(left)}
    if recompute is None:
        why = "no other copy has it; give --from OTHER_STORE, or --root DIR to compute it from the media"
        return [Repaired(key=key, done=why, is_mended=False) for key in keys.values()]
    try:
        made = recompute(group, receipt)
    except MervCacheError as error:
        return [Repaired(key=key, done=f"cannot be computed again: {error}", is_mended=False) for key in keys.values()]
    if all(_is(made.shards[name], receipt, name) for name in left):
        for name, key in keys.items():
            group.objects.replace(key, made.shards[name])
        return [Repaired(key=key, done="computed again from the media, the same bytes") for key in keys.values()]
    if changed := _changed_media(made.receipt, receipt):
        why = f"{changed} of its media changed since: not put back; restore the media, or retire the store"
        return [Repaired(key=key, done=why, is_mended=False) for key in keys.values()]
    if not new_bytes:
        why = (
            "computed again, but this machine gives other bytes (another device, thread count or library): not put "
            "back; compute it where the store was made, fetch it with --from, or take the new ones with --new-bytes"
        )
        return [Repaired(key=key, done=why, is_mended=False) for key in keys.values()]
    return _take_new_bytes(group, receipt, made)


def _changed_media(made: Receipt, before: Receipt) -> int:
    pairs = zip(made.rows, before.rows, strict=True)
    return sum(
        old.state == "ok" and None not in (new.media_sha256, old.media_sha256) and new.media_sha256 != old.media_sha256
        for new, old in pairs
    )


def _take_new_bytes(group: GroupWriter, before: Receipt, made: Recomputed) -> list[Repaired]:
    """Other bytes of the same features, under a receipt that says so: its number counts, it names the one before."""
    rows = [new if old.state == "ok" else old for new, old in zip(made.receipt.rows, before.rows, strict=True)]
    for name in group.specs:
        group.objects.replace(shard_key(group.kind, group.name, name, before.block), made.shards[name])
    numbered = replace(made.receipt, rows=tuple(rows), generation=before.generation + 1, replaces=before.digest)
    key = receipt_key(group.kind, group.name, before.block)
    group.objects.replace(key, numbered.to_bytes())
    words = f"computed again with other bytes, as asked: receipt number {numbered.generation}"
    return [Repaired(key=shard_key(group.kind, group.name, name, before.block), done=words) for name in group.specs]


def derived_document(objects: Objects, other: Objects | None, key: str, check: Verification) -> bytes:
    """The bytes that the zarr.json at `key` should have; raises where too little is left to know them."""
    parts = key.split("/")
    if key == ROOT_METADATA:
        return _root(objects, other, check)
    if len(parts) == 2:
        return document_bytes({"zarr_format": 3, "node_type": "group", "attributes": {}})
    if len(parts) == 3:
        return _group(objects, other, key, parts[0], parts[1], check)
    return _array(objects, parts[0], parts[1], parts[2], check)


def _root(objects: Objects, other: Objects | None, check: Verification) -> bytes:
    datasets = check.index.datasets() if check.index else []
    if check.newest:
        return root_document(datasets=datasets, block_rows=check.newest.block_rows)
    if found := _one_bit_away(objects, ROOT_METADATA, _is_root):
        return found
    for source in (objects, other):
        with suppress(MervCacheError, FileNotFoundError):
            if source is not None:
                block_rows = parse_root(read_document(source, ROOT_METADATA))["block_rows"]
                return root_document(datasets=datasets, block_rows=block_rows)
    raise StoreFormatError("no snapshot says how many rows its blocks have; give a copy with --from")


def _is_root(data: bytes) -> bool:
    root = parse_root(data)
    return data == root_document(datasets=root["datasets"], block_rows=root["block_rows"])


def _group(objects: Objects, other: Objects | None, key: str, kind: str, group: str, check: Verification) -> bytes:
    if check.newest and (summary := check.newest.groups.get(f"{kind}/{group}")):
        return _document(summary)

    def is_whole(data: bytes) -> bool:
        return data == _document(parse_group(data, kind, group))

    if found := _one_bit_away(objects, key, is_whole):
        return found
    if other is not None:
        with suppress(MervCacheError, FileNotFoundError):
            return _document(read_group(other, kind, group))
    raise StoreFormatError("no snapshot knows this group's identity; give a copy with --from")


def _document(record: GroupRecord) -> bytes:
    return group_document(record.identity, weights_label=record.weights, batch_shape=record.batch_shape)


def _one_bit_away(objects: Objects, key: str, is_whole: Callable[[bytes], bool]) -> bytes | None:
    def check(data: bytes) -> bool:
        try:
            return is_whole(data)
        except (MervCacheError, TypeError, KeyError):
            return False

    with suppress(FileNotFoundError, MervCacheError):
        data = get_bounded(objects, key, SEARCH_BYTES // 4)
        return first_whole(data, range(len(data)), check)
    return None


def _array(objects: Objects, kind: str, group: str, array: str, check: Verification) -> bytes:
    identity, block_rows = read_group(objects, kind, group).identity, check.block_rows[kind]
    if check.index is None:
        raise StoreFormatError("the clip parts that say how many rows it has are damaged themselves")
    blocks = sealed_blocks(check.index.max_row(kind), block_rows)
    for codec in [*_codecs_of_siblings(objects, kind, group, array), *CODECS]:
        specs = array_specs(identity, kind, blocks=blocks, block_rows=block_rows, codec=codec)
        if array not in specs:
            raise StoreFormatError(f"the identity of {group} has no array {array}")
        if _fits(objects, kind, group, specs[array], blocks):
            return specs[array].document()
    raise StoreFormatError("its shards are of no known codec")


def _codecs_of_siblings(objects: Objects, kind: str, group: str, array: str) -> list[str]:
    found = []
    for name in ARRAYS:
        with suppress(MervCacheError, FileNotFoundError):
            stored = read_document(objects, array_metadata_key(kind, group, name)) if name != array else None
            if stored and (spec := parse_array(name, stored)):
                found.append(spec.codec)
    return found


def _fits(objects: Objects, kind: str, group: str, spec: ArraySpec, blocks: int) -> bool:
    """Does any shard that is there decode? True where there is none: any codec will do."""
    has_shards = False
    for block in range(blocks):
        key = shard_key(kind, group, spec.name, block)
        if not objects.exists(key):
            continue
        has_shards = True
        with suppress(MervCacheError):
            shard = Shard(spec, objects.open(key))
            for row in shard.rows()[:1]:
                shard.decode(row)
            return True
    return not has_shards


_COLUMNS = ("row", "digest", "failed_row", "failed_scope", "failed_reason")


def rebuild_receipt(group: GroupWriter, block: int, named: str, check: Verification) -> Repaired:
    """Put a new receipt in the place of the one with digest `named`."""
    rows = rows_of(block, group.block_rows)
    assert check.newest is not None
    known = _rows_known(group.objects, check.newest, group.kind, group.name, rows)
    planned = set(check.index.rows_between(group.kind, rows.start, rows.stop)) if check.index else set()
    shards = open_shards(group.objects, group.kind, group.name, block, group.specs)
    if set(shards) != set(group.specs):
        raise StoreFormatError("shards of the block are missing as well; give a copy with --from")
    outcomes = [
        _outcome(row, place, shards, known) if row in planned else RowOutcome(state="empty")
        for place, row in enumerate(rows)
    ]
    receipt = Receipt(
        kind=group.kind,
        group=group.name,
        block=block,
        rows=tuple(outcomes),
        shards={name: shard.record() for name, shard in shards.items()},
        generation=2,
        replaces=named,
    )
    for shard in shards.values():
        shard.close()
    key = receipt_key(group.kind, group.name, block)
    group.objects.replace(key, receipt.to_bytes())
    words = "made again from the shards and the snapshot, number 2; media digests and decoders are lost"
    return Repaired(key=key, done=words)


def _outcome(row: int, place: int, shards: dict[str, Shard], known: dict[int, RowOutcome]) -> RowOutcome:
    stored = {name: shard.decode(place) for name, shard in shards.items()}
    is_whole = all(array is not None for array in stored.values())
    if row in known and known[row].state == "failed" and not is_whole:
        return known[row]
    if not is_whole:
        if row in known:
            raise StoreFormatError(f"the shards lack row {row}, which the snapshot knows")
        return RowOutcome(state="skipped")
    digest = row_digest(stored)
    if row in known and known[row].digest != digest:
        raise StoreFormatError(f"row {row} in the shards is not the one that the snapshot knows")
    return RowOutcome(state="ok", digest=digest)


def _rows_known(objects: Objects, snapshot: Snapshot, kind: str, group: str, rows: range) -> dict[int, RowOutcome]:
    """What a snapshot says of a block's rows: digests of the newest good ones, reasons of the newest failures."""
    names = ["kind", *(column(group, suffix) for suffix in _COLUMNS)]
    known: dict[int, RowOutcome] = {}
    for entry in read_snapshot_table(objects, snapshot, names).to_pylist():
        of_kind, row, digest, failed_row, scope, reason = (entry[name] for name in names)
        if of_kind == kind and failed_row in rows:
            known[failed_row] = RowOutcome(state="failed", scope=scope, reason=reason)
        if of_kind == kind and row in rows:
            known[row] = RowOutcome(state="ok", digest=digest)
    return known


_TRIES = 16
_FRAGMENT = re.compile(r"#(?:end_frame=(\d+)|t=([^,]*),([^,]*))\Z")


def rebuild_part(objects: Objects, snapshot: Snapshot, key: str) -> bytes | None:
    """The bytes of the clip part at `key` as the snapshot's digest knows them, or None."""
    with suppress(MervCacheError, FileNotFoundError, ValueError):
        earlier, later, first = _other_parts(objects, snapshot, key)
        listed = read_snapshot_table(objects, snapshot, ["clip_id", "kind"])
        pairs = list(zip(listed["clip_id"].to_pylist(), listed["kind"].to_pylist(), strict=True))
        clips = [clip_of(clip_id, kind) for clip_id, kind in pairs if clip_id not in earlier]
        # Its clips come first among these; they end at the last that is in no later part, or at one that has a later
        # row as well.
        least = max((place + 1 for place, clip in enumerate(clips) if clip.clip_id not in later), default=0)
        for stop in range(least, min(len(clips), least + _TRIES) + 1):
            data = part_bytes(allocate(clips[:stop], first))
            if sha256_hex(data) == snapshot.parts[key]:
                return data
    return None


def _other_parts(objects: Objects, snapshot: Snapshot, key: str) -> tuple[set[str], set[str], dict[str, int]]:
    """Clip ids of the parts before and after, and the first row of each kind in the one that is lost."""
    earlier: set[str] = set()
    later: set[str] = set()
    first = dict.fromkeys(KINDS, 0)
    for other in snapshot.parts:
        if other == key:
            continue
        table = read_table(table_file(objects, other), CLIP_SCHEMA, other)
        (earlier if other < key else later).update(table["clip_id"].to_pylist())
        for row, kind in zip(table["row"].to_pylist(), table["kind"].to_pylist(), strict=True):
            if other < key:
                first[kind] = max(first[kind], next_batch_row(row, snapshot.block_rows[kind]))
    return earlier, later, first


def clip_of(clip_id: str, kind: str) -> Clip:
    """The clip that an id names; the inverse of `Clip.clip_id`."""
    dataset, _, rest = clip_id.partition("/")
    fragment = _FRAGMENT.search(rest)
    path = (rest[: fragment.start()] if fragment else rest).replace("%23", "#").replace("%25", "%")
    frame, start, end = fragment.groups() if fragment else (None, None, None)
    return Clip(
        dataset=dataset,
        path=path,
        kind=kind,  # type: ignore[arg-type] - Clip checks it
        start_s=float(start) if start else None,
        end_s=float(end) if end else None,
        end_frame=int(frame) if frame else None,
    )


MakeReferenceClips = Callable[[str, FeatureIdentity], bytes]  # kind, identity -> the file
Mended = tuple[bytes, str]  # bytes that are whole, and where they come from
_STRANGE = "is no file of a store: move it elsewhere"


def open_group(objects: Objects, kind: str, group: str) -> GroupWriter:
    """A group of the store as it is now."""
    block_rows = parse_root(read_document(objects, ROOT_METADATA))["block_rows"]
    return GroupWriter.open(objects, ClipIndex(objects, block_rows).refresh(), kind, group)


class FileMender:
    """Mends files of a store, one at a time; `other` is another copy of it, `canaries` makes a group's file again."""

    def __init__(self, objects: Objects, other: Objects | None, canaries: MakeReferenceClips | None = None) -> None:
        self._objects, self._other, self._make_reference_clips = objects, other, canaries
        self._menders = {
            PARTS: self._mend_table,
            SAMPLES: self._mend_table,
            SNAPSHOTS: self._mend_snapshot,
            RECEIPTS: self._mend_receipt,
            JOURNAL: self._mend_journal,
            TOMBSTONES: self._mend_tombstone,
            CANARIES: self._mend_reference_clips,
        }

    def mend(self, key: str, check: Verification) -> Repaired:
        """Put right what `check` found under a key."""
        mender = self._mend_derived if key.endswith(ROOT_METADATA) else self._menders.get(key.split("/")[0])
        if mender is None:
            return _left(key, _STRANGE)
        try:
            return mender(key, check)
        except (StoreError, UserError, MediaError, FileNotFoundError) as error:
            return _left(key, f"cannot be made again: {error}")

    def _mend_derived(self, key: str, check: Verification) -> Repaired:
        data = derived_document(self._objects, self._other, key, check)
        return self._put(key, (data, "made again from what it describes"))

    def _mend_table(self, key: str, check: Verification) -> Repaired:
        """A clip part or samples file: by the digest that a snapshot or the file itself holds."""
        sha256 = check.digests.get(key)

        def is_whole(data: bytes) -> bool:
            return sha256_hex(data) == sha256 if sha256 else own_digest_holds(data) is True

        stored = _get(self._objects, key, MAX_TABLE_BYTES)
        if stored is not None and is_whole(stored):  # a later version of samples is what is missing
            return _left(key, "is whole, but does not fit the rest")
        if found := self._mended(key, MAX_TABLE_BYTES, is_whole, _undo_to(sha256)):
            return self._put(key, found)
        named = check.newest if check.newest and key in check.newest.parts else None
        if named and (made := rebuild_part(self._objects, named, key)):
            return self._put(key, (made, "made again from the snapshot, to the digest that it had"))
        if key.startswith(SAMPLES):
            return self._drop_newer_samples(key, sha256)
        return _left(
            key, "no copy of it is known; give one with --from: without it rows and clips cannot be told apart"
        )

    def _drop_newer_samples(self, key: str, sha256: str | None) -> Repaired:
        """Samples that no snapshot names yet: the extract that wrote them writes them again."""
        if sha256 is None and key.split("/")[1] in samples_files(self._objects.list_names(SAMPLES)):
            return self._remove(key, "no snapshot names it: run the same extract again, it is written anew")
        words = "no copy of it is known; give one with --from, or run the same extract again for a new version"
        return _left(key, words)

    def _mend_snapshot(self, key: str, check: Verification) -> Repaired:
        snapshot_id = record_name(key)
        if snapshot_id is None:
            return _left(key, _STRANGE)
        table_key, record_key = snapshot_keys(snapshot_id)
        found = None
        if key == record_key:
            found = self._mended_document(key, MAX_SNAPSHOT_BYTES, lambda data: Snapshot.parse(data, snapshot_id))
        else:
            with suppress(StoreError):  # where the record is damaged as well
                sha256 = load_snapshot(self._objects, snapshot_id).table_sha256
                found = self._mended(key, MAX_TABLE_BYTES, lambda data: sha256_hex(data) == sha256, _undo_to(sha256))
        if found:
            return self._put(key, found)
        self._objects.delete(record_key)
        self._objects.delete(table_key)
        return Repaired(key=key, done="removed, the whole snapshot: a new one is made from the receipts")

    def _mend_receipt(self, key: str, check: Verification) -> Repaired:
        place = receipt_place(key)
        if place is None:
            return _left(key, _STRANGE)
        kind, group, block = place
        summary = check.newest.groups.get(f"{kind}/{group}") if check.newest else None
        named = summary.receipts.get(str(block)) if summary else None

        def parse(data: bytes) -> Receipt:
            return Receipt.parse(data, kind=kind, group=group, block=block, block_rows=check.block_rows[kind])

        most = max_receipt_bytes(check.block_rows.get(kind, MAX_BLOCK_ROWS))
        stored = _get(self._objects, key, most)
        with suppress(StoreError):
            receipt = parse(stored) if stored is not None else None
            if receipt and named in (None, receipt.digest):
                return _left(key, "is whole, but does not fit the clip parts")
            if receipt and receipt.generation > 1:
                return Repaired(key=key, done="is a newer receipt than the snapshot names: published")
        if found := self._mended_document(key, most, lambda data: named in (None, parse(data).digest)):
            return self._put(key, found)
        if named is None:
            return self._remove(key, "no snapshot names it: run the same extract again, the block is committed anew")
        return rebuild_receipt(open_group(self._objects, kind, group), block, named, check)

    def _mend_journal(self, key: str, check: Verification) -> Repaired:
        name = record_name(key)
        if name is None:
            return _left(key, _STRANGE)
        if found := self._mended_document(key, MAX_JOURNAL_BYTES, lambda data: parse_journal(data, name) is not None):
            return self._put(key, found)
        self._objects.delete(key)
        return Repaired(key=key, done="removed: it told of a run, no tokens depend on it")

    def _mend_tombstone(self, key: str, check: Verification) -> Repaired:
        tombstone_id = record_name(key)
        if tombstone_id is None:
            return _left(key, _STRANGE)
        if found := self._mended_document(key, MAX_TOMBSTONE_BYTES, lambda data: Tombstone.parse(data, tombstone_id)):
            return self._put(key, found)
        words = "cannot be restored and must not be lost: give a copy with --from, or repeat `merv-pipeline tombstone`"
        return _left(key, words)

    def _mend_reference_clips(self, key: str, check: Verification) -> Repaired:
        """By the snapshot's digest and its own; what is lost is computed again, no tokens depend on it."""
        kind, group = reference_clip_place(key) or ("", "")
        identity = check.identities.get((kind, group))
        if identity is None:
            return _left(key, _STRANGE)
        sha256 = check.newest.canaries.get(f"{kind}/{group}") if check.newest else None

        def is_whole(data: bytes) -> bool:
            try:
                ReferenceClips.parse(data, kind, identity)
            except StoreError:
                return False
            return sha256 in (None, sha256_hex(data))

        most = max_reference_clip_bytes(kind, identity)
        if found := self._mended(key, most, is_whole, _undo_to(sha256)):
            return self._put(key, found)
        if self._make_reference_clips and is_whole(made := self._make_reference_clips(kind, identity)):
            return self._put(key, (made, "computed again"))
        return self._remove(key, "no whole copy is known: the next extract with this encoder computes it again")

    def _mended_document(self, key: str, max_bytes: int, check: Callable[[bytes], object]) -> Mended | None:
        """A JSON file that is whole again; `check` says so, by what it returns or raises."""

        def is_whole(data: bytes) -> bool:
            try:
                return bool(check(data))
            except StoreError:
                return False

        return self._mended(key, max_bytes, is_whole, lambda data: undo_document_flip(data, is_whole))

    def _mended(
        self,
        key: str,
        max_bytes: int,  # that a file of its kind can need
        is_whole: Callable[[bytes], bool],
        undo: Callable[[bytes], bytes | None],
    ) -> Mended | None:
        """The file with its flipped bit undone, else the other copy's."""
        stored = _get(self._objects, key, max_bytes)
        if stored is not None and (mended := undo(stored)):
            return mended, "one flipped bit was undone"
        fetched = _get(self._other, key, max_bytes)
        if fetched is not None and is_whole(fetched):
            return fetched, "fetched from the other copy"
        return None

    def _put(self, key: str, mended: Mended) -> Repaired:
        data, words = mended
        self._objects.replace(key, data)
        return Repaired(key=key, done=words)

    def _remove(self, key: str, why: str) -> Repaired:
        self._objects.delete(key)
        return Repaired(key=key, done=f"removed, {why}")


def _get(objects: Objects | None, key: str, max_bytes: int) -> bytes | None:
    """The bytes of an object, if the place has it and gives it out, and it is no larger than it can be."""
    try:
        return get_bounded(objects, key, max_bytes) if objects is not None else None
    except (FileNotFoundError, StoreError):
        return None


def _undo_to(sha256: str | None) -> Callable[[bytes], bytes | None]:
    """Turns back the one flipped bit of a file whose digest is known."""
    return lambda data: undo_flip(data, sha256) if sha256 else None


def _left(key: str, why: str) -> Repaired:
    return Repaired(key=key, done=why, is_mended=False)


_PASSES = 12  # there are nine classes of files
_ORDER = (TOMBSTONES, SNAPSHOTS, PARTS, SAMPLES, ROOT_METADATA, RECEIPTS, CANARIES, JOURNAL)


def repair_store(
    path: Place,
    *,
    other: Place | None = None,
    recompute: Recompute | None = None,
    canaries: MakeReferenceClips | None = None,
    new_bytes: bool = False,
    say: Callable[[Repaired], None] = lambda done: None,
    progress: ProgressLine = SILENT,
) -> list[Repaired]:
    """Put right what a full verification finds; [] for a sound store, which is left exactly as it is.

    `progress` is that of the full look, which is taken again where documents had to be mended.
    """
    objects = open_objects(path)
    if not objects.exists(ROOT_METADATA) and not any(map(objects.list_names, (PARTS, SNAPSHOTS))):
        raise StoreNotFoundError(no_store_at(path))  # before a lease makes a folder there
    with StoreLease(path, "repair"):
        copy = open_objects(other) if other is not None else None
        work = _Repair(objects, copy, FileMender(objects, copy, canaries), say, progress)
        work.documents()
        work.shards(recompute, new_bytes)
        work.publish(path)
    return work.done


class _Repair:
    """One pass of mending over a store."""

    def __init__(
        self,
        objects: Objects,
        other: Objects | None,
        files: FileMender,
        say: Callable[[Repaired], None],
        progress: ProgressLine,
    ) -> None:
        self._objects, self._other, self._files, self._say = objects, other, files, say
        self._progress = progress
        self.done: list[Repaired] = []
        self._settled: set[str] = set()  # keys that are not looked at again
        self._check = Verification(objects, is_full=False)

    def documents(self) -> None:
        """Everything but shards, one class of files at a time: what is mended lets the next look see further.

        The full look, which reads every byte, comes last.
        """
        for is_full in (False, True):
            for _ in range(_PASSES):
                progress = self._progress if is_full else SILENT
                check = Verification(self._objects, is_full=is_full, progress=progress)
                check.run()
                self._check = check
                keys = {finding.key for finding in _damage(check) if self._is_document(finding.key)}
                if not keys:
                    break
                first = min(map(_order, keys))[0]
                for key in sorted(key for key in keys if _order(key)[0] == first):
                    self._note(self._files.mend(key, check))

    def shards(self, recompute: Recompute | None, new_bytes: bool) -> None:
        """Shards that the last, full verification found damaged."""
        wanted: dict[tuple[str, str, int], set[str]] = {}
        for finding in _damage(self._check):
            if place := shard_place(finding.key):
                kind, group, array, block = place
                wanted.setdefault((kind, group, block), set()).add(array)
        for (kind, group, block), arrays in sorted(wanted.items()):
            try:
                writer = open_group(self._objects, kind, group)
                done = mend_block(writer, block, arrays, other=self._other, recompute=recompute, new_bytes=new_bytes)
            except (MervCacheError, FileNotFoundError) as error:
                done = [Repaired(key=f"{kind}/{group} block {block}", done=str(error), is_mended=False)]
            for each in done:
                self._note(each)

    def publish(self, path: Place) -> None:
        """A new snapshot where receipts are others than the newest one names; nothing where it says the same."""
        if not any(each.is_mended for each in self.done):
            return
        with suppress(MervCacheError):  # what could not be mended is in the list already
            writer = StoreWriter.open(path)
            erase_tombstoned(writer)
            writer.publish_snapshot(anew=True)

    def _note(self, repaired: Repaired) -> None:
        if repaired.key in self._settled and not repaired.is_mended:
            return
        if not repaired.is_mended or repaired.key.startswith((RECEIPTS, CANARIES)):  # the snapshot names others
            self._settled.add(repaired.key)
        self.done.append(repaired)
        self._say(repaired)

    def _is_document(self, key: str) -> bool:
        return (shard_place(key) is None and key not in self._settled and "/" in key) or key == ROOT_METADATA


def _damage(check: Verification) -> list[Finding]:
    return [finding for finding in check.findings.sorted() if finding.severity == "damage"]


def _order(key: str) -> tuple[int, int, str]:
    top = ROOT_METADATA if key.endswith(ROOT_METADATA) else key.split("/")[0]
    return (_ORDER.index(top) if top in _ORDER else len(_ORDER), key.count("/"), key)

"""Repair: files that `verify` finds damaged are fetched from another copy, derived from what is sound, or recomputed.

`_CLASSES` lists the classes of files in the order of repair, for the first ones are what the others are checked by;
shards come last. A shard with one flipped bit needs no copy: a crc32c locates the bit, and the result is accepted only
if its sha256 matches. Every step replaces one object whole, so a repair that was killed is simply run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import google_crc32c
import numpy as np

from featurestore.group_writer import GroupWriter
from featurestore.identity import FeatureIdentity
from featurestore.layout import (
    CANARIES,
    JOURNAL,
    MAX_BLOCK_ROWS,
    PARTS,
    RECEIPTS,
    ROOT_METADATA,
    SAMPLES,
    SNAPSHOTS,
    TAGS,
    TOMBSTONES,
    receipt_key,
    receipt_place,
    record_name,
    reference_clip_place,
    samples_files,
    shard_key,
    shard_place,
    snapshot_keys,
)
from featurestore.lease import StoreLease
from featurestore.locate import Place, no_store_at
from featurestore.maintenance.derive import derive_metadata, derive_part, derive_receipt
from featurestore.maintenance.tombstone import erase_tombstoned
from featurestore.maintenance.verify import Verification
from featurestore.objects.base import Objects, get_bounded
from featurestore.objects.open import open_objects
from featurestore.parquet import MAX_TABLE_BYTES, own_digest_holds
from featurestore.records import (
    MAX_JOURNAL_BYTES,
    Receipt,
    Tombstone,
    max_receipt_bytes,
    parse_journal,
)
from featurestore.records import MAX_RECORD_BYTES as MAX_TOMBSTONE_BYTES
from featurestore.reference_clips import ReferenceClips, max_reference_clip_bytes
from featurestore.shards import ABSENT
from featurestore.snapshots import MAX_RECORD_BYTES as MAX_SNAPSHOT_BYTES
from featurestore.snapshots import ClipIndex, Snapshot, load_snapshot
from featurestore.tags import MAX_TAG_BYTES, Tag
from featurestore.writer import StoreWriter
from featurestore.zarr_metadata import (
    ArraySpec,
    parse_root,
    read_document,
)
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import MediaError, MervCacheError, StoreError, StoreNotFoundError, UserError
from mervcache.files import sha256_hex

_POLYNOMIAL = 0x82F63B78  # of crc32c (Castagnoli), reflected
_MAX_PASSES = 12  # there are nine classes of files
_FETCHED = "fetched from the other copy"


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """A block computed once more, elsewhere."""

    receipt: Receipt
    shards: Mapping[str, bytes]  # array -> bytes


Recompute = Callable[[GroupWriter, Receipt], Recomputed]
MakeReferenceClips = Callable[[str, FeatureIdentity], bytes]  # kind, identity -> the file


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What was done about one object."""

    key: str
    done: str  # in words
    is_mended: bool = True


def repair_store(
    path: Place,
    *,
    other: Place | None = None,
    recompute: Recompute | None = None,
    make_reference_clips: MakeReferenceClips | None = None,
    new_bytes: bool = False,
    on_repaired: Callable[[Repaired], None] = lambda repaired: None,
    progress: ProgressLine = SILENT,
) -> list[Repaired]:
    """Repair what a full verification finds; [] for a sound store, which is left exactly as it is.

    `other` is another copy of the store, `recompute` computes a block again. `new_bytes` accepts its shards though they
    differ: under a numbered receipt. `progress` is that of the full verification, repeated where documents changed.
    """
    objects = open_objects(path)
    if not objects.exists(ROOT_METADATA) and not any(map(objects.list_names, (PARTS, SNAPSHOTS))):
        raise StoreNotFoundError(no_store_at(path))  # before a lease makes a folder there
    with StoreLease(path, "repair"):
        copy = open_objects(other) if other is not None else None
        repair = _Repair(objects, copy, make_reference_clips, on_repaired)
        check = repair.documents(progress)
        repair.shards(check, recompute, new_bytes)
        if any(repaired.is_mended for repaired in repair.done):
            with suppress(MervCacheError):  # what could not be mended is listed already
                writer = StoreWriter.open(path)
                erase_tombstoned(writer)
                writer.publish_snapshot(anew=True)
    return repair.done


class _Repair:
    """One repair of a store; `other` is another copy of it."""

    def __init__(
        self,
        objects: Objects,
        other: Objects | None,
        make_reference_clips: MakeReferenceClips | None,
        on_repaired: Callable[[Repaired], None],
    ) -> None:
        self._objects, self._other = objects, other
        self._make_reference_clips = make_reference_clips
        self._on_repaired = on_repaired
        self.done: list[Repaired] = []
        self._settled: set[str] = set()  # keys that are not tried again

    def documents(self, progress: ProgressLine) -> Verification:
        """Repair all but shards, one class of files at a time: what is repaired lets the next pass see further.

        Full verification, which reads every byte, comes last; returns the last one.
        """
        check = None
        for is_full in (False, True):
            for _ in range(_MAX_PASSES):
                check = Verification(self._objects, is_full=is_full, progress=progress if is_full else SILENT)
                check.run()
                keys = {key for key in _damaged(check) if _is_document(key) and key not in self._settled}
                if not keys:
                    break
                first = min(map(_order, keys))[0]
                for key in sorted(key for key in keys if _order(key)[0] == first):
                    self._add(self._repair_document(key, check))
        assert check is not None
        return check

    def shards(self, check: Verification, recompute: Recompute | None, new_bytes: bool) -> None:
        """Repair the shards that a full verification found damaged, block by block."""
        arrays_of: dict[tuple[str, str, int], set[str]] = {}
        for key in _damaged(check):
            if place := shard_place(key):
                kind, group, array, block = place
                arrays_of.setdefault((kind, group, block), set()).add(array)
        for (kind, group, block), arrays in sorted(arrays_of.items()):
            try:
                done = self._repair_block(self._open_group(kind, group), block, arrays, recompute, new_bytes)
            except (MervCacheError, FileNotFoundError) as error:
                done = [_left(f"{kind}/{group} block {block}", str(error))]
            for repaired in done:
                self._add(repaired)

    def _add(self, repaired: Repaired) -> None:
        if repaired.key in self._settled and not repaired.is_mended:
            return
        if not repaired.is_mended or repaired.key.startswith((RECEIPTS, CANARIES)):  # the snapshot names other ones
            self._settled.add(repaired.key)
        self.done.append(repaired)
        self._on_repaired(repaired)

    def _repair_document(self, key: str, check: Verification) -> Repaired:
        restore = _CLASSES.get(_class_of(key))
        try:
            repaired = restore(self, key, check) if restore else None
        except (StoreError, UserError, MediaError, FileNotFoundError) as error:
            return _left(key, f"cannot be made again: {error}")
        return repaired or _left(key, "is no file of a store: move it elsewhere")

    def tombstone(self, key: str, check: Verification) -> Repaired | None:
        if (name := record_name(key)) is None:
            return None
        fetched = self._fetch(key, MAX_TOMBSTONE_BYTES, lambda data: Tombstone.parse(data, name))
        advice = "give a copy with --from, or repeat `merv-pipeline tombstone`"
        return fetched or _left(key, f"cannot be restored and must not be lost: {advice}")

    def snapshot(self, key: str, check: Verification) -> Repaired | None:
        if (snapshot_id := record_name(key)) is None:
            return None
        table_key, record_key = snapshot_keys(snapshot_id)
        if key == record_key:
            fetched = self._fetch(key, MAX_SNAPSHOT_BYTES, lambda data: Snapshot.parse(data, snapshot_id))
        else:
            fetched = None
            with suppress(StoreError):  # where the record is damaged as well
                sha256 = load_snapshot(self._objects, snapshot_id).table_sha256
                stored = _read(self._objects, key, MAX_TABLE_BYTES)
                if stored is None or sha256_hex(stored) != sha256:  # else the snapshot itself is wrong
                    fetched = self._fetch(key, MAX_TABLE_BYTES, lambda data: sha256_hex(data) == sha256)
        if fetched:
            return fetched
        self._objects.delete(record_key)
        self._objects.delete(table_key)
        return Repaired(key=key, done="removed, the whole snapshot: a new one is made from the receipts")

    def tag(self, key: str, check: Verification) -> Repaired | None:
        """A tag, or with it the snapshot that it names."""
        if (name := record_name(key)) is None:
            return None
        stored = _read(self._objects, key, MAX_TAG_BYTES)
        if stored is not None and _is_accepted(lambda data: Tag.parse(data, name), stored):
            return self._tagged_snapshot(key, Tag.parse(stored, name).snapshot)
        fetched = self._fetch(key, MAX_TAG_BYTES, lambda data: Tag.parse(data, name))
        return fetched or self._remove(
            key, ", no whole copy is known: name the snapshot again with `merv-pipeline tag`"
        )

    def _tagged_snapshot(self, key: str, snapshot_id: str) -> Repaired:
        table_key, record_key = snapshot_keys(snapshot_id)
        record = _read(self._other, record_key, MAX_SNAPSHOT_BYTES)
        if record is None or not _is_accepted(lambda data: Snapshot.parse(data, snapshot_id), record):
            return _left(key, f"names snapshot {snapshot_id}, which no copy has: give one with --from, or move the tag")
        sha256 = Snapshot.parse(record, snapshot_id).table_sha256
        if not self._fetch(table_key, MAX_TABLE_BYTES, lambda data: sha256_hex(data) == sha256):
            return _left(key, f"names snapshot {snapshot_id}, whose table no copy has")
        return self._put(record_key, record, _FETCHED)

    def table(self, key: str, check: Verification) -> Repaired:
        """A clip part or samples file, by the digest that a snapshot or the file itself holds."""
        sha256, snapshot = check.digests.get(key), check.newest

        def is_whole(data: bytes) -> bool:
            return sha256_hex(data) == sha256 if sha256 else own_digest_holds(data) is True

        stored = _read(self._objects, key, MAX_TABLE_BYTES)
        if stored is not None and is_whole(stored):  # a later version of the samples is what is missing
            return _left(key, "is whole, but does not fit the rest")
        if fetched := self._fetch(key, MAX_TABLE_BYTES, is_whole):
            return fetched
        if snapshot and key in snapshot.parts and (data := derive_part(self._objects, snapshot, key)):
            return self._put(key, data, "made again from the snapshot, to the digest that it had")
        advice = "no copy of it is known; give one with --from"
        if not key.startswith(SAMPLES):
            return _left(key, f"{advice}: without it the clips of its rows are unknown")
        if sha256 is None and key.split("/")[1] in samples_files(self._objects.list_names(SAMPLES)):
            return self._remove(key, ", no snapshot names it: run the same extract again, it is written anew")
        return _left(key, f"{advice}, or run the same extract again for a new version")

    def metadata(self, key: str, check: Verification) -> Repaired:
        data = derive_metadata(self._objects, self._other, key, check)
        return self._put(key, data, "made again from what it describes")

    def receipt(self, key: str, check: Verification) -> Repaired | None:
        if (place := receipt_place(key)) is None:
            return None
        kind, group, block = place
        block_rows = check.block_rows.get(kind, MAX_BLOCK_ROWS)
        summary = check.newest.groups.get(f"{kind}/{group}") if check.newest else None
        named = summary.receipts.get(str(block)) if summary else None

        def parse(data: bytes) -> Receipt:
            return Receipt.parse(data, kind=kind, group=group, block=block, block_rows=block_rows)

        most = max_receipt_bytes(block_rows)
        stored = _read(self._objects, key, most)
        with suppress(StoreError):
            receipt = parse(stored) if stored is not None else None
            if receipt and named in (None, receipt.digest):
                return _left(key, "is whole, but does not fit the clip parts")
            if receipt and receipt.generation > 1:
                return Repaired(key=key, done="is a newer receipt than the snapshot names: published")
        if fetched := self._fetch(key, most, lambda data: named in (None, parse(data).digest)):
            return fetched
        if named is None:
            return self._remove(key, ", no snapshot names it: run the same extract again, the block is committed anew")
        data = derive_receipt(self._open_group(kind, group), block, named, check).to_bytes()
        words = "made again from the shards and the snapshot, number 2; media digests and decoders are lost"
        return self._put(key, data, words)

    def reference_clips(self, key: str, check: Verification) -> Repaired | None:
        """By the snapshot's digest and the file's own; no tokens depend on it."""
        kind, group = reference_clip_place(key) or ("", "")
        if (identity := check.identities.get((kind, group))) is None:
            return None
        sha256 = check.newest.canaries.get(f"{kind}/{group}") if check.newest else None

        def is_whole(data: bytes) -> bool:
            ReferenceClips.parse(data, kind, identity)
            return sha256 in (None, sha256_hex(data))

        if fetched := self._fetch(key, max_reference_clip_bytes(kind, identity), is_whole):
            return fetched
        if self._make_reference_clips and _is_accepted(is_whole, data := self._make_reference_clips(kind, identity)):
            return self._put(key, data, "computed again")
        return self._remove(key, ", no whole copy is known: the next extract with this encoder computes it again")

    def journal(self, key: str, check: Verification) -> Repaired | None:
        if (name := record_name(key)) is None:
            return None

        def is_whole(data: bytes) -> bool:
            parse_journal(data, name)  # raises otherwise
            return True

        fetched = self._fetch(key, MAX_JOURNAL_BYTES, is_whole)
        return fetched or self._remove(key, ": it recorded a run, no tokens depend on it")

    def _fetch(self, key: str, max_bytes: int, is_whole: Callable[[bytes], object]) -> Repaired | None:
        """Put the other copy's file, if it has one that is whole and no larger than such a file can be."""
        data = _read(self._other, key, max_bytes)
        return self._put(key, data, _FETCHED) if data is not None and _is_accepted(is_whole, data) else None

    def _put(self, key: str, data: bytes, words: str) -> Repaired:
        self._objects.replace(key, data)
        return Repaired(key=key, done=words)

    def _remove(self, key: str, why: str) -> Repaired:
        self._objects.delete(key)
        return Repaired(key=key, done=f"removed{why}")

    def _open_group(self, kind: str, group: str) -> GroupWriter:
        """A group of the store as it is now."""
        block_rows = parse_root(read_document(self._objects, ROOT_METADATA))["block_rows"]
        return GroupWriter(self._objects, ClipIndex(self._objects, block_rows).refresh(), kind, group)

    def _repair_block(
        self, group: GroupWriter, block: int, arrays: set[str], recompute: Recompute | None, new_bytes: bool
    ) -> list[Repaired]:
        """Restore the shards of these arrays, each only with the sha256 that its receipt names."""
        keys = {name: shard_key(group.kind, group.name, name, block) for name in sorted(arrays)}
        if not self._objects.exists(receipt_key(group.kind, group.name, block)):
            why = ", no receipt names it: run the same extract again, the block is computed anew"
            return [self._remove(key, why) for key in keys.values()]
        receipt = group.receipt(block)

        def is_whole(name: str, data: bytes | None) -> bool:
            entry = receipt.shards.get(name)  # a crafted receipt may leave one out
            return data is not None and entry is not None and sha256_hex(data) == entry["sha256"]

        done: list[Repaired] = []
        for name in sorted(arrays & receipt.shards.keys()):
            size = receipt.shards[name]["bytes"]
            restored, words = _read(self._objects, keys[name], size), "one flipped bit was undone"
            restored = correct_shard(restored, group.specs[name]) if restored is not None else None
            if not is_whole(name, restored):
                restored, words = _read(self._other, keys[name], size), _FETCHED
            if restored is not None and is_whole(name, restored):
                self._objects.replace(keys[name], restored)
                done.append(Repaired(key=keys.pop(name), done=words))
        if not keys:
            return done

        def left(why: str) -> list[Repaired]:
            return [*done, *(_left(key, why) for key in keys.values())]

        if recompute is None:
            return left("no other copy has it; give --from OTHER_STORE, or --root DIR to compute it from the media")
        try:
            made = recompute(group, receipt)
        except MervCacheError as error:
            return left(f"cannot be computed again: {error}")
        if all(is_whole(name, made.shards[name]) for name in keys):
            for name, key in keys.items():
                self._objects.replace(key, made.shards[name])
                done.append(Repaired(key=key, done="computed again from the media, the same bytes"))
            return done
        pairs = list(zip(made.receipt.rows, receipt.rows, strict=True))
        media = [(new.media_sha256, old.media_sha256) for new, old in pairs if old.state == "ok"]
        changed = sum(None not in digests and len(set(digests)) == 2 for digests in media)
        if changed:
            return left(f"{changed} of its media changed since: not put back; restore the media, or retire the store")
        if not new_bytes:
            return left(
                "computed again, but this machine gives other bytes (another device, thread count or library): not put "
                "back; compute it where the store was made, fetch it with --from, or take the new ones with --new-bytes"
            )
        rows = tuple(new if old.state == "ok" else old for new, old in pairs)
        numbered = replace(made.receipt, rows=rows, generation=receipt.generation + 1, replaces=receipt.digest)
        words = f"computed again with other bytes, as requested: receipt number {numbered.generation}"
        for name in group.specs:
            key = shard_key(group.kind, group.name, name, block)
            self._objects.replace(key, made.shards[name])
            done.append(Repaired(key=key, done=words))
        self._objects.replace(receipt_key(group.kind, group.name, block), numbered.to_bytes())
        return done


_CLASSES = {  # folder of a file, or zarr.json -> how it is restored, in the order of repair
    TOMBSTONES: _Repair.tombstone,  # fetch
    SNAPSHOTS: _Repair.snapshot,  # fetch, else remove: a new one is made from the receipts
    TAGS: _Repair.tag,  # fetch, else remove; a missing snapshot is fetched
    PARTS: _Repair.table,  # fetch, else derive from the snapshot
    SAMPLES: _Repair.table,  # fetch, else remove what no snapshot names
    ROOT_METADATA: _Repair.metadata,  # derive
    RECEIPTS: _Repair.receipt,  # fetch, else derive from shards and snapshot
    CANARIES: _Repair.reference_clips,  # fetch, else recompute, else remove
    JOURNAL: _Repair.journal,  # fetch, else remove
}


def _damaged(check: Verification) -> list[str]:
    return [finding.key for finding in check.findings.sorted() if finding.severity == "damage"]


def _is_document(key: str) -> bool:
    return (shard_place(key) is None and "/" in key) or key == ROOT_METADATA


def _class_of(key: str) -> str:
    return ROOT_METADATA if key.endswith(ROOT_METADATA) else key.split("/")[0]


def _order(key: str) -> tuple[int, int, str]:
    order = [*_CLASSES]
    return (order.index(_class_of(key)) if _class_of(key) in order else len(order), key.count("/"), key)


def _left(key: str, why: str) -> Repaired:
    return Repaired(key=key, done=why, is_mended=False)


def _read(objects: Objects | None, key: str, max_bytes: int) -> bytes | None:
    """The bytes of an object, None if it is missing, unreadable or larger than it can be."""
    try:
        return get_bounded(objects, key, max_bytes) if objects is not None else None
    except (FileNotFoundError, StoreError):
        return None


def _is_accepted(is_whole: Callable[[bytes], object], data: bytes) -> bool:
    try:
        return bool(is_whole(data))
    except StoreError:
        return False


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
            bit = 8 * len(payload) - 1 - behind
            return bit // 8, bit % 8
        state = (state >> 1) ^ (_POLYNOMIAL if state & 1 else 0)
    return None


def correct_shard(data: bytes, spec: ArraySpec) -> bytes | None:
    """The shard with the one bit flipped back that the checksum of its index or of a row locates, or None."""
    start = len(data) - spec.index_bytes
    if start < 0:
        return None
    ranges = [(start, spec.index_bytes)]
    if flip_by_crc(memoryview(data)[start:]) is None:  # else offsets and lengths cannot be trusted
        index = np.frombuffer(data[start:-4], dtype="<u8").reshape(-1, 2)
        ranges += index[index[:, 0] != ABSENT].tolist()
    for offset, length in ranges:
        is_inside = offset + length <= len(data) and length > 4
        if is_inside and (found := flip_by_crc(memoryview(data)[offset : offset + length])):
            byte, bit = offset + found[0], found[1]
            return data[:byte] + bytes([data[byte] ^ (1 << bit)]) + data[byte + 1 :]
    return None

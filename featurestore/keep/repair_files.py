"""Mending one file that is no shard: from its own bytes, from another copy, from what others say of it.

Comes in: the key of a file that a verification found damaged. Goes out: what was done, in words. In order: one flipped
bit undone, the same file of another copy, made again from what it describes or what names it. What depends on nothing
and cannot be restored is removed: a snapshot is made again from the receipts, canaries by the next extract, and a
journal changes no byte.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from featurestore.canaries import Canaries, max_canary_bytes
from featurestore.digests import sha256_hex
from featurestore.errors import MediaError, StoreError, UserError
from featurestore.groups import GroupWriter
from featurestore.identity import FeatureIdentity
from featurestore.journal import MAX_JOURNAL_BYTES, parse_journal
from featurestore.keep.flips import undo_document_flip, undo_flip
from featurestore.keep.repair_documents import derived_document
from featurestore.keep.repair_parts import rebuild_part
from featurestore.keep.repair_receipts import rebuild_receipt
from featurestore.keep.repair_shards import Repaired
from featurestore.keep.verify import Verification
from featurestore.layout import (
    CANARIES,
    JOURNAL,
    MAX_BLOCK_ROWS,
    PARTS,
    RECEIPTS,
    ROOT_METADATA,
    SAMPLES,
    SNAPSHOTS,
    TOMBSTONES,
    canary_place,
    receipt_place,
    record_name,
    samples_files,
    snapshot_keys,
)
from featurestore.metadata import parse_root, read_document
from featurestore.parquet import MAX_TABLE_BYTES, own_digest_holds
from featurestore.parts import ClipIndex
from featurestore.places.objects import Objects, get_bounded
from featurestore.receipts import Receipt, max_receipt_bytes
from featurestore.snapshots import MAX_RECORD_BYTES as MAX_SNAPSHOT_BYTES
from featurestore.snapshots import Snapshot, load_snapshot
from featurestore.tombstones import MAX_RECORD_BYTES as MAX_TOMBSTONE_BYTES
from featurestore.tombstones import Tombstone

MakeCanaries = Callable[[str, FeatureIdentity], bytes]  # kind, identity -> the file
Mended = tuple[bytes, str]  # bytes that are whole, and where they come from
_STRANGE = "is no file of a store: move it elsewhere"


def open_group(objects: Objects, kind: str, group: str) -> GroupWriter:
    """A group of the store as it is now."""
    block_rows = parse_root(read_document(objects, ROOT_METADATA))["block_rows"]
    return GroupWriter.open(objects, ClipIndex(objects, block_rows).refresh(), kind, group)


class FileMender:
    """Mends files of a store, one at a time; `other` is another copy of it, `canaries` makes a group's file again."""

    def __init__(self, objects: Objects, other: Objects | None, canaries: MakeCanaries | None = None) -> None:
        self._objects, self._other, self._make_canaries = objects, other, canaries
        self._menders = {
            PARTS: self._mend_table,
            SAMPLES: self._mend_table,
            SNAPSHOTS: self._mend_snapshot,
            RECEIPTS: self._mend_receipt,
            JOURNAL: self._mend_journal,
            TOMBSTONES: self._mend_tombstone,
            CANARIES: self._mend_canaries,
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
            if receipt and receipt.number > 1:
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

    def _mend_canaries(self, key: str, check: Verification) -> Repaired:
        """By the snapshot's digest and its own; what is lost is computed again, no tokens depend on it."""
        kind, group = canary_place(key) or ("", "")
        identity = check.identities.get((kind, group))
        if identity is None:
            return _left(key, _STRANGE)
        sha256 = check.newest.canaries.get(f"{kind}/{group}") if check.newest else None

        def is_whole(data: bytes) -> bool:
            try:
                Canaries.parse(data, kind, identity)
            except StoreError:
                return False
            return sha256 in (None, sha256_hex(data))

        most = max_canary_bytes(kind, identity)
        if found := self._mended(key, most, is_whole, _undo_to(sha256)):
            return self._put(key, found)
        if self._make_canaries and is_whole(made := self._make_canaries(kind, identity)):
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

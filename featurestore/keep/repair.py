"""Repair: what `verify` finds damaged is put right, and nothing else is touched.

Comes in: a store, perhaps another copy of it, perhaps a way to compute blocks again. Goes out: what was done, object by
object. In order: what others are checked by comes first (removals, snapshots, clip parts, documents), then receipts,
then shards. Every step replaces one object whole, so a repair that was killed is simply run again. What cannot be put
right stays as it is and is named, but for snapshots and journals that nothing can restore: they are removed, since a
snapshot is made again from the receipts and a journal changes no byte.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from featurestore.digests import sha256_hex
from featurestore.errors import MervCacheError, StoreError
from featurestore.find import Place
from featurestore.groups import GroupWriter
from featurestore.journal import parse_journal
from featurestore.keep.erase import erase_tombstoned
from featurestore.keep.findings import Finding
from featurestore.keep.flips import undo_document_flip, undo_flip
from featurestore.keep.repair_documents import derived_document
from featurestore.keep.repair_parts import rebuild_part
from featurestore.keep.repair_receipts import rebuild_receipt
from featurestore.keep.repair_shards import Recompute, Repaired, mend_block
from featurestore.keep.verify import Verification
from featurestore.keep.verify_strays import shard_place
from featurestore.layout import (
    JOURNAL,
    PARTS,
    RECEIPTS,
    ROOT_METADATA,
    SAMPLES,
    SNAPSHOTS,
    TOMBSTONES,
    samples_files,
)
from featurestore.lease import StoreLease
from featurestore.metadata import parse_root, read_document
from featurestore.parquet import own_digest_holds
from featurestore.parts import ClipIndex
from featurestore.places.by_url import open_objects
from featurestore.places.objects import Objects
from featurestore.receipts import Receipt
from featurestore.snapshots import Snapshot, load_snapshot
from featurestore.tombstones import Tombstone
from featurestore.writer import StoreWriter

_PASSES = 12  # there are eight classes of files
_ORDER = (TOMBSTONES, SNAPSHOTS, PARTS, SAMPLES, ROOT_METADATA, RECEIPTS, JOURNAL)


def repair_store(
    path: Place,
    *,
    other: Place | None = None,
    recompute: Recompute | None = None,
    new_bytes: bool = False,
    say: Callable[[Repaired], None] = lambda done: None,
) -> list[Repaired]:
    """Put right what a full verification finds; [] for a sound store, which is left exactly as it is."""
    objects = open_objects(path)
    with StoreLease(path, "repair"):
        work = _Repair(objects, open_objects(other) if other is not None else None, say)
        work.documents()
        work.shards(recompute, new_bytes)
        work.publish(path)
    return work.done


class _Repair:
    """One pass of mending over a store."""

    def __init__(self, objects: Objects, other: Objects | None, say: Callable[[Repaired], None]) -> None:
        self.objects, self.other, self._say = objects, other, say
        self.done: list[Repaired] = []
        self._settled: set[str] = set()  # keys that are not looked at again
        self._check = Verification(objects, is_full=False)

    def documents(self) -> None:
        """Everything but shards, one class of files at a time: what is mended lets the next look see further.

        The full look, which reads every byte, comes last.
        """
        for is_full in (False, True):
            for _ in range(_PASSES):
                check = Verification(self.objects, is_full=is_full)
                check.run()
                self._check = check
                keys = {finding.key for finding in _damage(check) if self._is_document(finding.key)}
                if not keys:
                    break
                first = min(map(_order, keys))[0]
                for key in sorted(key for key in keys if _order(key)[0] == first):
                    self._note(self._mend(key, check))

    def shards(self, recompute: Recompute | None, new_bytes: bool) -> None:
        """Shards that the last, full verification found damaged."""
        wanted: dict[tuple[str, str, int], set[str]] = {}
        for finding in _damage(self._check):
            if place := shard_place(finding.key):
                kind, group, array, block = place
                wanted.setdefault((kind, group, block), set()).add(array)
        for (kind, group, block), arrays in sorted(wanted.items()):
            try:
                writer = self._group(kind, group)
                done = mend_block(writer, block, arrays, other=self.other, recompute=recompute, new_bytes=new_bytes)
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

    def _note(self, repaired: Repaired | None) -> None:
        if repaired is None or (repaired.key in self._settled and not repaired.is_mended):
            return
        if not repaired.is_mended or repaired.key.startswith(RECEIPTS):  # a new receipt is not the snapshot's
            self._settled.add(repaired.key)
        self.done.append(repaired)
        self._say(repaired)

    def _is_document(self, key: str) -> bool:
        return (shard_place(key) is None and key not in self._settled and "/" in key) or key == "zarr.json"

    def _mend(self, key: str, check: Verification) -> Repaired | None:
        top = key.split("/")[0]
        if key.endswith("zarr.json"):
            return self._mend_derived(key, check)
        if top in (PARTS, SAMPLES):
            return self._mend_table(key, check)
        menders = {SNAPSHOTS: self._mend_snapshot, RECEIPTS: self._mend_receipt, JOURNAL: self._mend_journal}
        return (menders | {TOMBSTONES: self._mend_tombstone}).get(top, _unknown)(key, check)

    def _mend_derived(self, key: str, check: Verification) -> Repaired:
        try:
            data = derived_document(self.objects, self.other, key, check)
        except (MervCacheError, FileNotFoundError) as error:
            return Repaired(key=key, done=f"cannot be made again: {error}", is_mended=False)
        self.objects.replace(key, data)
        return Repaired(key=key, done="made again from what it describes")

    def _mend_table(self, key: str, check: Verification) -> Repaired:
        """A clip part or samples file: by the digest that a snapshot or the file itself holds."""
        sha256 = check.digests.get(key)

        def is_whole(data: bytes) -> bool:
            return sha256_hex(data) == sha256 if sha256 else own_digest_holds(data) is True

        stored = self._get(key)
        if stored is not None and is_whole(stored):  # a later version of samples is what is missing
            return Repaired(key=key, done="is whole, but does not fit the rest", is_mended=False)
        if sha256 and stored is not None and (mended := undo_flip(stored, sha256)):
            return self._put(key, mended, "one flipped bit was undone")
        if (fetched := self._fetch(key)) is not None and is_whole(fetched):
            return self._put(key, fetched, "fetched from the other copy")
        named = check.newest if check.newest and key in check.newest.parts else None
        if named and (made := rebuild_part(self.objects, named, key)):
            return self._put(key, made, "made again from the snapshot, to the digest that it had")
        if key.startswith(SAMPLES):
            return self._drop_newer_samples(key, sha256)
        words = "no copy of it is known; give one with --from: without it rows and clips cannot be told apart"
        return Repaired(key=key, done=words, is_mended=False)

    def _drop_newer_samples(self, key: str, sha256: str | None) -> Repaired:
        """Samples that no snapshot names yet: the extract that wrote them writes them again."""
        if sha256 is None and key.split("/")[1] in samples_files(self.objects.list_names(SAMPLES)):
            self.objects.delete(key)
            return Repaired(
                key=key, done="removed, no snapshot names it: run the same extract again, it is written anew"
            )
        words = "no copy of it is known; give one with --from, or run the same extract again for a new version"
        return Repaired(key=key, done=words, is_mended=False)

    def _mend_snapshot(self, key: str, check: Verification) -> Repaired:
        snapshot_id = key.split("/")[1].rpartition(".")[0]
        record_key, table_key = f"{SNAPSHOTS}/{snapshot_id}.json", f"{SNAPSHOTS}/{snapshot_id}.parquet"
        if key == record_key:
            found = self._mended_document(key, lambda data: bool(Snapshot.parse(data, snapshot_id)))
        else:
            found = None
            with suppress(StoreError):
                sha256 = load_snapshot(self.objects, snapshot_id).table_sha256
                found = self._mended_bytes(key, sha256)
        if found:
            return self._put(key, *found)
        self.objects.delete(record_key)
        self.objects.delete(table_key)
        return Repaired(key=key, done="removed, the whole snapshot: a new one is made from the receipts")

    def _mend_receipt(self, key: str, check: Verification) -> Repaired:
        _, kind, group, file = key.split("/")
        block, rows = int(file.partition(".")[0]), check.block_rows[kind]
        summary = check.newest.groups.get(f"{kind}/{group}") if check.newest else None
        named = summary.receipts.get(str(block)) if summary else None

        def is_whole(data: bytes) -> bool:
            receipt = Receipt.parse(data, kind=kind, group=group, block=block, block_rows=rows)
            return named in (None, receipt.digest)

        stored = self._get(key)
        with suppress(StoreError):
            if stored is not None and is_whole(stored):
                return Repaired(key=key, done="is whole, but does not fit the clip parts", is_mended=False)
            if stored is not None and _is_whole_receipt(stored, kind, group, block, rows):
                return Repaired(key=key, done="is a newer receipt than the snapshot names: published")
        if found := self._mended_document(key, is_whole):
            return self._put(key, *found)
        if named is None:
            self.objects.delete(key)
            words = "removed, no snapshot names it: run the same extract again, the block is committed anew"
            return Repaired(key=key, done=words)
        try:
            return rebuild_receipt(self._group(kind, group), block, named, check)
        except (MervCacheError, FileNotFoundError) as error:
            return Repaired(key=key, done=f"cannot be made again: {error}", is_mended=False)

    def _mend_journal(self, key: str, check: Verification) -> Repaired:
        name = key.split("/")[1].rpartition(".")[0]
        if found := self._mended_document(key, lambda data: bool(parse_journal(data, name)) or True):
            return self._put(key, *found)
        self.objects.delete(key)
        return Repaired(key=key, done="removed: it told of a run, no tokens depend on it")

    def _mend_tombstone(self, key: str, check: Verification) -> Repaired:
        name = key.split("/")[1].rpartition(".")[0]
        if found := self._mended_document(key, lambda data: bool(Tombstone.parse(data, name))):
            return self._put(key, *found)
        words = "cannot be restored and must not be lost: give a copy with --from, or repeat `merv-pipeline tombstone`"
        return Repaired(key=key, done=words, is_mended=False)

    def _mended_document(self, key: str, check: Callable[[bytes], bool]) -> tuple[bytes, str] | None:
        """(bytes, words) of a JSON file that is whole again."""

        def is_whole(data: bytes) -> bool:
            try:
                return check(data)
            except StoreError:
                return False

        stored = self._get(key)
        if stored is not None and (mended := undo_document_flip(stored, is_whole)):
            return mended, "one flipped bit was undone"
        if (fetched := self._fetch(key)) is not None and is_whole(fetched):
            return fetched, "fetched from the other copy"
        return None

    def _mended_bytes(self, key: str, sha256: str) -> tuple[bytes, str] | None:
        stored = self._get(key)
        if stored is not None and (mended := undo_flip(stored, sha256)):
            return mended, "one flipped bit was undone"
        if (fetched := self._fetch(key)) is not None and sha256_hex(fetched) == sha256:
            return fetched, "fetched from the other copy"
        return None

    def _put(self, key: str, data: bytes, words: str) -> Repaired:
        self.objects.replace(key, data)
        return Repaired(key=key, done=words)

    def _get(self, key: str) -> bytes | None:
        try:
            return self.objects.get(key)
        except (FileNotFoundError, StoreError):
            return None

    def _fetch(self, key: str) -> bytes | None:
        if self.other is None:
            return None
        try:
            return self.other.get(key)
        except (FileNotFoundError, StoreError):
            return None

    def _group(self, kind: str, group: str) -> GroupWriter:
        return GroupWriter.open(self.objects, ClipIndex(self.objects, self._check_block_rows()).refresh(), kind, group)

    def _check_block_rows(self) -> dict[str, int]:
        return parse_root(read_document(self.objects, ROOT_METADATA))["block_rows"]


def _damage(check: Verification) -> list[Finding]:
    return [finding for finding in check.findings.sorted() if finding.severity == "damage"]


def _order(key: str) -> tuple[int, int, str]:
    top = "zarr.json" if key.endswith("zarr.json") else key.split("/")[0]
    return (_ORDER.index(top) if top in _ORDER else len(_ORDER), key.count("/"), key)


def _unknown(key: str, check: Verification) -> Repaired | None:
    return Repaired(key=key, done="is no file of a store: move it elsewhere", is_mended=False)


def _is_whole_receipt(data: bytes, kind: str, group: str, block: int, rows: int) -> bool:
    return Receipt.parse(data, kind=kind, group=group, block=block, block_rows=rows).number > 1

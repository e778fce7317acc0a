"""Verification: does the store keep its promises, byte by byte?

Every file is covered by something: a shard by its receipt, a receipt, a journal and a tombstone by their own digest,
clip parts, samples and canaries by their own digest and by a snapshot, a snapshot by its own digest, a zarr.json by
being made again. "quick" reads the metadata and looks at names and sizes; "full" reads every byte. Nothing here raises
for what it finds. Damage breaks a promise; a stray is something that lies about and that nothing depends on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from featurestore.clips import KINDS
from featurestore.columns import SAMPLE_SCHEMA
from featurestore.digests import sha256_hex
from featurestore.errors import StoreNotFoundError, UserError
from featurestore.find import Place, no_store_at
from featurestore.groups import GroupRecord, read_group
from featurestore.identity import FeatureIdentity
from featurestore.journal import MAX_JOURNAL_BYTES, parse_journal
from featurestore.keep.findings import Finding, Findings
from featurestore.keep.verify_blocks import check_receipt, check_shards
from featurestore.keep.verify_canaries import check_canaries
from featurestore.keep.verify_strays import find_strays
from featurestore.layout import (
    GROUP_NAME,
    JOURNAL,
    PARTS,
    ROOT_METADATA,
    SAMPLES,
    SNAPSHOTS,
    array_metadata_key,
    group_metadata_key,
    journal_key,
    journal_names,
    part_key,
    part_numbers,
    receipt_blocks,
    receipt_key,
    receipts_prefix,
    samples_files,
    sealed_blocks,
    snapshot_ids,
    snapshot_keys,
    tombstone_key,
)
from featurestore.metadata import (
    ArraySpec,
    array_specs,
    document_bytes,
    group_document,
    parse_array,
    parse_root,
    read_document,
    root_document,
    without_digest,
)
from featurestore.parquet import own_digest_holds, read_table, table_file
from featurestore.parts import ClipIndex
from featurestore.places.by_url import in_parallel, open_objects
from featurestore.places.objects import Objects, get_bounded
from featurestore.progress import SILENT, Progress
from featurestore.receipts import max_receipt_bytes
from featurestore.snapshots import Snapshot, load_snapshot
from featurestore.tombstones import Tombstone, read_tombstone, tombstone_ids

Level = Literal["quick", "full"]
LEVELS: tuple[Level, ...] = ("quick", "full")
WORKERS = 2  # blocks checked at once: hashing and decompressing leave the interpreter
_EMPTY_GROUP = document_bytes({"zarr_format": 3, "node_type": "group", "attributes": {}})


def verify_store(
    path: Place,
    level: Level = "quick",
    *,
    workers: int = WORKERS,
    progress: Progress = SILENT,
) -> list[Finding]:
    """Everything that is damaged, missing or out of place, damage first; an empty list is a sound store.

    `progress` counts blocks, and their MB.
    """
    if level not in LEVELS:
        raise UserError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    objects = open_objects(path)
    if not objects.exists(ROOT_METADATA) and not objects.list_names(PARTS):  # a root that is lost is a finding
        raise StoreNotFoundError(no_store_at(path))
    check = Verification(objects, is_full=level == "full", workers=workers, progress=progress)
    check.run()
    return check.findings.sorted()


class Verification:
    """One pass over a store; collects findings."""

    def __init__(self, objects: Objects, *, is_full: bool, workers: int = 1, progress: Progress = SILENT) -> None:
        self.objects = objects
        self.is_full = is_full
        self.workers = workers
        self.progress = progress
        self.findings = Findings()
        self.index: ClipIndex | None = None
        self.block_rows: dict[str, int] = {}
        self.newest: Snapshot | None = None
        self.stones: dict[str, Tombstone] = {}
        self.erased: set[str] = set()  # sha256 of samples files that tombstones took away
        self.removed_clips: set[str] = set()
        self.digests: dict[str, str] = {}  # sha256 of parts and samples, by key, as any snapshot says
        self.specs: dict[tuple[str, str], dict[str, ArraySpec]] = {}  # (kind, group) -> sound arrays
        self.identities: dict[tuple[str, str], FeatureIdentity] = {}  # (kind, group) -> readable ones
        self.removed_rows: dict[str, set[int]] = {kind: set() for kind in KINDS}

    def run(self) -> None:
        self._tombstones()
        self._snapshots()
        self._clip_parts()
        self._samples()
        self._root()
        self._blocks([block for kind in KINDS for block in self._kind(kind)])
        self._named_receipts()
        check_canaries(self.findings, self.objects, self.identities, self.newest, is_full=self.is_full)
        self._journal()
        find_strays(self.findings, self.objects, self.specs, is_full=self.is_full)

    def _tombstones(self) -> None:
        for name in tombstone_ids(self.objects):
            with self.findings.reading(tombstone_key(name)):
                self.stones[name] = read_tombstone(self.objects, name)
        self.erased = {sha256 for stone in self.stones.values() for sha256 in stone.erased}
        self.removed_clips = {clip for stone in self.stones.values() for clip in stone.clips}

    def _snapshots(self) -> None:
        for snapshot_id in snapshot_ids(self.objects.list_names(SNAPSHOTS)):
            table_key, record_key = snapshot_keys(snapshot_id)
            with self.findings.reading(record_key):
                snapshot = load_snapshot(self.objects, snapshot_id)
                self.newest = snapshot
                self.digests |= snapshot.parts | {entry["key"]: entry["sha256"] for entry in snapshot.samples.values()}
                self._digest(table_key, snapshot.table_sha256)
        for lost in self.newest.tombstones if self.newest else ():
            if lost not in self.stones:
                self.findings.found(tombstone_key(lost), "is missing though the newest snapshot names it")

    def _digest(self, key: str, sha256: str) -> None:
        with self.findings.reading(key):
            if sha256_hex(table_file(self.objects, key)) != sha256:
                self.findings.found(key, "does not match the digest that its snapshot holds")

    def _clip_parts(self) -> None:
        names = self.objects.list_names(PARTS)
        with self.findings.reading(PARTS):
            for number in part_numbers(names):
                self._covered(part_key(number))
            self.index = ClipIndex(self.objects, {}).refresh()  # asked for rows only, never for blocks
        for key in self.newest.parts if self.newest else ():
            if key.split("/")[1] not in names:
                self.findings.found(key, "is missing though the newest snapshot names it")
        if self.removed_clips and self.index:
            for kind in KINDS:
                self.removed_rows[kind] = self.index.rows_of_clips(kind, self.removed_clips)

    def _covered(self, key: str) -> None:
        """A clip part or samples file: by the snapshots that name it, and by its own digest."""
        with self.findings.reading(key):
            if not self.is_full:
                self.objects.size(key)
                return
            data = table_file(self.objects, key)
            own, named = own_digest_holds(data), self.digests.get(key)
            if own is False or (named is not None and sha256_hex(data) != named):
                self.findings.found(key, "does not match " + ("its own digest" if own is False else "its snapshot's"))
            elif own is None and named is None:
                self.findings.found(key, "has no digest of its own, and no snapshot names it")

    def _samples(self) -> None:
        files = samples_files(self.objects.list_names(SAMPLES))
        for file in files:
            self._covered(f"{SAMPLES}/{file}")
            if self.is_full and self.removed_clips:
                self._holds_removed(f"{SAMPLES}/{file}")
        versions: dict[str, list[int]] = {}
        for name, version in files.values():
            versions.setdefault(name, []).append(version)
        for key, sha256 in self.digests.items():
            folder, _, file = key.partition("/")
            if folder == SAMPLES and file not in files and sha256 not in self.erased:
                self.findings.found(key, "is missing though a snapshot names it")
        for name, found in versions.items():
            if max(found) != len(found) and not self.erased:
                key = f"{SAMPLES}/{name}"
                self.findings.found(key, f"has {len(found)} versions and one that says it is number {max(found)}")

    def _holds_removed(self, key: str) -> None:
        with self.findings.reading(key):
            table = read_table(table_file(self.objects, key), SAMPLE_SCHEMA, key, columns=["clip_id"])
            if self.removed_clips & set(table["clip_id"].to_pylist()):
                self.findings.found(key, "still holds conversations about a clip that was removed on request")

    def _root(self) -> None:
        with self.findings.reading(ROOT_METADATA):
            data = read_document(self.objects, ROOT_METADATA)
            root = parse_root(data)
            self.block_rows = root["block_rows"]
            if self.newest and self.block_rows != self.newest.block_rows:
                self.findings.found(ROOT_METADATA, "names other block rows than the newest snapshot")
                self.block_rows = dict(self.newest.block_rows)
            if self.index:
                wanted = root_document(datasets=self.index.datasets(), block_rows=self.block_rows)
                if data not in (wanted, without_digest(wanted)):
                    self.findings.found(ROOT_METADATA, "is not what the clip parts make it")
        if not self.block_rows and self.newest:
            self.block_rows = dict(self.newest.block_rows)

    def _kind(self, kind: str) -> list[tuple[str, GroupRecord, int]]:
        """Check the groups of a kind; returns their committed blocks."""
        groups = [name for name in self.objects.list_names(kind) if GROUP_NAME.fullmatch(name)]
        if groups:
            self._same(f"{kind}/zarr.json", _EMPTY_GROUP, "is not the document of a plain group")
        named = {name.split("/")[1] for name in self.newest.groups if name.startswith(kind)} if self.newest else set()
        return [block for group in sorted(named | set(groups)) for block in self._group(kind, group)]

    def _same(self, key: str, wanted: bytes, problem: str) -> None:
        with self.findings.reading(key):
            if read_document(self.objects, key) != wanted:
                self.findings.found(key, problem)

    def _group(self, kind: str, group: str) -> list[tuple[str, GroupRecord, int]]:
        key = group_metadata_key(kind, group)
        record = None
        with self.findings.reading(key):
            record = read_group(self.objects, kind, group)
            wanted = group_document(record.identity, weights_label=record.weights, batch_shape=record.batch_shape)
            if read_document(self.objects, key) not in (wanted, without_digest(wanted)):
                self.findings.found(key, "is not the document that its own contents make")
            summary = self.newest.groups.get(f"{kind}/{group}") if self.newest else None
            if summary and (summary.weights, summary.batch_shape) != (record.weights, record.batch_shape):
                self.findings.found(key, "names other weights or another batch shape than the newest snapshot")
        if record is not None:
            self.identities[kind, group] = record.identity
        if record is None or kind not in self.block_rows:
            return []
        self.specs[kind, group] = self._arrays(kind, record)
        blocks = receipt_blocks(self.objects.list_names(receipts_prefix(kind, group)))
        return [(kind, record, block) for block in sorted(blocks)]

    def _blocks(self, blocks: list[tuple[str, GroupRecord, int]]) -> None:
        self.progress.start(len(blocks))
        width = max(self.workers, self.objects.parallel_reads)
        in_parallel(self._block, blocks, width)

    def _block(self, entry: tuple[str, GroupRecord, int]) -> None:
        kind, record, block = entry
        size = self.block_rows[kind]
        receipt = check_receipt(self.findings, self.objects, kind, record, block, size, self.index)
        specs = self.specs[kind, record.identity.group_name]
        if receipt and specs and self.is_full:
            removed = self.removed_rows[kind] & set(range(block * size, (block + 1) * size))
            check_shards(self.findings, self.objects, receipt, specs, removed)
        self.progress.advance(MB=receipt.stored_bytes / 1e6 if receipt else 0)

    def _arrays(self, kind: str, record: GroupRecord) -> dict[str, ArraySpec]:
        block_rows, identity = self.block_rows[kind], record.identity
        specs: dict[str, ArraySpec] = {}
        for name, derived in array_specs(identity, kind, blocks=0, block_rows=block_rows).items():
            key = array_metadata_key(kind, identity.group_name, name)
            with self.findings.reading(key):
                data = read_document(self.objects, key)
                stored = parse_array(name, data)
                allowed = self._row_counts(kind)
                if stored is None:
                    self.findings.found(key, "does not describe an array of this format")
                elif stored.document() != data or stored != _like(derived, stored):
                    self.findings.found(key, "is not the document that its identity makes")
                elif allowed and stored.rows not in allowed:
                    self.findings.found(key, f"has {stored.rows} rows, the clip parts make it {max(allowed)}")
                else:
                    specs[name] = stored
                    if allowed and stored.rows < max(allowed):
                        lag = f"has {stored.rows} rows, the clip parts give out {max(allowed)}"
                        self.findings.stray(key, lag, "an extraction at work grows it with its next snapshot")
        return specs

    def _row_counts(self, kind: str) -> set[int]:
        """Lengths that an array may have: of the newest snapshot, or grown by parts that came since."""
        if self.index is None:
            return set()
        since = len(self.newest.parts) if self.newest else 0
        counts, size = set(), self.block_rows[kind]
        for stop in range(since, len(self.index.tables) + 1):
            counts.add(sealed_blocks(self.index.max_row(kind, parts=stop), size) * size)
        return counts

    def _named_receipts(self) -> None:
        """Receipts that the newest snapshot names must be there, and be those."""
        for name, summary in self.newest.groups.items() if self.newest else ():
            kind, group = name.split("/")
            size = max_receipt_bytes(self.newest.block_rows[kind]) if self.newest else 0
            for block, digest in summary.receipts.items():
                key = receipt_key(kind, group, int(block))
                with self.findings.reading(key):
                    if f'"digest":"{digest}"'.encode() not in get_bounded(self.objects, key, size):
                        self.findings.found(key, "is not the receipt that the newest snapshot names")

    def _journal(self) -> None:
        for name in journal_names(self.objects.list_names(JOURNAL)):
            key = journal_key(name)
            with self.findings.reading(key):
                parse_journal(get_bounded(self.objects, key, MAX_JOURNAL_BYTES), name)


def _like(derived: ArraySpec, stored: ArraySpec) -> ArraySpec:
    """The derived spec with what it cannot know: codec and rows."""
    return replace(derived, codec=stored.codec, rows=stored.rows)

"""Verification: every file of a store against the digest that covers it.

A shard is covered by its receipt; a receipt, a journal and a tombstone by their own digest; clip parts, samples and
reference clips by their own digest and by a snapshot; a snapshot by its own digest; a zarr.json by deriving it again.
"quick" reads metadata, names and sizes, "full" every byte. What is found is collected, not raised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from featurestore.clips import KINDS
from featurestore.identity import FeatureIdentity
from featurestore.layout import (
    CANARIES,
    CARD,
    GROUP_NAME,
    JOURNAL,
    LISTING,
    NEWEST,
    PARTS,
    ROOT_METADATA,
    SAMPLES,
    SNAPSHOTS,
    TAGS,
    TEMPORARY,
    VIEWER,
    allocated_blocks,
    array_metadata_key,
    group_metadata_key,
    journal_key,
    journal_names,
    part_key,
    part_numbers,
    receipt_blocks,
    receipt_key,
    receipts_prefix,
    reference_clip_groups,
    reference_clip_key,
    rows_of,
    samples_files,
    shard_key,
    shard_place,
    snapshot_ids,
    snapshot_keys,
    tag_key,
    tag_names,
    tombstone_key,
)
from featurestore.locate import Place, no_store_at
from featurestore.maintenance.derived_table import check_table
from featurestore.maintenance.findings import Finding, Findings
from featurestore.newest import MAX_NEWEST_BYTES, Newest, list_newest
from featurestore.objects.base import Objects, get_bounded
from featurestore.objects.open import in_parallel, open_objects
from featurestore.parquet import own_digest_holds, read_table, table_file
from featurestore.records import (
    MAX_JOURNAL_BYTES,
    Receipt,
    Tombstone,
    max_receipt_bytes,
    parse_journal,
    read_receipt,
    read_tombstone,
    row_digest,
    tombstone_ids,
)
from featurestore.reference_clips import ReferenceClips, max_reference_clip_bytes
from featurestore.schemas import SAMPLE_SCHEMA
from featurestore.shards import CRC_BYTES, Shard, check_shard, decode_all
from featurestore.snapshots import ClipIndex, Snapshot, load_snapshot, read_snapshot_table
from featurestore.tags import read_tag
from featurestore.zarr_metadata import (
    ArraySpec,
    GroupRecord,
    array_specs,
    document_bytes,
    group_document,
    parse_array,
    parse_root,
    read_document,
    read_group,
    root_document,
    without_digest,
)
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import StoreError, StoreNotFoundError, UserError
from mervcache.files import sha256_hex

Level = Literal["quick", "full"]
LEVELS: tuple[Level, ...] = ("quick", "full")
WORKERS = 2  # blocks checked at once: hashing and decompressing release the GIL
_PIECE_BYTES = 8 << 20
_NOT_NAMED = "is missing though the newest snapshot names it"
_EMPTY_GROUP = document_bytes({"zarr_format": 3, "node_type": "group", "attributes": {}})


def verify_store(
    path: Place,
    level: Level = "quick",
    *,
    workers: int = WORKERS,
    progress: ProgressLine = SILENT,
) -> list[Finding]:
    """Everything that is damaged, missing or orphaned, damage first; [] for a sound store.

    Parameters
    ----------
    path
        A folder or a URL.
    level
        "quick" checks names, sizes and digests of metadata; "full" reads every byte.
    workers
        Blocks read at once.
    progress
        Counts blocks, and their MB.

    Raises
    ------
    StoreNotFoundError
        No store is there.
    """
    if level not in LEVELS:
        raise UserError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    objects = open_objects(path)
    if not objects.exists(ROOT_METADATA) and not objects.list_names(PARTS):  # a lost root of a store is a finding
        raise StoreNotFoundError(no_store_at(path))
    check = Verification(objects, is_full=level == "full", workers=workers, progress=progress)
    check.run()
    return check.findings.sorted()


class Verification:
    """One pass over a store. `run` collects findings, and what `repair` needs to know of the sound files."""

    def __init__(self, objects: Objects, *, is_full: bool, workers: int = 1, progress: ProgressLine = SILENT) -> None:
        self.objects = objects
        self.is_full = is_full
        self.workers = workers
        self.progress = progress
        self.findings = Findings()
        self.index: ClipIndex | None = None
        self.block_rows: dict[str, int] = {}
        self.newest: Snapshot | None = None
        self.tombstones: dict[str, Tombstone] = {}
        self.digests: dict[str, str] = {}  # key -> sha256 of clip parts and samples that any snapshot names
        self.specs: dict[tuple[str, str], dict[str, ArraySpec]] = {}  # (kind, group) -> sound arrays
        self.identities: dict[tuple[str, str], FeatureIdentity] = {}  # (kind, group) -> readable ones
        self._erased: set[str] = set()  # sha256 of samples files that tombstones removed
        self._removed_clips: set[str] = set()
        self._removed_rows: dict[str, set[int]] = {kind: set() for kind in KINDS}

    def run(self) -> None:
        self._check_tombstones()
        self._check_snapshots()
        self._check_tags()
        self._check_clip_parts()
        self._check_samples()
        self._check_root()
        blocks = [block for kind in KINDS for block in self._check_groups(kind)]
        self.progress.start(len(blocks))
        in_parallel(self._check_block, blocks, max(self.workers, self.objects.parallel_reads))
        self._check_named_receipts()
        self._check_newest_table()
        self._check_reference_clips()
        for name in journal_names(self.objects.list_names(JOURNAL)):
            with self.findings.reading(journal_key(name)):
                parse_journal(get_bounded(self.objects, journal_key(name), MAX_JOURNAL_BYTES), name)
        self._check_newest()
        self._find_orphans()

    def _check_tombstones(self) -> None:
        for name in tombstone_ids(self.objects):
            with self.findings.reading(tombstone_key(name)):
                self.tombstones[name] = read_tombstone(self.objects, name)
        self._erased = {sha256 for tombstone in self.tombstones.values() for sha256 in tombstone.erased}
        self._removed_clips = {clip for tombstone in self.tombstones.values() for clip in tombstone.clips}

    def _check_snapshots(self) -> None:
        for snapshot_id in snapshot_ids(self.objects.list_names(SNAPSHOTS)):
            table_key, record_key = snapshot_keys(snapshot_id)
            with self.findings.reading(record_key):
                snapshot = load_snapshot(self.objects, snapshot_id)
                self.newest = snapshot
                self.digests |= snapshot.parts
                self.digests |= {entry["key"]: entry["sha256"] for entry in snapshot.samples.values()}
                with self.findings.reading(table_key):
                    if sha256_hex(table_file(self.objects, table_key)) != snapshot.table_sha256:
                        self.findings.add_damage(table_key, "does not match the digest that its snapshot holds")
                    elif self.is_full:
                        read_snapshot_table(self.objects, snapshot)
        for tombstone_id in self.newest.tombstones if self.newest else ():
            if tombstone_id not in self.tombstones:
                self.findings.add_damage(tombstone_key(tombstone_id), _NOT_NAMED)

    def _check_tags(self) -> None:
        for name in tag_names(self.objects.list_names(TAGS)):
            key = tag_key(name)
            with self.findings.reading(key):
                snapshot = read_tag(self.objects, name).snapshot
                if not self.objects.exists(snapshot_keys(snapshot)[1]):
                    advice = "fetch the snapshot from a copy, or move the tag with `merv-pipeline tag --force`"
                    self.findings.add_damage(key, f"names snapshot {snapshot}, which is missing", advice)

    def _check_clip_parts(self) -> None:
        names = self.objects.list_names(PARTS)
        with self.findings.reading(PARTS):
            for number in part_numbers(names):
                self._check_table(part_key(number))
            self.index = ClipIndex(self.objects, {}).refresh()  # used for rows only, not for blocks
        for key in self.newest.parts if self.newest else ():
            if key.split("/")[1] not in names:
                self.findings.add_damage(key, _NOT_NAMED)
        if self._removed_clips and self.index:
            for kind in KINDS:
                self._removed_rows[kind] = self.index.rows_of_clips(kind, self._removed_clips)

    def _check_samples(self) -> None:
        files = samples_files(self.objects.list_names(SAMPLES))
        for file in files:
            key = f"{SAMPLES}/{file}"
            self._check_table(key)
            if self.is_full and self._removed_clips:
                with self.findings.reading(key):
                    table = read_table(table_file(self.objects, key), SAMPLE_SCHEMA, key, columns=["clip_id"])
                    if self._removed_clips & set(table["clip_id"].to_pylist()):
                        self.findings.add_damage(
                            key, "still holds conversations about a clip that was removed on request"
                        )
        for key, sha256 in self.digests.items():
            folder, _, file = key.partition("/")
            if folder == SAMPLES and file not in files and sha256 not in self._erased:
                self.findings.add_damage(key, "is missing though a snapshot names it")

    def _check_table(self, key: str) -> None:
        """A clip part or samples file, by its own digest and by the snapshots that name it."""
        with self.findings.reading(key):
            if not self.is_full:
                self.objects.size(key)
                return
            data = table_file(self.objects, key)
            own, named = own_digest_holds(data), self.digests.get(key)
            if own is False:
                self.findings.add_damage(key, "does not match its own digest")
            elif named is not None and sha256_hex(data) != named:
                self.findings.add_damage(key, "does not match its snapshot's")
            elif own is None and named is None:
                self.findings.add_damage(key, "has no digest of its own, and no snapshot names it")

    def _check_root(self) -> None:
        with self.findings.reading(ROOT_METADATA):
            data = read_document(self.objects, ROOT_METADATA)
            self.block_rows = parse_root(data)["block_rows"]
            if self.newest and self.block_rows != self.newest.block_rows:
                self.findings.add_damage(ROOT_METADATA, "names other block rows than the newest snapshot")
                self.block_rows = dict(self.newest.block_rows)
            if self.index:
                expected = root_document(datasets=self.index.datasets(), block_rows=self.block_rows)
                if data not in (expected, without_digest(expected)):
                    self.findings.add_damage(ROOT_METADATA, "does not follow from the clip parts")
        if not self.block_rows and self.newest:
            self.block_rows = dict(self.newest.block_rows)

    def _check_groups(self, kind: str) -> list[tuple[str, GroupRecord, int]]:
        """Check the groups of a kind; returns their committed blocks."""
        groups = {name for name in self.objects.list_names(kind) if GROUP_NAME.fullmatch(name)}
        if groups:
            key = f"{kind}/{ROOT_METADATA}"
            with self.findings.reading(key):
                if read_document(self.objects, key) != _EMPTY_GROUP:
                    self.findings.add_damage(key, "is not the document of a plain group")
        if self.newest:
            groups |= {name.split("/")[1] for name in self.newest.groups if name.startswith(kind)}
        return [block for group in sorted(groups) for block in self._check_group(kind, group)]

    def _check_group(self, kind: str, group: str) -> list[tuple[str, GroupRecord, int]]:
        key = group_metadata_key(kind, group)
        record = None
        with self.findings.reading(key):
            record = read_group(self.objects, kind, group)
            expected = group_document(record.identity, weights_label=record.weights, batch_shape=record.batch_shape)
            if read_document(self.objects, key) not in (expected, without_digest(expected)):
                self.findings.add_damage(key, "is not the document that its own contents make")
            summary = self.newest.groups.get(f"{kind}/{group}") if self.newest else None
            if summary and (summary.weights, summary.batch_shape) != (record.weights, record.batch_shape):
                self.findings.add_damage(key, "names other weights or another batch shape than the newest snapshot")
        if record is not None:
            self.identities[kind, group] = record.identity
        if record is None or kind not in self.block_rows:
            return []
        self.specs[kind, group] = self._check_arrays(kind, record.identity)
        blocks = receipt_blocks(self.objects.list_names(receipts_prefix(kind, group)))
        return [(kind, record, block) for block in sorted(blocks)]

    def _check_arrays(self, kind: str, identity: FeatureIdentity) -> dict[str, ArraySpec]:
        """The sound arrays of a group. Lengths may be the newest snapshot's, or grown by parts that came since."""
        size = self.block_rows[kind]
        lengths: set[int] = set()
        if self.index is not None:
            since = len(self.newest.parts) if self.newest else 0
            for stop in range(since, len(self.index.tables) + 1):
                lengths.add(allocated_blocks(self.index.max_row(kind, parts=stop), size) * size)
        specs: dict[str, ArraySpec] = {}
        for name, derived in array_specs(identity, kind, blocks=0, block_rows=size).items():
            key = array_metadata_key(kind, identity.group_name, name)
            with self.findings.reading(key):
                data = read_document(self.objects, key)
                stored = parse_array(name, data)
                if stored is None:
                    self.findings.add_damage(key, "does not describe an array of this format")
                elif stored.document() != data or stored != replace(derived, codec=stored.codec, rows=stored.rows):
                    self.findings.add_damage(key, "is not the document that its identity makes")
                elif lengths and stored.rows not in lengths:
                    self.findings.add_damage(key, f"has {stored.rows} rows, the clip parts make it {max(lengths)}")
                else:
                    specs[name] = stored
                    if lengths and stored.rows < max(lengths):
                        problem = f"has {stored.rows} rows, the clip parts allocate {max(lengths)}"
                        self.findings.add_orphan(key, problem, "a running extraction grows it with its next snapshot")
        return specs

    def _check_block(self, entry: tuple[str, GroupRecord, int]) -> None:
        """A receipt by its own digest and the clip parts, its shards by the receipt."""
        kind, record, block = entry
        group, size = record.identity.group_name, self.block_rows[kind]
        key, receipt = receipt_key(kind, group, block), None
        with self.findings.reading(key):
            receipt = read_receipt(self.objects, kind, group, block, size)
            rows = rows_of(block, size)
            used = [row for row, outcome in zip(rows, receipt.rows, strict=True) if outcome.state != "empty"]
            if self.index is not None and used != self.index.rows_between(kind, rows.start, rows.stop):
                self.findings.add_damage(key, "lists other rows than the clip parts allocate")
        for name, shard in receipt.shards.items() if receipt else ():
            key = shard_key(kind, group, name, block)
            with self.findings.reading(key):
                if (num_bytes := self.objects.size(key)) != shard["bytes"]:
                    self.findings.add_damage(key, f"has {num_bytes} bytes, its receipt names {shard['bytes']}")
        if receipt and self.specs[kind, group] and self.is_full:
            self._check_shards(receipt, self.specs[kind, group])
        self.progress.advance(MB=receipt.stored_bytes / 1e6 if receipt else 0)

    def _check_shards(self, receipt: Receipt, specs: Mapping[str, ArraySpec]) -> None:
        """Every byte of a block's shards against its receipt; rows of removed clips must be empty."""
        keys = {name: shard_key(receipt.kind, receipt.group, name, receipt.block) for name in specs}
        shards: dict[str, Shard] = {}
        for name, key in keys.items():
            with self.findings.reading(key):
                entry = receipt.shards.get(name)
                if entry is None or self.objects.size(key) != entry["bytes"] or self._sha256(key) != entry["sha256"]:
                    self.findings.add_damage(key, "does not match its receipt's sha256")
                    continue
                shards[name] = Shard(specs[name], self.objects.open(key))
        first = receipt.first_row()
        if set(shards) == set(receipt.shards):  # a row's digest is over all arrays
            with self.findings.reading(keys["tokens"]):
                for slot, outcome in enumerate(receipt.rows):
                    if outcome.state != "ok":
                        continue
                    stored = decode_all(shards, slot)
                    if stored is None or row_digest(stored) != outcome.digest:
                        problem = f"row {first + slot} has another digest than its shards' bytes"
                        self.findings.add_damage(receipt_key(receipt.kind, receipt.group, receipt.block), problem)
                for name, shard in shards.items():
                    for row in self._removed_rows[receipt.kind].intersection(first + slot for slot in shard.rows()):
                        problem = f"still holds row {row}, whose clip was removed on request"
                        self.findings.add_damage(keys[name], problem)
        for shard in shards.values():
            shard.close()

    def _sha256(self, key: str) -> str:
        opened = self.objects.open(key)
        total, buffer, offset = hashlib.sha256(), bytearray(max(CRC_BYTES, min(_PIECE_BYTES, opened.size))), 0
        while count := opened.read_into(offset, [memoryview(buffer)]):
            total.update(memoryview(buffer)[:count])
            offset += count
        opened.close()
        return total.hexdigest()

    def _check_named_receipts(self) -> None:
        """The receipts that the newest snapshot names must be there, and be those."""
        if self.newest is None:
            return
        block_rows = self.newest.block_rows
        for name, summary in self.newest.groups.items():
            kind, group = name.split("/")
            for block, digest in summary.receipts.items():
                key = receipt_key(kind, group, int(block))
                with self.findings.reading(key):
                    data = get_bounded(self.objects, key, max_receipt_bytes(block_rows[kind]))
                    if f'"digest":"{digest}"'.encode() not in data:
                        self.findings.add_damage(key, "is not the receipt that the newest snapshot names")

    def _check_newest_table(self) -> None:
        """The newest table follows from what it is made of; not where that is damaged, which is listed already."""
        if self.newest is None or not self.is_full or any(f.severity == "damage" for f in self.findings.sorted()):
            return
        with self.findings.reading(snapshot_keys(self.newest.id)[0]):
            check_table(self.objects, self.newest)

    def _check_reference_clips(self) -> None:
        """Files of the store's groups; those of groups that it does not have are orphans."""
        named = dict(self.newest.canaries) if self.newest else {}
        for kind in KINDS:
            for group in reference_clip_groups(self.objects.list_names(f"{CANARIES}/{kind}")):
                sha256, identity = named.pop(f"{kind}/{group}", None), self.identities.get((kind, group))
                key = reference_clip_key(kind, group)
                if identity is None:
                    continue
                with self.findings.reading(key):
                    if not self.is_full:
                        self.objects.size(key)
                        continue
                    data = get_bounded(self.objects, key, max_reference_clip_bytes(kind, identity))
                    ReferenceClips.parse(data, kind, identity)
                    if sha256 is not None and sha256_hex(data) != sha256:
                        self.findings.add_damage(key, "does not match the digest that its snapshot holds")
        for name in named:
            self.findings.add_damage(reference_clip_key(*name.split("/")), _NOT_NAMED)

    def _check_newest(self) -> None:
        """Readers of a bucket believe this object instead of listing."""
        if not self.objects.keeps_newest or not self.objects.exists(NEWEST):
            return
        with self.findings.reading(NEWEST):
            newest = Newest.parse(get_bounded(self.objects, NEWEST, MAX_NEWEST_BYTES))
            listed = list_newest(self.objects)
            if newest != listed:
                problem = f"names snapshot {newest.snapshot} and {len(newest.tombstones)} removals, there are"
                found = f"{listed.snapshot} and {len(listed.tombstones)}"
                self.findings.add_damage(NEWEST, f"{problem} {found}", "run the same extract or push again")

    def _find_orphans(self) -> None:
        """Temporary files of killed runs, shards without a receipt, and names that no store has."""
        for key in self.objects.cleanup_tmp(dry_run=True):
            if self.objects.list_names(key):
                advice = "the next extract removes it; or delete it"
                self.findings.add_orphan(key, "was left by an interrupted run", advice)
        for key in self.objects.non_regular_files():
            problem = "is a link or device; a store holds plain files"
            self.findings.add_damage(key, problem, "put the file in its place, or delete it")
        for key in sorted(self.objects.list_tree()):
            top = key.split("/")[0]
            if key in self.findings.checked or key in (CARD, LISTING, NEWEST) or top in (TEMPORARY, VIEWER):
                continue  # every push writes card, listing and viewer again, NEWEST is checked where it is used
            if place := shard_place(key):
                kind, group, array, _ = place
                self.findings.add_orphan(
                    key,
                    "is a shard without a receipt: of a block in progress, or left by a killed worker",
                    "run the same extract again: it writes the block's receipt",
                )
                if self.is_full and (spec := self.specs.get((kind, group), {}).get(array)):
                    self._check_orphan_shard(key, spec)
            elif key.startswith(f"{SNAPSHOTS}/") and key.endswith(".parquet"):
                self.findings.add_orphan(key, "is the table of a snapshot that was never finished", "delete it")
            else:
                self.findings.add_orphan(key, "is no file of a feature store", "delete it, or keep it elsewhere")

    def _check_orphan_shard(self, key: str, spec: ArraySpec) -> None:
        """Every chunk and the index have a checksum, and together they are the whole shard."""
        try:
            check_shard(spec, self.objects.open(key))
        except StoreError as error:
            advice = (
                "run the same extract again: it sets the shard aside and computes the block; or `merv-pipeline repair`"
            )
            self.findings.add_damage(key, f"{error}, and no receipt names it", advice)

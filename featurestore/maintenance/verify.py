"""Verification: does the store keep its promises, byte by byte?

Every file is covered by something: a shard by its receipt, a receipt, a journal and a tombstone by their own digest,
clip parts, samples and canaries by their own digest and by a snapshot, a snapshot by its own digest, a zarr.json by
being made again. "quick" reads the metadata and looks at names and sizes; "full" reads every byte. Nothing here raises
for what it finds. Damage breaks a promise; a stray is something that lies about and that nothing depends on.

Verification of one block: the receipt by its own digest, shards by the receipt, rows by their digests.

A shard without a receipt is a block in the making, or what a killed worker left: each of its rows has a checksum.

The canaries of a store: each file is covered by its own digest, and by the newest snapshot once that names it.

What lies about in a store: nothing depends on it, but somebody should know and can be told what to do.

Findings: what a verification collects instead of raising.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa

from featurestore.clips import KINDS
from featurestore.identity import FeatureIdentity
from featurestore.layout import (
    CANARIES,
    CARD,
    GROUP_NAME,
    JOURNAL,
    LISTING,
    PARTS,
    ROOT_METADATA,
    SAMPLES,
    SNAPSHOTS,
    TEMPORARY,
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
    sealed_blocks,
    shard_key,
    shard_place,
    snapshot_ids,
    snapshot_keys,
    tombstone_key,
)
from featurestore.locate import Place, no_store_at
from featurestore.objects.base import Objects, get_bounded
from featurestore.objects.open import in_parallel, open_objects
from featurestore.parquet import own_digest_holds, read_table, table_file
from featurestore.reader import CRC_BYTES, Shard
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
from featurestore.snapshots import ClipIndex, Snapshot, load_snapshot
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
from mervcache.errors import MervCacheError, StoreNotFoundError, UserError
from mervcache.files import sha256_hex

# damage: a promise of the store does not hold. stray: nothing depends on it; it was left lying or is still being made.
Severity = Literal["damage", "stray"]
REPAIR = "run `merv-pipeline repair`"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    key: str  # the object, relative to the store
    problem: str  # what is wrong with it
    severity: Severity = "damage"
    advice: str = REPAIR  # what to do


class Findings:
    """A growing list of findings, and the keys that were looked at; threads may share one."""

    def __init__(self) -> None:
        self._found: set[Finding] = set()
        self.looked_at: set[str] = set()  # keys that belong to the store

    def found(self, key: str, problem: str, advice: str = REPAIR) -> None:
        self._found.add(Finding(key, problem, advice=advice))

    def stray(self, key: str, problem: str, advice: str) -> None:
        self._found.add(Finding(key, problem, "stray", advice))

    @contextmanager
    def reading(self, key: str) -> Iterator[None]:
        """Turn what an object does to its reader into a finding."""
        self.looked_at.add(key)
        try:
            yield
        except FileNotFoundError:
            self.found(key, "is missing")
        except (MervCacheError, OSError, pa.ArrowException) as error:
            self.found(key, str(error))

    def sorted(self) -> list[Finding]:
        """Damage first."""
        return sorted(self._found, key=lambda finding: (finding.severity, finding.key, finding.problem))


def is_damaged(findings: list[Finding]) -> bool:
    return any(finding.severity == "damage" for finding in findings)


_PIECE_BYTES = 8 << 20


def check_receipt(
    findings: Findings,
    objects: Objects,
    kind: str,
    record: GroupRecord,
    block: int,
    block_rows: int,
    index: ClipIndex | None,
) -> Receipt | None:
    """The receipt of a block, if it is sound; its shards are looked for and their sizes compared."""
    group = record.identity.group_name
    key, receipt = receipt_key(kind, group, block), None
    with findings.reading(key):
        receipt = read_receipt(objects, kind, group, block, block_rows)
        rows = rows_of(block, block_rows)
        used = [row for row, outcome in zip(rows, receipt.rows, strict=True) if outcome.state != "empty"]
        if index is not None and used != index.rows_between(kind, rows.start, rows.stop):
            findings.found(key, "speaks of other rows than the clip parts give out")
    for name, entry in receipt.shards.items() if receipt else ():
        shard = shard_key(kind, group, name, block)
        with findings.reading(shard):
            if objects.size(shard) != entry["bytes"]:
                findings.found(shard, f"has {objects.size(shard)} bytes, its receipt says {entry['bytes']}")
    return receipt


def check_shards(
    findings: Findings,
    objects: Objects,
    receipt: Receipt,
    specs: Mapping[str, ArraySpec],
    removed: Collection[int] = (),
) -> None:
    """Every byte of a block's shards against its receipt; rows of `removed` clips must hold nothing."""
    shards: dict[str, Shard] = {}
    for name, spec in specs.items():
        key = shard_key(receipt.kind, receipt.group, name, receipt.block)
        with findings.reading(key):
            entry = receipt.shards.get(name)
            if entry is None or objects.size(key) != entry["bytes"] or _sha256(objects, key) != entry["sha256"]:
                findings.found(key, "does not match its receipt's sha256")
                continue
            shards[name] = Shard(spec, objects.open(key))
    if set(shards) == set(receipt.shards):  # digests are over all arrays together
        with findings.reading(shard_key(receipt.kind, receipt.group, "tokens", receipt.block)):
            _check_rows(findings, receipt, shards)
            _check_removed(findings, receipt, shards, removed)
    for shard in shards.values():
        shard.close()


def check_orphan(findings: Findings, objects: Objects, key: str, spec: ArraySpec | None) -> None:
    """A shard without a receipt: every chunk and the index have a checksum, and together they are all of it."""
    with findings.reading(key):
        if spec is None:
            return
        shard = Shard(spec, objects.open(key))
        length = spec.index_bytes
        for row in shard.rows():
            chunk = shard.chunk(row)
            length += len(chunk) if chunk is not None else 0
            shard.decode(row)
        if length != objects.size(key):
            findings.found(key, f"holds {objects.size(key) - length} bytes that belong to no row")
        shard.close()


def _check_rows(findings: Findings, receipt: Receipt, shards: Mapping[str, Shard]) -> None:
    key = receipt_key(receipt.kind, receipt.group, receipt.block)
    for place, outcome in enumerate(receipt.rows):
        if outcome.state != "ok":
            continue
        stored = {name: shard.decode(place) for name, shard in shards.items()}
        if any(array is None for array in stored.values()) or row_digest(stored) != outcome.digest:
            findings.found(key, f"row {receipt.first_row() + place} has another digest than its shards' bytes")


def _check_removed(findings: Findings, receipt: Receipt, shards: Mapping[str, Shard], removed: Collection[int]) -> None:
    for name, shard in shards.items():
        for row in set(shard.rows()) & {row - receipt.first_row() for row in removed}:
            findings.found(
                shard_key(receipt.kind, receipt.group, name, receipt.block),
                f"still holds row {receipt.first_row() + row}, whose clip was removed on request",
            )


def _sha256(objects: Objects, key: str) -> str:
    opened = objects.open(key)
    total, buffer, offset = hashlib.sha256(), bytearray(max(CRC_BYTES, min(_PIECE_BYTES, opened.size))), 0
    while count := opened.read_into(offset, [memoryview(buffer)]):
        total.update(memoryview(buffer)[:count])
        offset += count
    opened.close()
    return total.hexdigest()


def check_reference_clips(
    findings: Findings,
    objects: Objects,
    identities: Mapping[tuple[str, str], FeatureIdentity],
    newest: Snapshot | None,
    *,
    is_full: bool,
) -> None:
    """Damaged or lost canaries of the store's groups; those of a group that it has not are told as strays elsewhere."""
    named = dict(newest.canaries) if newest else {}
    for kind in KINDS:
        for group in reference_clip_groups(objects.list_names(f"{CANARIES}/{kind}")):
            sha256 = named.pop(f"{kind}/{group}", None)
            if identity := identities.get((kind, group)):
                _check(findings, objects, kind, identity, sha256, is_full)
    for name in named:
        findings.found(reference_clip_key(*name.split("/")), "is missing though the newest snapshot names it")


def _check(
    findings: Findings, objects: Objects, kind: str, identity: FeatureIdentity, sha256: str | None, is_full: bool
) -> None:
    key = reference_clip_key(kind, identity.group_name)
    with findings.reading(key):
        if not is_full:
            objects.size(key)
            return
        data = get_bounded(objects, key, max_reference_clip_bytes(kind, identity))
        ReferenceClips.parse(data, kind, identity)
        if sha256 is not None and sha256_hex(data) != sha256:
            findings.found(key, "does not match the digest that its snapshot holds")


Specs = Mapping[tuple[str, str], Mapping[str, ArraySpec]]  # (kind, group) -> its arrays
_BESIDE = (CARD, LISTING)  # for people and web servers; made anew by every push


def find_strays(findings: Findings, objects: Objects, specs: Specs, *, is_full: bool) -> None:
    """Temporary files of runs that were killed, shards without a receipt, and names that no store has."""
    for name in objects.abandoned():
        if objects.list_names(f"{TEMPORARY}/{name}"):
            findings.stray(
                f"{TEMPORARY}/{name}", "was left by an interrupted run", "the next extract sweeps it; or delete it"
            )
    for key in objects.non_regular_files() if hasattr(objects, "non_regular_files") else ():
        findings.found(key, "is a link or device; a store holds plain files", "put the file in its place, or delete it")
    for key in sorted(objects.list_tree()):
        if key in findings.looked_at or key in _BESIDE or key.split("/")[0] == TEMPORARY:
            continue
        if place := shard_place(key):
            kind, group, array, _ = place
            findings.stray(
                key,
                "is a shard without a receipt: a block in the making, or left by a killed worker",
                "run the same extract again: it makes the block's receipt",
            )
            if is_full:
                check_orphan(findings, objects, key, specs.get((kind, group), {}).get(array))
        elif key.startswith(f"{SNAPSHOTS}/") and key.endswith(".parquet"):
            findings.stray(key, "is the table of a snapshot that was never finished", "delete it")
        else:
            findings.stray(key, "is no file of a feature store", "delete it, or keep it elsewhere")


Level = Literal["quick", "full"]
LEVELS: tuple[Level, ...] = ("quick", "full")
WORKERS = 2  # blocks checked at once: hashing and decompressing leave the interpreter
_EMPTY_GROUP = document_bytes({"zarr_format": 3, "node_type": "group", "attributes": {}})


def verify_store(
    path: Place,
    level: Level = "quick",
    *,
    workers: int = WORKERS,
    progress: ProgressLine = SILENT,
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

    def __init__(self, objects: Objects, *, is_full: bool, workers: int = 1, progress: ProgressLine = SILENT) -> None:
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
        check_reference_clips(self.findings, self.objects, self.identities, self.newest, is_full=self.is_full)
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

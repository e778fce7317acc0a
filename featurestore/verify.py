"""Verification: does the store keep its promises, byte by byte?

Every file is covered by something: a shard by its receipt, a receipt and a journal by their own digest, clip parts,
samples and receipts by a snapshot, a snapshot by its own digest, a zarr.json by being made again. "quick" reads the
metadata and looks at names and sizes; "full" reads every byte. Nothing here raises for what it finds.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Literal

from featurestore.clips import KINDS
from featurestore.errors import MervCacheError, StoreNotFoundError, UserError
from featurestore.findings import Finding, Findings
from featurestore.groups import GroupRecord, read_group
from featurestore.journal import parse_journal
from featurestore.layout import (
    GROUP_NAME,
    JOURNAL,
    PARTS,
    RECEIPTS,
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
    samples_key,
    samples_versions,
    sealed_blocks,
    shard_key,
    snapshot_ids,
    snapshot_keys,
)
from featurestore.local_objects import LocalObjects
from featurestore.metadata import (
    ArraySpec,
    array_specs,
    document_bytes,
    group_document,
    parse_array,
    parse_root,
    root_document,
)
from featurestore.parts import ClipIndex
from featurestore.snapshots import Snapshot, load_snapshot
from featurestore.verify_blocks import check_receipt, check_shards

Level = Literal["quick", "full"]
LEVELS: tuple[Level, ...] = ("quick", "full")
_EMPTY_GROUP = document_bytes({"zarr_format": 3, "node_type": "group", "attributes": {}})


def verify_store(path: str | Path, level: Level = "quick") -> list[Finding]:
    """Everything that is damaged, missing or out of place; an empty list is a sound store."""
    if level not in LEVELS:
        raise UserError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    objects = LocalObjects(path)
    if not objects.exists(ROOT_METADATA):
        raise StoreNotFoundError(f"there is no feature store at {path}; give the folder that holds its zarr.json")
    check = _Verification(objects, is_full=level == "full")
    check.run()
    return check.findings.sorted()


class _Verification:
    """One pass over a store; collects findings."""

    def __init__(self, objects: LocalObjects, *, is_full: bool) -> None:
        self.objects = objects
        self.is_full = is_full
        self.findings = Findings()
        self.index: ClipIndex | None = None
        self.block_rows: dict[str, int] = {}
        self.newest: Snapshot | None = None

    def run(self) -> None:
        self._snapshots()
        self._clip_parts()
        self._samples()
        self._root()
        for kind in KINDS:
            self._kind(kind)
        self._named_receipts()
        self._journal()
        self._strays()

    def _snapshots(self) -> None:
        self.digests: dict[str, str] = {}  # sha256 of parts and samples, by key, as any snapshot says
        for snapshot_id in snapshot_ids(self.objects.list_names(SNAPSHOTS)):
            table_key, record_key = snapshot_keys(snapshot_id)
            with self.findings.reading(record_key):
                snapshot = load_snapshot(self.objects, snapshot_id)
                self.newest = snapshot
                self.digests |= snapshot.parts | {entry["key"]: entry["sha256"] for entry in snapshot.samples.values()}
                self._digest(table_key, snapshot.table_sha256)

    def _digest(self, key: str, sha256: str, *, read: bool = True) -> None:
        with self.findings.reading(key):
            if not read:
                self.objects.size(key)  # at least it is there
            elif hashlib.sha256(self.objects.get(key)).hexdigest() != sha256:
                self.findings.found(key, "does not match the digest that its snapshot holds")

    def _clip_parts(self) -> None:
        with self.findings.reading(PARTS):
            for number in part_numbers(self.objects.list_names(PARTS)):
                self.findings.looked_at.add(part_key(number))
            self.index = ClipIndex(self.objects, {}).refresh()  # asked for rows only, never for blocks
        for key, sha256 in self.digests.items():
            self._digest(key, sha256, read=self.is_full)
        for key in self.newest.parts if self.newest else ():
            if key not in self.findings.looked_at:
                self.findings.found(key, "is missing though the newest snapshot names it")

    def _samples(self) -> None:
        for name, newest in samples_versions(self.objects.list_names(SAMPLES)).items():
            for version in range(1, newest + 1):
                key = samples_key(name, version)
                with self.findings.reading(key):
                    self.objects.size(key)

    def _root(self) -> None:
        with self.findings.reading(ROOT_METADATA):
            data = self.objects.get(ROOT_METADATA)
            root = parse_root(data)
            self.block_rows = root["block_rows"]
            if self.newest and self.block_rows != self.newest.block_rows:
                self.findings.found(ROOT_METADATA, "names other block rows than the newest snapshot")
                self.block_rows = dict(self.newest.block_rows)
            if self.index and data != root_document(datasets=self.index.datasets(), block_rows=self.block_rows):
                self.findings.found(ROOT_METADATA, "is not what the clip parts make it")

    def _kind(self, kind: str) -> None:
        groups = [name for name in self.objects.list_names(kind) if GROUP_NAME.fullmatch(name)]
        if groups:
            self._same(f"{kind}/zarr.json", _EMPTY_GROUP, "is not the document of a plain group")
        named = {name.split("/")[1] for name in self.newest.groups if name.startswith(kind)} if self.newest else set()
        for group in sorted(named | set(groups)):
            self._group(kind, group)

    def _same(self, key: str, wanted: bytes, problem: str) -> None:
        with self.findings.reading(key):
            if self.objects.get(key) != wanted:
                self.findings.found(key, problem)

    def _group(self, kind: str, group: str) -> None:
        key = group_metadata_key(kind, group)
        record = None
        with self.findings.reading(key):
            record = read_group(self.objects, kind, group)
            wanted = group_document(record.identity, weights_label=record.weights, batch_shape=record.batch_shape)
            if self.objects.get(key) != wanted:
                self.findings.found(key, "is not the document that its own contents make")
            summary = self.newest.groups.get(f"{kind}/{group}") if self.newest else None
            if summary and (summary.weights, summary.batch_shape) != (record.weights, record.batch_shape):
                self.findings.found(key, "names other weights or another batch shape than the newest snapshot")
        if record is None or kind not in self.block_rows:
            return
        specs = self._arrays(kind, record)
        for block in sorted(receipt_blocks(self.objects.list_names(receipts_prefix(kind, group)))):
            receipt = check_receipt(self.findings, self.objects, kind, record, block, self.block_rows[kind], self.index)
            if receipt and specs and self.is_full:
                check_shards(self.findings, self.objects, receipt, specs)

    def _arrays(self, kind: str, record: GroupRecord) -> dict[str, ArraySpec]:
        block_rows, identity = self.block_rows[kind], record.identity
        specs: dict[str, ArraySpec] = {}
        for name, derived in array_specs(identity, kind, blocks=0, block_rows=block_rows).items():
            key = array_metadata_key(kind, identity.group_name, name)
            with self.findings.reading(key):
                data = self.objects.get(key)
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
            for block, digest in summary.receipts.items():
                key = receipt_key(kind, group, int(block))
                with self.findings.reading(key):
                    if f'"digest":"{digest}"'.encode() not in self.objects.get(key):
                        self.findings.found(key, "is not the receipt that the newest snapshot names")

    def _journal(self) -> None:
        for name in journal_names(self.objects.list_names(JOURNAL)):
            key = journal_key(name)
            with self.findings.reading(key):
                parse_journal(self.objects.get(key), name)

    def _strays(self) -> None:
        for name in self.objects.abandoned():
            if self.objects.list_names(f"{TEMPORARY}/{name}"):
                self.findings.found(f"{TEMPORARY}/{name}", "was left by an interrupted run; the next extract sweeps it")
        root = Path(self.objects.root)
        for folder in ("", PARTS, SAMPLES, SNAPSHOTS, JOURNAL):
            for name in self.objects.list_names(folder):
                key = f"{folder}/{name}" if folder else name
                if (root / key).is_file() and key not in self.findings.looked_at:
                    self.findings.found(key, "is no file of a feature store")
        for top in (*KINDS, RECEIPTS):
            for path in sorted((root / top).rglob("*")):
                key = path.relative_to(root).as_posix()
                if path.is_file() and key not in self.findings.looked_at and not self._is_block_file(key):
                    self.findings.found(key, "is no file of a feature store")

    def _is_block_file(self, key: str) -> bool:
        """Shards without a receipt belong to a block in the making."""
        parts = key.split("/")
        if len(parts) < 5 or parts[0] not in KINDS or parts[3] != "c" or not parts[4].isdigit():
            return False
        try:
            return key == shard_key(parts[0], parts[1], parts[2], int(parts[4]))
        except (MervCacheError, KeyError):
            return False


def _like(derived: ArraySpec, stored: ArraySpec) -> ArraySpec:
    """The derived spec with what it cannot know: codec and rows."""
    return replace(derived, codec=stored.codec, rows=stored.rows)

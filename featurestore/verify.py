"""Verification: does the store keep its promises, byte by byte?

Every file is covered by something: a shard by its receipt, a receipt and a journal by their own digest, clip parts,
samples and receipts by a snapshot, a snapshot by its own digest, a zarr.json by being made again. "quick" reads the
metadata and looks at names and sizes; "full" reads every byte. Nothing here raises for what it finds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa

from featurestore.clips import KINDS
from featurestore.errors import MervCacheError, StoreNotFoundError, UserError
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
    rows_of,
    samples_key,
    samples_versions,
    sealed_blocks,
    shard_key,
    snapshot_ids,
    snapshot_keys,
)
from featurestore.metadata import (
    ArraySpec,
    array_specs,
    document_bytes,
    group_document,
    parse_array,
    parse_root,
    root_document,
)
from featurestore.objects import LocalObjects
from featurestore.parts import ClipIndex
from featurestore.receipts import Receipt, row_digest
from featurestore.shards import Shard
from featurestore.snapshots import Snapshot, load_snapshot

Level = Literal["quick", "full"]
LEVELS: tuple[Level, ...] = ("quick", "full")
_EMPTY_GROUP = document_bytes({"zarr_format": 3, "node_type": "group", "attributes": {}})


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be."""

    key: str  # the object, relative to the store
    problem: str  # what is wrong with it


def verify_store(path: str | Path, level: Level = "quick") -> list[Finding]:
    """Everything that is damaged, missing or out of place; an empty list is a sound store."""
    if level not in LEVELS:
        raise UserError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    objects = LocalObjects(path)
    if not objects.exists(ROOT_METADATA):
        raise StoreNotFoundError(f"there is no feature store at {path}; give the folder that holds its zarr.json")
    check = _Verification(objects, is_full=level == "full")
    check.run()
    return sorted(set(check.findings), key=lambda finding: (finding.key, finding.problem))


class _Verification:
    """One pass over a store; collects findings."""

    def __init__(self, objects: LocalObjects, *, is_full: bool) -> None:
        self.objects = objects
        self.is_full = is_full
        self.findings: list[Finding] = []
        self.expected: set[str] = {ROOT_METADATA}  # keys that belong to the store
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

    def found(self, key: str, problem: str) -> None:
        self.findings.append(Finding(key, problem))

    @contextmanager
    def reading(self, key: str) -> Iterator[None]:
        """Turn what an object does to its reader into a finding; belongs to the store from now on."""
        self.expected.add(key)
        try:
            yield
        except FileNotFoundError:
            self.found(key, "is missing")
        except (MervCacheError, OSError, pa.ArrowException) as error:
            self.found(key, str(error))

    def _snapshots(self) -> None:
        self.digests: dict[str, str] = {}  # sha256 of parts and samples, by key, as any snapshot says
        for snapshot_id in snapshot_ids(self.objects.list_names(SNAPSHOTS)):
            table_key, record_key = snapshot_keys(snapshot_id)
            with self.reading(record_key):
                snapshot = load_snapshot(self.objects, snapshot_id)
                self.newest = snapshot
                self.digests |= snapshot.parts | {entry["key"]: entry["sha256"] for entry in snapshot.samples.values()}
                self._digest(table_key, snapshot.table_sha256)

    def _digest(self, key: str, sha256: str) -> None:
        with self.reading(key):
            if hashlib.sha256(self.objects.get(key)).hexdigest() != sha256:
                self.found(key, "does not match the digest that its snapshot holds")

    def _clip_parts(self) -> None:
        with self.reading(PARTS):
            for number in part_numbers(self.objects.list_names(PARTS)):
                self.expected.add(part_key(number))
            self.index = ClipIndex(self.objects).refresh()
        if self.is_full:
            for key, sha256 in self.digests.items():
                self._digest(key, sha256)
        for key in self.newest.parts if self.newest else ():
            if key not in self.expected:
                self.found(key, "is missing though the newest snapshot names it")

    def _samples(self) -> None:
        for name, newest in samples_versions(self.objects.list_names(SAMPLES)).items():
            for version in range(1, newest + 1):
                key = samples_key(name, version)
                with self.reading(key):
                    self.objects.size(key)

    def _root(self) -> None:
        with self.reading(ROOT_METADATA):
            data = self.objects.get(ROOT_METADATA)
            root = parse_root(data)
            self.block_rows = root["block_rows"]
            if self.newest and self.block_rows != self.newest.block_rows:
                self.found(ROOT_METADATA, "names other block rows than the newest snapshot")
                self.block_rows = dict(self.newest.block_rows)
            if self.index and data != root_document(datasets=self.index.datasets(), block_rows=self.block_rows):
                self.found(ROOT_METADATA, "is not what the clip parts make it")

    def _kind(self, kind: str) -> None:
        groups = [name for name in self.objects.list_names(kind) if GROUP_NAME.fullmatch(name)]
        if groups:
            self._same(f"{kind}/zarr.json", _EMPTY_GROUP, "is not the document of a plain group")
        named = {name.split("/")[1] for name in self.newest.groups if name.startswith(kind)} if self.newest else set()
        for group in sorted(named | set(groups)):
            self._group(kind, group)

    def _same(self, key: str, wanted: bytes, problem: str) -> None:
        with self.reading(key):
            if self.objects.get(key) != wanted:
                self.found(key, problem)

    def _group(self, kind: str, group: str) -> None:
        key = group_metadata_key(kind, group)
        record = None
        with self.reading(key):
            record = read_group(self.objects, kind, group)
            wanted = group_document(record.identity, weights_label=record.weights, batch_shape=record.batch_shape)
            if self.objects.get(key) != wanted:
                self.found(key, "is not the document that its own contents make")
            summary = self.newest.groups.get(f"{kind}/{group}") if self.newest else None
            if summary and (summary.weights, summary.batch_shape) != (record.weights, record.batch_shape):
                self.found(key, "names other weights or another batch shape than the newest snapshot")
        if record is None or kind not in self.block_rows:
            return
        specs = self._arrays(kind, record)
        for block in sorted(receipt_blocks(self.objects.list_names(receipts_prefix(kind, group)))):
            self._block(kind, group, block, specs)

    def _arrays(self, kind: str, record: GroupRecord) -> dict[str, ArraySpec]:
        block_rows, identity = self.block_rows[kind], record.identity
        specs: dict[str, ArraySpec] = {}
        for name, derived in array_specs(identity, kind, blocks=0, block_rows=block_rows).items():
            key = array_metadata_key(kind, identity.group_name, name)
            with self.reading(key):
                data = self.objects.get(key)
                stored = parse_array(name, data)
                allowed = self._row_counts(kind)
                if stored is None:
                    self.found(key, "does not describe an array of this format")
                elif stored.document() != data or stored != _like(derived, stored):
                    self.found(key, "is not the document that its identity makes")
                elif allowed and stored.rows not in allowed:
                    self.found(key, f"has {stored.rows} rows, the clip parts make it {max(allowed)}")
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

    def _block(self, kind: str, group: str, block: int, specs: dict[str, ArraySpec]) -> None:
        key, receipt = receipt_key(kind, group, block), None
        with self.reading(key):
            size = self.block_rows[kind]
            data = self.objects.get(key)
            receipt = Receipt.parse(data, kind=kind, group=group, block=block, block_rows=size)
            rows = rows_of(block, size)
            planned = self.index.rows_between(kind, rows.start, rows.stop) if self.index else None
            used = [row for row, outcome in zip(rows, receipt.rows, strict=True) if outcome.state != "empty"]
            if planned is not None and used != planned:
                self.found(key, "speaks of other rows than the clip parts give out")
        if receipt is None:
            return
        for name, record in receipt.shards.items():
            shard = shard_key(kind, group, name, block)
            with self.reading(shard):
                if self.objects.size(shard) != record["bytes"]:
                    self.found(shard, f"has {self.objects.size(shard)} bytes, its receipt says {record['bytes']}")
        if self.is_full and set(specs) == set(receipt.shards):
            self._shards(kind, receipt, specs)

    def _shards(self, kind: str, receipt: Receipt, specs: dict[str, ArraySpec]) -> None:
        shards: dict[str, Shard] = {}
        for name, spec in specs.items():
            key = shard_key(kind, receipt.group, name, receipt.block)
            with self.reading(key):
                if _sha256(self.objects, key) != receipt.shards[name]["sha256"]:
                    self.found(key, "does not match its receipt's sha256")
                    continue
                shards[name] = Shard(spec, self.objects.open(key))
        if len(shards) == len(specs):
            with self.reading(shard_key(kind, receipt.group, "tokens", receipt.block)):
                self._row_digests(kind, receipt, shards)
        for shard in shards.values():
            shard.close()

    def _row_digests(self, kind: str, receipt: Receipt, shards: dict[str, Shard]) -> None:
        key = receipt_key(kind, receipt.group, receipt.block)
        for place, outcome in enumerate(receipt.rows):
            if outcome.state != "ok":
                continue
            stored = {name: shard.decode(place) for name, shard in shards.items()}
            if any(array is None for array in stored.values()) or row_digest(stored) != outcome.digest:
                self.found(key, f"row {receipt.first_row() + place} has another digest than its shards' bytes")

    def _named_receipts(self) -> None:
        """Receipts that the newest snapshot names must be there, and be those."""
        for name, summary in self.newest.groups.items() if self.newest else ():
            kind, group = name.split("/")
            for block, digest in summary.receipts.items():
                key = receipt_key(kind, group, int(block))
                with self.reading(key):
                    if f'"digest":"{digest}"'.encode() not in self.objects.get(key):
                        self.found(key, "is not the receipt that the newest snapshot names")

    def _journal(self) -> None:
        for name in journal_names(self.objects.list_names(JOURNAL)):
            key = journal_key(name)
            with self.reading(key):
                parse_journal(self.objects.get(key), name)

    def _strays(self) -> None:
        for name in self.objects.abandoned():
            if self.objects.list_names(f"{TEMPORARY}/{name}"):
                self.found(f"{TEMPORARY}/{name}", "was left by an interrupted run; the next extract sweeps it")
        root = Path(self.objects.root)
        for folder in ("", PARTS, SAMPLES, SNAPSHOTS, JOURNAL):
            for name in self.objects.list_names(folder):
                key = f"{folder}/{name}" if folder else name
                if (root / key).is_file() and key not in self.expected:
                    self.found(key, "is no file of a feature store")
        for top in (*KINDS, RECEIPTS):
            for path in sorted((root / top).rglob("*")):
                key = path.relative_to(root).as_posix()
                if path.is_file() and key not in self.expected and not self._is_block_file(key):
                    self.found(key, "is no file of a feature store")

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


def _sha256(objects: LocalObjects, key: str) -> str:
    opened = objects.open(key)
    total, buffer, offset = hashlib.sha256(), bytearray(8 << 20), 0
    while count := opened.read_into(offset, [memoryview(buffer)]):
        total.update(memoryview(buffer)[:count])
        offset += count
    opened.close()
    return total.hexdigest()

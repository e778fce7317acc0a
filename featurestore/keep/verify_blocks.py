"""Verification of one block: the receipt by its own digest, shards by the receipt, rows by their digests.

A shard without a receipt is a block in the making, or what a killed worker left: each of its rows has a checksum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from featurestore.groups import GroupRecord
from featurestore.keep.findings import Findings
from featurestore.layout import receipt_key, rows_of, shard_key
from featurestore.metadata import ArraySpec
from featurestore.parts import ClipIndex
from featurestore.places.objects import Objects
from featurestore.receipts import Receipt, read_receipt, row_digest
from featurestore.shards import CRC_BYTES, Shard

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

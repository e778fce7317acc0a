"""Verification of one block: the receipt by its own digest, shards by the receipt, rows by their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from featurestore.findings import Findings
from featurestore.groups import GroupRecord
from featurestore.layout import receipt_key, rows_of, shard_key
from featurestore.metadata import ArraySpec
from featurestore.objects import Objects
from featurestore.parts import ClipIndex
from featurestore.receipts import Receipt, row_digest
from featurestore.shards import Shard

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
        receipt = Receipt.parse(objects.get(key), kind=kind, group=group, block=block, block_rows=block_rows)
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


def check_shards(findings: Findings, objects: Objects, receipt: Receipt, specs: Mapping[str, ArraySpec]) -> None:
    """Every byte of a block's shards against its receipt."""
    shards: dict[str, Shard] = {}
    for name, spec in specs.items():
        key = shard_key(receipt.kind, receipt.group, name, receipt.block)
        with findings.reading(key):
            if name not in receipt.shards or _sha256(objects, key) != receipt.shards[name]["sha256"]:
                findings.found(key, "does not match its receipt's sha256")
                continue
            shards[name] = Shard(spec, objects.open(key))
    if set(shards) == set(receipt.shards):  # digests are over all arrays together
        with findings.reading(shard_key(receipt.kind, receipt.group, "tokens", receipt.block)):
            _check_rows(findings, receipt, shards)
    for shard in shards.values():
        shard.close()


def _check_rows(findings: Findings, receipt: Receipt, shards: Mapping[str, Shard]) -> None:
    key = receipt_key(receipt.kind, receipt.group, receipt.block)
    for place, outcome in enumerate(receipt.rows):
        if outcome.state != "ok":
            continue
        stored = {name: shard.decode(place) for name, shard in shards.items()}
        if any(array is None for array in stored.values()) or row_digest(stored) != outcome.digest:
            findings.found(key, f"row {receipt.first_row() + place} has another digest than its shards' bytes")


def _sha256(objects: Objects, key: str) -> str:
    opened = objects.open(key)
    total, buffer, offset = hashlib.sha256(), bytearray(min(_PIECE_BYTES, opened.size or 1)), 0
    while count := opened.read_into(offset, [memoryview(buffer)]):
        total.update(memoryview(buffer)[:count])
        offset += count
    opened.close()
    return total.hexdigest()

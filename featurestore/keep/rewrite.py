"""Putting other bytes in the place of a committed block: what only `repair` and `tombstone` may do.

Shards first, each replaced whole and in one step, the receipt last and numbered: it names the one before. Chunks that
stay are kept as they are, so doing it again after a kill gives the same bytes, whatever was done already.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from featurestore.errors import StoreDamagedError
from featurestore.groups import GroupWriter
from featurestore.layout import receipt_key, shard_key, slot_of
from featurestore.metadata import ArraySpec
from featurestore.places.objects import Objects
from featurestore.receipts import Receipt, RowOutcome, row_digest
from featurestore.shards import Shard, build_shard


def erase_rows(group: GroupWriter, block: int, rows: Collection[int]) -> bool:
    """Take rows out of a block's shards and its receipt; False if they were not there.

    The rows of other clips must be whole: damage is never put under a new receipt.
    """
    receipt = group.receipt(block) if block in group.committed_blocks() else None
    shards = open_shards(group.objects, group.kind, group.name, block, group.specs)
    places = {slot_of(row, group.block_rows) for row in rows}
    try:
        is_in_shard = {name: bool(places & set(shard.rows())) for name, shard in shards.items()}
        skipped = receipt is None or all(receipt.rows[place].state in ("skipped", "empty") for place in places)
        if skipped and not any(is_in_shard.values()):
            return False
        if receipt is not None:
            _check_others(receipt, shards, places)
        pieces = {name: _without(shard, places) for name, shard in shards.items() if is_in_shard[name]}
    finally:
        for shard in shards.values():
            shard.close()
    for name, data in pieces.items():
        group.objects.replace(shard_key(group.kind, group.name, name, block), data)
    if receipt is not None:
        outcomes = [
            RowOutcome(state="skipped") if place in places and outcome.state != "empty" else outcome
            for place, outcome in enumerate(receipt.rows)
        ]
        put_numbered(group.objects, replace(receipt, rows=tuple(outcomes)), receipt, group.specs)
    return True


def put_numbered(objects: Objects, receipt: Receipt, before: Receipt, specs: Mapping[str, ArraySpec]) -> Receipt:
    """Replace a block's receipt by one of what the shards on disk hold."""
    shards = open_shards(objects, receipt.kind, receipt.group, receipt.block, specs)
    numbered = replace(
        receipt,
        shards={name: shard.record() for name, shard in shards.items()},
        number=before.number + 1,
        replaces=before.digest,
    )
    for shard in shards.values():
        shard.close()
    objects.replace(receipt_key(receipt.kind, receipt.group, receipt.block), numbered.to_bytes())
    return numbered


def open_shards(
    objects: Objects, kind: str, group: str, block: int, specs: Mapping[str, ArraySpec]
) -> dict[str, Shard]:
    """A block's shards that are there."""
    keys = {name: shard_key(kind, group, name, block) for name in specs}
    return {name: Shard(specs[name], objects.open(key)) for name, key in keys.items() if objects.exists(key)}


def _without(shard: Shard, places: Collection[int]) -> bytes:
    kept = {place: shard.chunk(place) for place in shard.rows() if place not in places}
    return b"".join(
        build_shard(shard.spec, {place: chunk.tobytes() for place, chunk in kept.items() if chunk is not None})
    )


def _check_others(receipt: Receipt, shards: Mapping[str, Shard], places: Collection[int]) -> None:
    for place, outcome in enumerate(receipt.rows):
        if outcome.state != "ok" or place in places:
            continue
        stored = {name: shard.decode(place) for name, shard in shards.items()}
        whole = set(stored) == set(receipt.shards) and all(array is not None for array in stored.values())
        if not whole or row_digest(stored) != outcome.digest:
            raise StoreDamagedError(
                f"block {receipt.block} of {receipt.kind}/{receipt.group} is damaged at row "
                f"{receipt.first_row() + place}: run `merv-pipeline repair` first, then the same command again"
            )

"""A receipt that is lost, made again from the shards and from what the newest snapshot knows of their rows.

Media digests and decoders stand in receipts only, so the new one has none and a number that says it replaced another.
Rows are taken over only where the shards have the digests that the snapshot names.
"""

from __future__ import annotations

from featurestore.errors import StoreFormatError
from featurestore.groups import GroupWriter
from featurestore.keep.repair_shards import Repaired
from featurestore.keep.rewrite import open_shards
from featurestore.keep.verify import Verification
from featurestore.layout import receipt_key, rows_of
from featurestore.places.objects import Objects
from featurestore.receipts import Receipt, RowOutcome, row_digest
from featurestore.shards import Shard
from featurestore.snapshot_table import column
from featurestore.snapshots import Snapshot, read_snapshot_table

_COLUMNS = ("row", "digest", "failed_row", "failed_scope", "failed_reason")


def rebuild_receipt(group: GroupWriter, block: int, named: str, check: Verification) -> Repaired:
    """Put a new receipt in the place of the one with digest `named`."""
    rows = rows_of(block, group.block_rows)
    assert check.newest is not None
    known = _rows_known(group.objects, check.newest, group.kind, group.name, rows)
    planned = set(check.index.rows_between(group.kind, rows.start, rows.stop)) if check.index else set()
    shards = open_shards(group.objects, group.kind, group.name, block, group.specs)
    if set(shards) != set(group.specs):
        raise StoreFormatError("shards of the block are missing as well; give a copy with --from")
    outcomes = [
        _outcome(row, place, shards, known) if row in planned else RowOutcome(state="empty")
        for place, row in enumerate(rows)
    ]
    receipt = Receipt(
        kind=group.kind,
        group=group.name,
        block=block,
        rows=tuple(outcomes),
        shards={name: shard.record() for name, shard in shards.items()},
        number=2,
        replaces=named,
    )
    for shard in shards.values():
        shard.close()
    key = receipt_key(group.kind, group.name, block)
    group.objects.replace(key, receipt.to_bytes())
    words = "made again from the shards and the snapshot, number 2; media digests and decoders are lost"
    return Repaired(key=key, done=words)


def _outcome(row: int, place: int, shards: dict[str, Shard], known: dict[int, RowOutcome]) -> RowOutcome:
    stored = {name: shard.decode(place) for name, shard in shards.items()}
    is_whole = all(array is not None for array in stored.values())
    if row in known and known[row].state == "failed" and not is_whole:
        return known[row]
    if not is_whole:
        if row in known:
            raise StoreFormatError(f"the shards lack row {row}, which the snapshot knows")
        return RowOutcome(state="skipped")
    digest = row_digest(stored)
    if row in known and known[row].digest != digest:
        raise StoreFormatError(f"row {row} in the shards is not the one that the snapshot knows")
    return RowOutcome(state="ok", digest=digest)


def _rows_known(objects: Objects, snapshot: Snapshot, kind: str, group: str, rows: range) -> dict[int, RowOutcome]:
    """What a snapshot says of a block's rows: digests of the newest good ones, reasons of the newest failures."""
    names = ["kind", *(column(group, suffix) for suffix in _COLUMNS)]
    known: dict[int, RowOutcome] = {}
    for entry in read_snapshot_table(objects, snapshot, names).to_pylist():
        of_kind, row, digest, failed_row, scope, reason = (entry[name] for name in names)
        if of_kind == kind and failed_row in rows:
            known[failed_row] = RowOutcome(state="failed", scope=scope, reason=reason)
        if of_kind == kind and row in rows:
            known[row] = RowOutcome(state="ok", digest=digest)
    return known

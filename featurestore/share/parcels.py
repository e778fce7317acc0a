"""Parcels: which blocks of a store a transfer has to bring, and what covers them.

Comes in: a pinned snapshot and a selection. Goes out: one parcel per block, its receipt read and checked against the
snapshot, so that every shard's sha256 is known before a byte of it is sent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

from featurestore.columns import CLIP_SCHEMA, table_to_clips
from featurestore.digests import sha256_hex
from featurestore.errors import StoreDamagedError
from featurestore.layout import block_of, receipt_key, shard_key
from featurestore.lookup import encoder_keys
from featurestore.parquet import MAX_TABLE_BYTES
from featurestore.parts import read_table
from featurestore.places.by_url import in_parallel
from featurestore.places.objects import Objects, get_bounded
from featurestore.receipts import Receipt, max_receipt_bytes
from featurestore.share.selection import Selection
from featurestore.snapshots import Snapshot


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """One block of one group: its shards, and the receipt that covers them."""

    kind: str
    group: str
    block: int
    block_rows: int
    number: int  # of the receipt: repair and tombstone replace a block
    receipt_sha256: str  # of the receipt's own bytes
    shards: Mapping[str, Mapping[str, int | str]]  # key -> {"sha256", "bytes"}
    rows: int  # committed rows
    rows_asked: int  # of them, rows of the clips asked for

    @property
    def num_bytes(self) -> int:
        return sum(int(shard["bytes"]) for shard in self.shards.values())

    def missing_bytes(self, there: Collection[str]) -> int:
        """Bytes of the shards whose keys are not in `there`."""
        return sum(int(shard["bytes"]) for key, shard in self.shards.items() if key not in there)


def parcels_of(origin: Objects, snapshot: Snapshot, selection: Selection) -> list[Parcel]:
    """The blocks to have, every receipt read and checked against the snapshot."""
    keys = encoder_keys(snapshot.groups)
    wanted = set(selection.groups(keys))
    asked = None if selection.takes_all_clips else _rows_asked(origin, snapshot, selection)
    blocks = []
    for name, summary in snapshot.groups.items():
        kind, group = name.split("/")
        for block in sorted(map(int, summary.receipts)) if group in wanted else ():
            mine = None if asked is None else asked.get((kind, block))
            if asked is None or mine:
                blocks.append((kind, group, block, summary.receipts[str(block)], mine))
    read = partial(_parcel, origin, snapshot.block_rows)
    return in_parallel(lambda entry: read(*entry), blocks, origin.parallel_reads)


def _rows_asked(origin: Objects, snapshot: Snapshot, selection: Selection) -> dict[tuple[str, int], set[int]]:
    """(kind, block) -> rows of the clips asked for."""
    tables = [read_table(digested(origin, key, sha256), CLIP_SCHEMA, key) for key, sha256 in snapshot.parts.items()]
    rows = [pair for table in tables for pair in table_to_clips(table)]
    selection.check(clip for _, clip in rows)
    asked: dict[tuple[str, int], set[int]] = {}
    for row, clip in rows:
        if selection.takes(clip):
            asked.setdefault((clip.kind, block_of(row, snapshot.block_rows[clip.kind])), set()).add(row)
    return asked


def _parcel(
    origin: Objects,
    block_rows: Mapping[str, int],
    kind: str,
    group: str,
    block: int,
    digest: str,
    asked: set[int] | None,
) -> Parcel:
    key = receipt_key(kind, group, block)
    try:
        data = get_bounded(origin, key, max_receipt_bytes(block_rows[kind]))
    except FileNotFoundError:
        raise StoreDamagedError(f"{key} is missing though the snapshot names it; verify the source") from None
    receipt = Receipt.parse(data, kind=kind, group=group, block=block, block_rows=block_rows[kind])
    if receipt.digest != digest:
        raise StoreDamagedError(f"{key} is not the receipt that the snapshot names; run `merv-pipeline verify`")
    ok = {row for row, outcome in enumerate(receipt.rows, start=receipt.first_row()) if outcome.state == "ok"}
    return Parcel(
        kind=kind,
        group=group,
        block=block,
        block_rows=block_rows[kind],
        number=receipt.number,
        receipt_sha256=sha256_hex(data),
        shards={shard_key(kind, group, name, block): entry for name, entry in receipt.shards.items()},
        rows=len(ok),
        rows_asked=len(ok if asked is None else ok & asked),
    )


def digested(origin: Objects, key: str, sha256: str) -> bytes:
    """The bytes of an object that must have this sha256."""
    data = get_bounded(origin, key, MAX_TABLE_BYTES)
    if sha256_hex(data) != sha256:
        raise StoreDamagedError(f"{key} does not match the snapshot's digest; run `merv-pipeline verify` on the source")
    return data

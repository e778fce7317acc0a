"""Publishing: a snapshot of all that is committed, made from the newest one and the receipts that are new.

Comes in: a store's objects. Goes out: the id of a snapshot that readers open, a new one where there is anything new to
say. Whoever publishes needs no lock: of racing publishers all snapshots stand, and the last one has everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from featurestore.canaries import canary_digest
from featurestore.clips import KINDS
from featurestore.digests import sha256_hex
from featurestore.groups import encoder_groups, read_group
from featurestore.layout import (
    CANARIES,
    PARTS,
    SAMPLES,
    SNAPSHOTS,
    canary_groups,
    part_key,
    part_numbers,
    receipt_blocks,
    receipts_prefix,
    samples_key,
    samples_versions,
    snapshot_ids,
    snapshot_keys,
)
from featurestore.parquet import table_bytes, table_file
from featurestore.parts import ClipIndex
from featurestore.places.objects import Objects, put_if_absent
from featurestore.receipts import STATES, read_receipt
from featurestore.snapshot_table import SnapshotTable
from featurestore.snapshots import GroupSummary, Snapshot, load_snapshot, newest_snapshot_id, read_snapshot_table
from featurestore.tombstones import tombstone_ids


def publish(objects: Objects, block_rows: Mapping[str, int], *, anew: bool = False) -> str:
    """Put a snapshot of all that is committed, if it says anything new; returns the newest snapshot's id.

    Two publishers may race: both snapshots stand, and the slower one publishes again from the newest. `anew` reads
    every receipt, as is done after a removal: receipts that the newest snapshot knows may have been replaced.
    """
    while True:
        newest = newest_snapshot_id(objects)
        parent = load_snapshot(objects, newest) if newest else None
        snapshot, table = _build(objects, block_rows, parent, anew)
        if parent is not None and snapshot.says_the_same_as(parent):
            return parent.id
        table_key, record_key = snapshot_keys(snapshot.id)
        for key, data in ((table_key, table), (record_key, snapshot.to_bytes())):
            put_if_absent(objects, key, data)  # the name holds the digest: who was first put the same bytes
        rivals = [other for other in snapshot_ids(objects.list_names(SNAPSHOTS)) if other >= f"{snapshot.sequence:08d}"]
        if rivals == [snapshot.id]:
            return snapshot.id


def _build(
    objects: Objects, block_rows: Mapping[str, int], parent: Snapshot | None, anew: bool
) -> tuple[Snapshot, bytes]:
    tombstones = tuple(tombstone_ids(objects))
    base = None if anew or (parent and parent.tombstones != tombstones) else parent  # what is taken over unread
    found = {
        f"{kind}/{group}": receipt_blocks(objects.list_names(receipts_prefix(kind, group)))
        for kind in KINDS
        for group in encoder_groups(objects, kind)
    }
    index = ClipIndex(objects, block_rows).refresh()  # after the receipts: every row that they speak of is there
    state = SnapshotTable.extend(read_snapshot_table(objects, base) if base else None, index.table)
    groups: dict[str, GroupSummary] = {}
    for name, blocks in sorted(found.items()):
        old = base.groups.get(name) if base else None
        groups[name] = _extend_group(objects, block_rows, name, blocks, old, state)
    data = table_bytes(state.to_arrow())
    return Snapshot(
        sequence=parent.sequence + 1 if parent else 1,
        parent=parent.id if parent else None,
        parts=_part_digests(objects, len(index.tables), parent),
        samples=_samples_digests(objects, parent),
        groups=groups,
        block_rows=dict(block_rows),
        table_sha256=sha256_hex(data),
        tombstones=tombstones,
        canaries=_canary_digests(objects, groups, base),
    ), data


def _extend_group(
    objects: Objects,
    block_rows: Mapping[str, int],
    name: str,
    blocks: set[int],
    old: GroupSummary | None,
    state: SnapshotTable,
) -> GroupSummary:
    kind, group = name.split("/")
    record = read_group(objects, kind, group)
    old = old or GroupSummary(**vars(record))
    receipts, counts, stored_bytes = dict(old.receipts), dict(old.counts), old.stored_bytes
    for block in sorted(blocks - {int(number) for number in old.receipts}):
        receipt = read_receipt(objects, kind, group, block, block_rows[kind])
        state.apply(receipt)
        receipts[str(block)] = receipt.digest
        counts = {name: counts[name] + receipt.counts[name] for name in STATES}
        stored_bytes += receipt.stored_bytes
    state.ensure_columns(group)
    return replace(old, receipts=receipts, counts=counts, stored_bytes=stored_bytes)


def _part_digests(objects: Objects, count: int, parent: Snapshot | None) -> dict[str, str]:
    known = dict(parent.parts) if parent else {}
    for number in part_numbers(objects.list_names(PARTS))[:count]:
        key = part_key(number)
        if key not in known:
            known[key] = sha256_hex(table_file(objects, key))
    return known


def _canary_digests(objects: Objects, groups: Mapping[str, GroupSummary], base: Snapshot | None) -> dict[str, str]:
    """Canaries that are there and whole; those that `base` knows never change."""
    found: dict[str, str] = {}
    for kind in KINDS:
        present = canary_groups(objects.list_names(f"{CANARIES}/{kind}"))
        for name in (name for name in groups if name.startswith(f"{kind}/") and name.split("/")[1] in present):
            sha256 = base.canaries.get(name) if base else None
            if sha256 := sha256 or canary_digest(objects, kind, groups[name].identity):
                found[name] = sha256
    return found


def _samples_digests(objects: Objects, parent: Snapshot | None) -> dict[str, dict[str, str]]:
    entries: dict[str, dict[str, str]] = {}
    for name, version in sorted(samples_versions(objects.list_names(SAMPLES)).items()):
        key = samples_key(name, version)
        old = parent.samples.get(name) if parent else None
        sha256 = old["sha256"] if old and old["key"] == key else sha256_hex(table_file(objects, key))
        entries[name] = {"key": key, "sha256": sha256}
    return entries

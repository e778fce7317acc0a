"""Push and pull: a store, or part of it, from one place to another, byte for byte.

The newest snapshot is pinned first, and what it names is copied, so a run that goes on at the source disturbs nothing.
Order makes a transfer safe to stop anywhere: removals, clip parts, blocks (shards before their receipt), canaries,
journals, and the snapshot last. Until then a reader of the destination sees nothing, or the older snapshot that was
there. What is there already with the right size is not sent again. Every shard is hashed against its receipt before it
is put, in the memory that is then sent; S3 refuses a body whose signed sha256 differs, and `check` reads all back.

A part of the clips is sent as whole blocks: shards are immutable and their receipts cover them whole. `Transferred`
says what that costs; `subset` cuts instead, into a new store.

Parcels: which blocks of a store a transfer has to bring, and what covers them.

Comes in: a pinned snapshot and a selection. Goes out: one parcel per block, its receipt read and checked against the
snapshot, so that every shard's sha256 is known before a byte of it is sent.

Push: a store to a place where others find it, with a card for people and a listing for web servers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from featurestore.layout import (
    CARD,
    JOURNAL,
    LISTING,
    ROOT_METADATA,
    TEMPORARY,
    block_of,
    journal_key,
    journal_names,
    receipt_key,
    reference_clip_key,
    shard_key,
    snapshot_keys,
    tombstone_key,
)
from featurestore.locate import Place, check_is_another, no_store_at, place_of
from featurestore.maintenance.tombstone import erase_tombstoned
from featurestore.objects.base import Objects, digest_of, get_bounded, listing_bytes, put_if_absent
from featurestore.objects.open import check_writable, in_parallel, open_hub, open_objects
from featurestore.parquet import MAX_TABLE_BYTES
from featurestore.quality import DISTORTION_PREFIX as DISTORTION
from featurestore.quality import PARITY_PREFIX as PARITY
from featurestore.reader import encoder_keys
from featurestore.records import Receipt, max_receipt_bytes, tombstone_ids
from featurestore.schemas import CLIP_SCHEMA, table_to_clips
from featurestore.snapshots import ClipIndex, Snapshot, load_snapshot, newest_snapshot_id, publish, read_table
from featurestore.store import FeatureStore
from featurestore.transfer.dataset_card import write_card
from featurestore.transfer.merge import Selection
from featurestore.writer import StoreWriter, create_or_open_group
from featurestore.zarr_metadata import read_arrays
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import StoreDamagedError, StoreError, StoreNotFoundError, UserError
from mervcache.files import sha256_hex


@dataclass(frozen=True, kw_only=True)
class BlockTransfer:
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


def parcels_of(origin: Objects, snapshot: Snapshot, selection: Selection) -> list[BlockTransfer]:
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
) -> BlockTransfer:
    key = receipt_key(kind, group, block)
    try:
        data = get_bounded(origin, key, max_receipt_bytes(block_rows[kind]))
    except FileNotFoundError:
        raise StoreDamagedError(f"{key} is missing though the snapshot names it; verify the source") from None
    receipt = Receipt.parse(data, kind=kind, group=group, block=block, block_rows=block_rows[kind])
    if receipt.digest != digest:
        raise StoreDamagedError(f"{key} is not the receipt that the snapshot names; run `merv-pipeline verify`")
    ok = {row for row, outcome in enumerate(receipt.rows, start=receipt.first_row()) if outcome.state == "ok"}
    return BlockTransfer(
        kind=kind,
        group=group,
        block=block,
        block_rows=block_rows[kind],
        number=receipt.generation,
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


WORKERS = 4  # blocks in flight; each holds one shard of about 100 MB in memory


@dataclass(kw_only=True)
class Transferred:
    """What a transfer did."""

    source: str
    destination: str
    snapshot: str = ""  # at the destination
    blocks: int = 0
    bytes: int = 0  # of all shards that the destination has to have
    sent_blocks: int = 0
    sent_bytes: int = 0
    overhead: float = 1.0  # rows of the blocks over rows of the clips asked for
    encoders: list[str] = field(default_factory=list)
    card: bool | None = None  # was it written; False: somebody's own README stands there; None: only `push` writes one


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """What is brought, from where to where."""

    origin: Objects
    writer: StoreWriter  # of the destination
    snapshot: Snapshot  # of the source, pinned
    selection: Selection
    parcels: list[BlockTransfer]
    check: bool  # is all read back

    @property
    def target(self) -> Objects:
        return self.writer.objects


def transfer(
    source: Place,
    destination: Place,
    *,
    target: Objects | None = None,
    selection: Selection | None = None,
    workers: int = WORKERS,
    check: bool = False,
    with_journal: bool = True,
    progress: ProgressLine = SILENT,
) -> Transferred:
    """Bring a destination up to the source's newest snapshot; resumable, and a no-op where nothing is new.

    `target` is the destination where the caller has opened it, as `push` does at the Hub: what is put last may then
    wait for its `flush`. `progress` counts bytes, and starts a second time if all is read back when all is sent.
    """
    selection = selection or Selection()
    if selection.split is not None:
        raise UserError("whole blocks are sent, a split cannot be: make a `merv-pipeline subset` of it first")
    check_is_another(source, destination)
    if target is None:
        check_writable(destination)
    trip = _set_out(source, destination, target, selection, check)
    done = _summary(source, destination, trip.parcels)
    _copy_removals(trip)  # first: what was taken back must not be shown for a moment
    _copy_parts(trip)
    _make_groups(trip)
    _send_all(trip, done, workers=workers, progress=progress)
    _copy_reference_clips(trip)
    _copy_journals(trip, with_journal)
    erase_tombstoned(trip.writer)  # what earlier transfers brought of clips that were removed since
    trip.target.flush()  # so that the last commit has the snapshot, and what describes it
    done.snapshot = _finish(trip)
    return done


def _set_out(
    source: Place, destination: Place, target: Objects | None, selection: Selection, check: bool
) -> TransferPlan:
    """Everything is read and checked at the source before the destination is made."""
    origin = open_objects(source)
    snapshot = _pinned(origin, source)
    parcels = parcels_of(origin, snapshot, selection)
    writer = StoreWriter.open_or_create(destination, block_rows=dict(snapshot.block_rows), objects=target)
    return TransferPlan(
        origin=origin, writer=writer, snapshot=snapshot, selection=selection, parcels=parcels, check=check
    )


def _pinned(origin: Objects, source: Place) -> Snapshot:
    if not origin.exists(ROOT_METADATA):
        raise StoreNotFoundError(no_store_at(place_of(source)))
    if (newest := newest_snapshot_id(origin)) is None:
        raise StoreError(f"{source} has no snapshot yet: let its extraction end, or run it again to finish it")
    return load_snapshot(origin, newest)


def _summary(source: Place, destination: Place, parcels: list[BlockTransfer]) -> Transferred:
    asked = sum(parcel.rows_asked for parcel in parcels)
    return Transferred(
        source=str(source),
        destination=str(destination),
        blocks=len(parcels),
        bytes=sum(parcel.num_bytes for parcel in parcels),
        overhead=sum(parcel.rows for parcel in parcels) / asked if asked else 1.0,
        encoders=sorted({parcel.group for parcel in parcels}),
    )


def _copy_removals(trip: TransferPlan) -> None:
    for stone in tombstone_ids(trip.origin):
        put_if_absent(trip.target, tombstone_key(stone), trip.origin.get(tombstone_key(stone)))


def _copy_parts(trip: TransferPlan) -> None:
    """Clip parts and samples; a part that is there must be the same, or the destination is another store."""
    snapshot, target = trip.snapshot, trip.target
    named = dict(snapshot.parts) | {entry["key"]: entry["sha256"] for entry in snapshot.samples.values()}
    for key, sha256 in named.items():
        if not target.exists(key) and put_if_absent(target, key, digested(trip.origin, key, sha256)):
            continue
        if digest_of(target, key) != sha256:
            raise UserError(
                f"the destination holds another store: its {key} differs; push into an empty place, or make one store "
                "of both with `merv-pipeline union`"
            )
    trip.writer.add_clips([])  # names the datasets in zarr.json


def _make_groups(trip: TransferPlan) -> None:
    """Groups are made from their identity, as extraction makes them, with room for every row given out."""
    snapshot, index = trip.snapshot, ClipIndex(trip.target, trip.writer.block_rows)
    for kind, group in sorted({(parcel.kind, parcel.group) for parcel in trip.parcels}):
        summary = snapshot.groups[f"{kind}/{group}"]
        specs = read_arrays(trip.origin, kind, summary.identity, snapshot.block_rows[kind])
        create_or_open_group(trip.target, index, kind, summary, codec=specs["tokens"].codec)


def _send_all(
    trip: TransferPlan,
    done: Transferred,
    *,
    workers: int,
    progress: ProgressLine,
) -> None:
    """Send the parcels; where puts are gathered, what was sent is read back in a pass of its own."""
    send = partial(_send_parcels, trip, done, workers=workers, progress=progress)
    send(check=trip.check and not trip.target.defers_visibility)
    if trip.check and trip.target.defers_visibility:  # what is not committed cannot be read back
        trip.target.flush()
        send(check=True)


def _send_parcels(
    trip: TransferPlan,
    done: Transferred,
    *,
    workers: int,
    check: bool,
    progress: ProgressLine,
) -> None:
    """Send the parcels; progress counts bytes sent or, with check, all bytes read back."""
    sizes = trip.target.list_tree()
    moving = [parcel.num_bytes if check else parcel.missing_bytes(sizes) for parcel in trip.parcels]
    progress.start(sum(moving))
    send = partial(_send, trip.origin, trip.target, sizes, check)
    with ThreadPoolExecutor(workers, thread_name_prefix="transfer") as pool:
        try:
            for num_bytes, sent in zip(moving, pool.map(send, trip.parcels), strict=True):
                progress.advance(num_bytes)
                done.sent_bytes += sent
                done.sent_blocks += sent > 0
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _copy_reference_clips(trip: TransferPlan) -> None:
    """Copy the canaries of the transferred groups; ones that are there must have the same digest."""
    target, groups = trip.target, {f"{parcel.kind}/{parcel.group}" for parcel in trip.parcels}
    newest = newest_snapshot_id(target)
    known = load_snapshot(target, newest).canaries if newest else {}
    for name, sha256 in trip.snapshot.canaries.items():
        if not trip.selection.is_whole and name not in groups:
            continue
        key = reference_clip_key(*name.split("/"))
        if not target.exists(key):
            put_if_absent(target, key, digested(trip.origin, key, sha256))
            if trip.check:
                target.flush()
        elif known.get(name) == sha256 and not trip.check:  # the snapshot there tells the digest
            continue
        if (sha256_hex(target.get(key)) if trip.check else digest_of(target, key)) != sha256:
            raise _other_bytes(key)


def _copy_journals(trip: TransferPlan, with_journal: bool) -> None:
    origin, target = trip.origin, trip.target
    there = set(journal_names(target.list_names(JOURNAL)))
    for name in journal_names(origin.list_names(JOURNAL)):
        if name not in there and (with_journal or name.startswith((DISTORTION, PARITY))):  # no host, no path
            put_if_absent(target, journal_key(name), origin.get(journal_key(name)))


def _send(origin: Objects, target: Objects, sizes: Mapping[str, int], check: bool, parcel: BlockTransfer) -> int:
    """Put what is not there of one block, the receipt last; returns the bytes that were sent."""
    key = receipt_key(parcel.kind, parcel.group, parcel.block)
    is_replaced = key in sizes and _is_older(target.get(key), parcel)
    sent = 0
    for shard, entry in parcel.shards.items():
        if shard not in sizes or is_replaced:
            sent += _send_shard(origin, target, shard, entry, is_replaced)
        elif sizes[shard] != entry["bytes"] or target.known_sha256(shard) not in (None, entry["sha256"]):
            raise _other_bytes(shard)
        if check and sha256_hex(target.get(shard)) != entry["sha256"]:
            raise StoreDamagedError(
                f"{shard} arrived with other bytes than its receipt says; delete it there, push again"
            )
    if key not in sizes or is_replaced:
        receipt = digested(origin, key, parcel.receipt_sha256)
        if is_replaced:
            target.replace(key, receipt)
        elif not put_if_absent(target, key, receipt) and target.get(key) != receipt:
            raise _other_bytes(key)
    return sent


def _is_older(there: bytes, parcel: BlockTransfer) -> bool:
    """True of a receipt that repair or tombstone replaced since it was sent; any other difference is another store."""
    if sha256_hex(there) == parcel.receipt_sha256:
        return False
    receipt = Receipt.parse(
        there, kind=parcel.kind, group=parcel.group, block=parcel.block, block_rows=parcel.block_rows
    )
    if receipt.generation >= parcel.number:
        raise _other_bytes(receipt_key(parcel.kind, parcel.group, parcel.block))
    return True


def _send_shard(origin: Objects, target: Objects, key: str, entry: Mapping[str, int | str], is_replaced: bool) -> int:
    try:
        data = origin.get(key)
    except FileNotFoundError:
        raise StoreDamagedError(f"{key} is missing though its receipt is there; verify and repair the source") from None
    if sha256_hex(data) != entry["sha256"]:
        raise StoreDamagedError(f"{key} does not match its receipt's sha256: not sent; verify and repair the source")
    if is_replaced:
        target.replace(key, data)
    elif not put_if_absent(target, key, data) and target.size(key) != len(data):
        raise _other_bytes(key)
    return len(data)


def _other_bytes(key: str) -> UserError:
    return UserError(
        f"the destination holds other bytes under {key}: it is another extraction of the same clips; push into an "
        "empty place, or make one store of both with `merv-pipeline union`"
    )


def _finish(trip: TransferPlan) -> str:
    """The snapshot itself where all of it arrived, else one of what is there now."""
    target, snapshot = trip.target, trip.snapshot
    if not trip.selection.is_whole:
        return publish(target, trip.writer.block_rows)
    table_key, record_key = snapshot_keys(snapshot.id)
    put_if_absent(target, table_key, digested(trip.origin, table_key, snapshot.table_sha256))
    put_if_absent(target, record_key, snapshot.to_bytes())
    newest = newest_snapshot_id(target)
    if newest != snapshot.id:  # the destination was ahead: its own older transfers of parts, or an extraction there
        with suppress(StoreError):
            return publish(target, trip.writer.block_rows)
    return newest or snapshot.id


def push(source: Place, destination: Place, *, license: str | None = None, **options: Any) -> Transferred:
    """`transfer`, then the card and the listing, which describe what is at the destination now."""
    hub = open_hub(destination)
    done = transfer(source, destination, target=hub, **options)
    objects = open_objects(destination) if hub is None else hub
    newest = newest_snapshot_id(objects) or done.snapshot
    store = FeatureStore(str(place_of(destination)), newest, objects=objects)
    done.card = write_card(objects, store, place=str(destination), license=license)
    write_listing(objects)
    objects.flush()
    return done


def write_listing(objects: Objects) -> None:
    """Put `listing.json`, if it says anything new."""
    own = (LISTING, CARD)
    sizes = {
        key: size
        for key, size in objects.list_tree().items()
        if key not in own and not key.startswith((f"{TEMPORARY}/", "."))
    }
    data = listing_bytes(sizes)
    if not put_if_absent(objects, LISTING, data) and objects.get(LISTING) != data:
        objects.replace(LISTING, data)

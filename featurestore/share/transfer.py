"""Push and pull: a store, or part of it, from one place to another, byte for byte.

The newest snapshot is pinned first, and what it names is copied, so a run that goes on at the source disturbs nothing.
Order makes a transfer safe to stop anywhere: removals, clip parts, blocks (shards before their receipt), canaries,
journals, and the snapshot last. Until then a reader of the destination sees nothing, or the older snapshot that was
there. What is there already with the right size is not sent again. Every shard is hashed against its receipt before it
is put, in the memory that is then sent; S3 refuses a body whose signed sha256 differs, and `check` reads all back.

A part of the clips is sent as whole blocks: shards are immutable and their receipts cover them whole. `Transferred`
says what that costs; `subset` cuts instead, into a new store.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from featurestore.digests import sha256_hex
from featurestore.distortion import JOURNAL_PREFIX as DISTORTION
from featurestore.errors import StoreDamagedError, StoreError, StoreNotFoundError, UserError
from featurestore.find import Place, check_is_another, no_store_at, place_of
from featurestore.groups import create_or_open_group, read_arrays
from featurestore.keep.erase import erase_tombstoned
from featurestore.layout import (
    JOURNAL,
    ROOT_METADATA,
    canary_key,
    journal_key,
    journal_names,
    receipt_key,
    snapshot_keys,
    tombstone_key,
)
from featurestore.parity import JOURNAL_PREFIX as PARITY
from featurestore.parts import ClipIndex
from featurestore.places.by_url import check_writable, open_objects
from featurestore.places.objects import Objects, digest_of, put_if_absent
from featurestore.progress import SILENT, Progress
from featurestore.publish import publish
from featurestore.receipts import Receipt
from featurestore.share.parcels import Parcel, digested, parcels_of
from featurestore.share.selection import Selection
from featurestore.snapshots import Snapshot, load_snapshot, newest_snapshot_id
from featurestore.tombstones import tombstone_ids
from featurestore.writer import StoreWriter

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
class _Trip:
    """What is brought, from where to where."""

    origin: Objects
    writer: StoreWriter  # of the destination
    snapshot: Snapshot  # of the source, pinned
    selection: Selection
    parcels: list[Parcel]
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
    progress: Progress = SILENT,
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
    _copy_canaries(trip)
    _copy_journals(trip, with_journal)
    erase_tombstoned(trip.writer)  # what earlier transfers brought of clips that were removed since
    trip.target.flush()  # so that the last commit has the snapshot, and what describes it
    done.snapshot = _finish(trip)
    return done


def _set_out(source: Place, destination: Place, target: Objects | None, selection: Selection, check: bool) -> _Trip:
    """Everything is read and checked at the source before the destination is made."""
    origin = open_objects(source)
    snapshot = _pinned(origin, source)
    parcels = parcels_of(origin, snapshot, selection)
    writer = StoreWriter.open_or_create(destination, block_rows=dict(snapshot.block_rows), objects=target)
    return _Trip(origin=origin, writer=writer, snapshot=snapshot, selection=selection, parcels=parcels, check=check)


def _pinned(origin: Objects, source: Place) -> Snapshot:
    if not origin.exists(ROOT_METADATA):
        raise StoreNotFoundError(no_store_at(place_of(source)))
    if (newest := newest_snapshot_id(origin)) is None:
        raise StoreError(f"{source} has no snapshot yet: let its extraction end, or run it again to finish it")
    return load_snapshot(origin, newest)


def _summary(source: Place, destination: Place, parcels: list[Parcel]) -> Transferred:
    asked = sum(parcel.rows_asked for parcel in parcels)
    return Transferred(
        source=str(source),
        destination=str(destination),
        blocks=len(parcels),
        bytes=sum(parcel.num_bytes for parcel in parcels),
        overhead=sum(parcel.rows for parcel in parcels) / asked if asked else 1.0,
        encoders=sorted({parcel.group for parcel in parcels}),
    )


def _copy_removals(trip: _Trip) -> None:
    for stone in tombstone_ids(trip.origin):
        put_if_absent(trip.target, tombstone_key(stone), trip.origin.get(tombstone_key(stone)))


def _copy_parts(trip: _Trip) -> None:
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


def _make_groups(trip: _Trip) -> None:
    """Groups are made from their identity, as extraction makes them, with room for every row given out."""
    snapshot, index = trip.snapshot, ClipIndex(trip.target, trip.writer.block_rows)
    for kind, group in sorted({(parcel.kind, parcel.group) for parcel in trip.parcels}):
        summary = snapshot.groups[f"{kind}/{group}"]
        specs = read_arrays(trip.origin, kind, summary.identity, snapshot.block_rows[kind])
        create_or_open_group(trip.target, index, kind, summary, codec=specs["tokens"].codec)


def _send_all(
    trip: _Trip,
    done: Transferred,
    *,
    workers: int,
    progress: Progress,
) -> None:
    """Send the parcels; where puts are gathered, what was sent is read back in a pass of its own."""
    send = partial(_send_parcels, trip, done, workers=workers, progress=progress)
    send(check=trip.check and not trip.target.gathers)
    if trip.check and trip.target.gathers:  # what is not committed cannot be read back
        trip.target.flush()
        send(check=True)


def _send_parcels(
    trip: _Trip,
    done: Transferred,
    *,
    workers: int,
    check: bool,
    progress: Progress,
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


def _copy_canaries(trip: _Trip) -> None:
    """Copy the canaries of the transferred groups; ones that are there must have the same digest."""
    target, groups = trip.target, {f"{parcel.kind}/{parcel.group}" for parcel in trip.parcels}
    newest = newest_snapshot_id(target)
    known = load_snapshot(target, newest).canaries if newest else {}
    for name, sha256 in trip.snapshot.canaries.items():
        if not trip.selection.is_whole and name not in groups:
            continue
        key = canary_key(*name.split("/"))
        if not target.exists(key):
            put_if_absent(target, key, digested(trip.origin, key, sha256))
            if trip.check:
                target.flush()
        elif known.get(name) == sha256 and not trip.check:  # the snapshot there tells the digest
            continue
        if (sha256_hex(target.get(key)) if trip.check else digest_of(target, key)) != sha256:
            raise _other_bytes(key)


def _copy_journals(trip: _Trip, with_journal: bool) -> None:
    origin, target = trip.origin, trip.target
    there = set(journal_names(target.list_names(JOURNAL)))
    for name in journal_names(origin.list_names(JOURNAL)):
        if name not in there and (with_journal or name.startswith((DISTORTION, PARITY))):  # no host, no path
            put_if_absent(target, journal_key(name), origin.get(journal_key(name)))


def _send(origin: Objects, target: Objects, sizes: Mapping[str, int], check: bool, parcel: Parcel) -> int:
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


def _is_older(there: bytes, parcel: Parcel) -> bool:
    """True of a receipt that repair or tombstone replaced since it was sent; any other difference is another store."""
    if sha256_hex(there) == parcel.receipt_sha256:
        return False
    receipt = Receipt.parse(
        there, kind=parcel.kind, group=parcel.group, block=parcel.block, block_rows=parcel.block_rows
    )
    if receipt.number >= parcel.number:
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


def _finish(trip: _Trip) -> str:
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

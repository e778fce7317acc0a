"""Push and pull: a store, or part of it, copied from one place to another, byte for byte and resumable.

What the newest snapshot names is copied in an order that makes a transfer safe to stop anywhere: tombstones, clip
parts, blocks (shards before their receipt), reference clips, journals, and the snapshot last. Every shard is hashed
against its receipt before it is put; `check` reads all back. Blocks travel whole, for receipts cover them: `subset`
cuts instead.
"""

from __future__ import annotations

import logging
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
    NEWEST,
    ROOT_METADATA,
    TEMPORARY,
    VIEWER,
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
from featurestore.maintenance.derived_table import check_table
from featurestore.maintenance.tombstone import erase_tombstoned
from featurestore.newest import update_newest
from featurestore.objects.base import Objects, digest_of, get_bounded, listing_bytes, put_if_absent
from featurestore.objects.hub import HubObjects
from featurestore.objects.local import LocalObjects
from featurestore.objects.open import check_writable, in_parallel, open_hub, open_objects
from featurestore.parquet import digested_file, read_table
from featurestore.quality import DISTORTION_PREFIX, PARITY_PREFIX
from featurestore.records import (
    MAX_JOURNAL_BYTES,
    Receipt,
    journal_bytes,
    max_receipt_bytes,
    parse_journal,
    tombstone_ids,
)
from featurestore.schemas import CLIP_SCHEMA, table_to_clips
from featurestore.snapshots import Snapshot, load_snapshot, newest_snapshot_id, publish
from featurestore.store import FeatureStore
from featurestore.tags import Tag
from featurestore.transfer.dataset_card import write_card
from featurestore.transfer.selection import Selection
from featurestore.transfer.tags import copy_tagged_snapshots, copy_tags, tag_revisions, tags_to_send
from featurestore.transfer.viewer import put_viewer_tables
from featurestore.writer import StoreWriter
from featurestore.zarr_metadata import read_arrays
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import StoreDamagedError, StoreError, StoreNotFoundError, UserError
from mervcache.files import sha256_hex
from mervcache.reprs import changed_fields
from mervcache.text import redact, redact_all

MEASUREMENTS = (DISTORTION_PREFIX, PARITY_PREFIX)  # names of journals that hold no host or path begin so
WORKERS = 4  # blocks in flight; each holds one shard of about 100 MB in memory

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Transferred:
    """What a transfer did."""

    source: str
    destination: str
    snapshot: str = ""  # at the destination
    blocks: int = 0
    bytes: int = 0  # of all shards that the destination must have
    sent_blocks: int = 0
    sent_bytes: int = 0
    overhead: float = 1.0  # rows of the blocks over rows of the requested clips
    encoders: list[str] = field(default_factory=list)
    tags: dict[str, bool] = field(default_factory=dict)  # that were written; True: one of that name was moved
    card: bool | None = None  # written; False: a README.md written by hand was left; None: only `push` writes one

    __repr__ = changed_fields


@dataclass(frozen=True, kw_only=True)
class BlockTransfer:
    """One block of one group: its shards, and the receipt that covers them."""

    kind: str
    group: str
    block: int
    block_rows: int
    generation: int  # of the receipt: repair and tombstone replace a block
    receipt_sha256: str  # of the receipt's own bytes
    shards: Mapping[str, Mapping[str, int | str]]  # key -> {"sha256", "bytes"}
    rows: int  # committed rows
    requested_rows: int  # of them, rows of the requested clips

    @property
    def receipt_key(self) -> str:
        return receipt_key(self.kind, self.group, self.block)

    def num_bytes(self, without: Collection[str] = ()) -> int:
        """Bytes of the shards, `without` those whose keys are given."""
        return sum(int(shard["bytes"]) for key, shard in self.shards.items() if key not in without)


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """What is copied, from where to where."""

    origin: Objects
    writer: StoreWriter  # of the destination
    snapshot: Snapshot  # of the source, pinned: a run that goes on there does not disturb the transfer
    selection: Selection
    blocks: list[BlockTransfer]
    check: bool  # read everything back
    tags: list[Tag]  # of the source, with snapshots that are there

    @property
    def target(self) -> Objects:
        return self.writer.objects


def push(
    source: Place, destination: Place, *, license: str | None = None, with_journal: bool = False, **options: Any
) -> Transferred:
    """`transfer` from `source` to `destination`, then its dataset card and the listing for web servers.

    Parameters
    ----------
    license
        Of the data, for the card, such as "cc-by-4.0".
    with_journal
        Send the journals of runs too: they hold host names, paths and options.
    options
        Those of `transfer`.
    """
    hub = open_hub(destination)
    done = transfer(source, destination, target=hub, with_journal=with_journal, **options)
    target = open_objects(destination) if hub is None else hub
    newest = newest_snapshot_id(target) or done.snapshot
    store = FeatureStore(str(place_of(destination)), newest, objects=target)
    if not with_journal and (shared := [name for name in _journals(target) if not name.startswith(MEASUREMENTS)]):
        log.warning(
            "%s holds %d journals of runs from an earlier push, with host names, paths and options: delete them in its "
            "journal/ if they are not meant for others",
            destination,
            len(shared),
        )
    put_viewer_tables(target, store)
    done.card = write_card(target, store, place=str(destination), license=license)
    sizes = {
        key: size
        for key, size in target.list_tree().items()
        if key not in (LISTING, CARD, NEWEST) and not key.startswith((f"{TEMPORARY}/", f"{VIEWER}/", "."))
    }
    listing = listing_bytes(sizes)
    if not put_if_absent(target, LISTING, listing) and target.get(LISTING) != listing:
        target.replace(LISTING, listing)
    target.flush()
    if isinstance(hub, HubObjects):
        tag_revisions(hub, newest, done.tags)
    return done


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

    Parameters
    ----------
    source, destination
        Folders or URLs; UserError where a destination cannot be written or is the source.
    target
        The destination where the caller has opened it: what is put last may then wait for its `flush`.
    selection
        Encoders, datasets or clips to send; whole blocks are sent. None: all.
    workers
        Blocks in flight, each about 100 MB.
    check
        Read everything back afterwards and compare digests.
    with_journal
        Send the journals of runs too.
    progress
        Counts bytes, and starts a second time with `check`.

    Raises
    ------
    StoreDamagedError
        Bytes of the source, or those that arrived, differ from their digest.
    RunStoppedError
        The destination is full, refuses the credentials or does not answer.
    """
    selection = selection or Selection()
    if selection.split is not None:
        raise UserError("whole blocks are sent, a split cannot be: make a `merv-pipeline subset` of it first")
    check_is_another(source, destination)
    if target is None:
        check_writable(destination)
    origin = open_objects(source)
    if not origin.exists(ROOT_METADATA):
        raise StoreNotFoundError(no_store_at(place_of(source)))
    if (newest := newest_snapshot_id(origin)) is None:
        raise StoreError(f"{source} has no snapshot yet: let its extraction end, or run it again to finish it")
    snapshot = load_snapshot(origin, newest)
    blocks = blocks_to_send(origin, snapshot, selection)  # read and checked before the destination is made
    writer = StoreWriter.open_or_create(destination, block_rows=dict(snapshot.block_rows), objects=target)
    plan = TransferPlan(
        origin=origin,
        writer=writer,
        snapshot=snapshot,
        selection=selection,
        blocks=blocks,
        check=check,
        tags=tags_to_send(origin, writer.objects, selection),
    )
    requested = sum(block.requested_rows for block in blocks)
    done = Transferred(
        source=redact(str(source)),
        destination=redact(str(destination)),
        blocks=len(blocks),
        bytes=sum(block.num_bytes() for block in blocks),
        overhead=sum(block.rows for block in blocks) / requested if requested else 1.0,
        encoders=sorted({block.group for block in blocks}),
    )
    for name in tombstone_ids(origin):  # first, so that a removed clip is visible at no time
        put_if_absent(plan.target, tombstone_key(name), origin.get(tombstone_key(name)))
    update_newest(plan.target)
    _copy_tables(plan)
    _make_groups(plan)
    defers = plan.target.defers_visibility
    _send_blocks(plan, done, workers=workers, check=check and not defers, progress=progress)
    if check and defers:  # what is not committed cannot be read back
        plan.target.flush()
        _send_blocks(plan, done, workers=workers, check=True, progress=progress)
    _copy_reference_clips(plan)
    _copy_journals(plan, with_journal=with_journal)
    erase_tombstoned(writer)  # clips of earlier transfers that were removed since
    plan.target.flush()  # so that the last commit has the snapshot, and what describes it
    copy_tagged_snapshots(origin, plan.target, plan.tags, newest=snapshot.id)
    done.snapshot = _publish(plan)
    done.tags = copy_tags(plan.target, plan.tags)
    return done


def blocks_to_send(origin: Objects, snapshot: Snapshot, selection: Selection) -> list[BlockTransfer]:
    """The blocks to send, every receipt read and checked against the snapshot."""
    groups = selection.groups(group.identity for group in snapshot.groups.values())
    requested: dict[tuple[str, int], set[int]] | None = None  # (kind, block) -> rows of requested clips; None: all
    if not selection.takes_all_clips:
        tables = [
            read_table(digested_file(origin, key, sha256), CLIP_SCHEMA, key) for key, sha256 in snapshot.parts.items()
        ]
        clips = [pair for table in tables for pair in table_to_clips(table)]
        selection.check(clip for _, clip in clips)
        requested = {}
        for row, clip in clips:
            if selection.takes(clip):
                block = block_of(row, snapshot.block_rows[clip.kind])
                requested.setdefault((clip.kind, block), set()).add(row)

    def read(entry: tuple[str, str, int, str]) -> BlockTransfer:
        kind, group, block, digest = entry
        key, block_rows = receipt_key(kind, group, block), snapshot.block_rows[kind]
        try:
            data = get_bounded(origin, key, max_receipt_bytes(block_rows))
        except FileNotFoundError:
            raise StoreDamagedError(f"{key} is missing though the snapshot names it; verify the source") from None
        receipt = Receipt.parse(data, kind=kind, group=group, block=block, block_rows=block_rows)
        if receipt.digest != digest:
            raise StoreDamagedError(f"{key} is not the receipt that the snapshot names; run `merv-pipeline verify`")
        ok = {row for row, outcome in enumerate(receipt.rows, start=receipt.first_row()) if outcome.state == "ok"}
        return BlockTransfer(
            kind=kind,
            group=group,
            block=block,
            block_rows=block_rows,
            generation=receipt.generation,
            receipt_sha256=sha256_hex(data),
            shards={shard_key(kind, group, name, block): entry for name, entry in receipt.shards.items()},
            rows=len(ok),
            requested_rows=len(ok if requested is None else ok & requested[kind, block]),
        )

    receipts = [
        (*name.split("/"), int(block), digest)
        for name, summary in snapshot.groups.items()
        if name.split("/")[1] in groups
        for block, digest in sorted(summary.receipts.items(), key=lambda item: int(item[0]))
    ]
    wanted = [entry for entry in receipts if requested is None or (entry[0], entry[2]) in requested]
    return in_parallel(read, wanted, origin.parallel_reads)


def _copy_tables(plan: TransferPlan) -> None:
    """Clip parts and samples; one that is there must be the same, or the destination is another store."""
    snapshot, target = plan.snapshot, plan.target
    named = dict(snapshot.parts) | {entry["key"]: entry["sha256"] for entry in snapshot.samples.values()}
    for key, sha256 in named.items():
        if not target.exists(key) and put_if_absent(target, key, digested_file(plan.origin, key, sha256)):
            continue
        if digest_of(target, key) != sha256:
            raise UserError(
                f"the destination holds another store: its {key} differs; push into an empty place, or make one store "
                "of both with `merv-pipeline union`"
            )
    plan.writer.add_clips([])  # names the datasets in zarr.json


def _make_groups(plan: TransferPlan) -> None:
    """Groups are made from their identity, as extraction makes them, with room for all allocated rows."""
    snapshot = plan.snapshot
    for kind, group in sorted({(block.kind, block.group) for block in plan.blocks}):
        summary = snapshot.groups[f"{kind}/{group}"]
        specs = read_arrays(plan.origin, kind, summary.identity, snapshot.block_rows[kind])
        plan.writer.ensure_group(
            kind,
            summary.identity,
            batch_shape=summary.batch_shape,
            weights_label=summary.weights,
            codec=specs["tokens"].codec,
            new_identity=True,
        )


def _send_blocks(plan: TransferPlan, done: Transferred, *, workers: int, check: bool, progress: ProgressLine) -> None:
    """Send the blocks in parallel; progress counts bytes sent or, with `check`, all bytes read back."""
    sizes = plan.target.list_tree()
    moving = [block.num_bytes() if check else block.num_bytes(without=sizes) for block in plan.blocks]
    progress.start(sum(moving))
    with ThreadPoolExecutor(workers, thread_name_prefix="transfer") as pool:
        sending = pool.map(partial(_send_block, plan.origin, plan.target, sizes, check), plan.blocks)
        try:
            for num_bytes, sent in zip(moving, sending, strict=True):
                progress.advance(num_bytes)
                done.sent_bytes += sent
                done.sent_blocks += sent > 0
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _send_block(origin: Objects, target: Objects, sizes: Mapping[str, int], check: bool, block: BlockTransfer) -> int:
    """Put what is missing of one block, the receipt last; returns the bytes that were sent."""
    key, sent = block.receipt_key, 0
    is_replaced = key in sizes and _is_older(target.get(key), block)
    for shard, entry in block.shards.items():
        if shard not in sizes or is_replaced:
            try:
                data = origin.get(shard)
            except FileNotFoundError:
                raise StoreDamagedError(
                    f"{shard} is missing though its receipt is there; verify and repair the source"
                ) from None
            if sha256_hex(data) != entry["sha256"]:
                raise StoreDamagedError(
                    f"{shard} does not match its receipt's sha256: not sent; verify and repair the source"
                )
            if is_replaced:
                target.replace(shard, data)
            elif not put_if_absent(target, shard, data) and target.size(shard) != len(data):
                raise _other_bytes(shard)
            sent += len(data)
        elif sizes[shard] != entry["bytes"] or target.known_sha256(shard) not in (None, entry["sha256"]):
            raise _other_bytes(shard)
        if check and sha256_hex(target.get(shard)) != entry["sha256"]:
            raise StoreDamagedError(
                f"{shard} arrived with other bytes than its receipt says; delete it there, push again"
            )
    if key not in sizes or is_replaced:
        receipt = digested_file(origin, key, block.receipt_sha256)
        if is_replaced:
            target.replace(key, receipt)
        elif not put_if_absent(target, key, receipt) and target.get(key) != receipt:
            raise _other_bytes(key)
    return sent


def _is_older(receipt: bytes, block: BlockTransfer) -> bool:
    """True if the destination's receipt was replaced at the source; any other difference is another store."""
    if sha256_hex(receipt) == block.receipt_sha256:
        return False
    parsed = Receipt.parse(receipt, kind=block.kind, group=block.group, block=block.block, block_rows=block.block_rows)
    if parsed.generation >= block.generation:
        raise _other_bytes(block.receipt_key)
    return True


def _copy_reference_clips(plan: TransferPlan) -> None:
    """Reference clips of the transferred groups; those that are there must have the same digest."""
    target, groups = plan.target, {f"{block.kind}/{block.group}" for block in plan.blocks}
    newest = newest_snapshot_id(target)
    known: Mapping[str, str] = load_snapshot(target, newest).canaries if newest else {}
    for name, sha256 in plan.snapshot.canaries.items():
        if not plan.selection.is_whole and name not in groups:
            continue
        key = reference_clip_key(*name.split("/"))
        if not target.exists(key):
            put_if_absent(target, key, digested_file(plan.origin, key, sha256))
            if plan.check:
                target.flush()
        elif known.get(name) == sha256 and not plan.check:  # by the digest in the snapshot there
            continue
        if (sha256_hex(target.get(key)) if plan.check else digest_of(target, key)) != sha256:
            raise _other_bytes(key)


def _copy_journals(plan: TransferPlan, *, with_journal: bool) -> None:
    """Measurements, which the card shows, and `with_journal` the runs; addresses without their credentials.

    Stores of earlier versions may hold credentials, so what is sent is written anew; a damaged journal cannot be.
    """
    present = set(_journals(plan.target))
    for name in _journals(plan.origin):
        if name in present or not (with_journal or name.startswith(MEASUREMENTS)):
            continue
        data = get_bounded(plan.origin, journal_key(name), MAX_JOURNAL_BYTES)
        try:
            record = parse_journal(data, name)
        except StoreError as error:
            log.warning("not sent: %s", error)
            continue
        put_if_absent(plan.target, journal_key(name), journal_bytes(redact_all(record)))


def _journals(objects: Objects) -> list[str]:
    return journal_names(objects.list_names(JOURNAL))


def _other_bytes(key: str) -> UserError:
    return UserError(
        f"the destination holds other bytes under {key}: it is another extraction of the same clips; push into an "
        "empty place, or make one store of both with `merv-pipeline union`"
    )


def _publish(plan: TransferPlan) -> str:
    """The source's snapshot where all of it arrived, else one of what the destination holds; returns its id."""
    target, snapshot = plan.target, plan.snapshot
    if not plan.selection.is_whole:
        return publish(target, plan.writer.block_rows)
    table_key, record_key = snapshot_keys(snapshot.id)
    if not target.exists(record_key):
        near = target if isinstance(target, LocalObjects) else plan.origin  # of 15,000 receipts, read on a disk
        check_table(near, snapshot, source=plan.origin)
    put_if_absent(target, table_key, digested_file(plan.origin, table_key, snapshot.table_sha256))
    put_if_absent(target, record_key, snapshot.to_bytes())
    update_newest(target)
    newest = newest_snapshot_id(target)
    if newest != snapshot.id:  # the destination was ahead: by earlier partial transfers, or an extraction there
        with suppress(StoreError):
            return publish(target, plan.writer.block_rows)
    return newest or snapshot.id

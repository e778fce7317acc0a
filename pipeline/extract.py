"""Extraction, from the driver's chair: list, give out rows, hand blocks to the cluster, publish snapshots.

Comes in: an `ExtractConfig`. Goes out: a store with every block committed that could be, and a summary. The driver
moves no frames and no tokens and loads no model; it may be killed at any moment, and the same command goes on.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from featurestore.clips import KINDS
from featurestore.errors import MervCacheError, RunStoppedError
from featurestore.find import is_url
from featurestore.identity import FeatureIdentity
from featurestore.lease import StoreLease
from featurestore.writer import StoreWriter
from jobs.clusters import connect
from jobs.dashboard import dashboard_lines, performance_report
from jobs.run import Task
from pipeline.admission import check_store
from pipeline.config import ExtractConfig
from pipeline.datasets import DatasetListing, load_dataset
from pipeline.describe import EncoderDescription, describe, on_a_worker, settled
from pipeline.keep_samples import add_listed_samples
from pipeline.plan import PlannedBlock, plan_blocks
from pipeline.prediction import read_plan
from pipeline.run_blocks import run_blocks
from pipeline.summary import ExtractSummary, run_record
from pipeline.upkeep.refresh import look_at_media, told_identities
from pipeline.upkeep.reuse import OtherStore
from pipeline.upkeep.second_try import clips_to_retry

if TYPE_CHECKING:
    from distributed import Client


def extract(
    config: ExtractConfig, *, quiet: bool = False, say: Callable[[str], None] = lambda line: None
) -> ExtractSummary:
    """Bring the store up to the config: compute what is missing, touch nothing that is there.

    Raises `IdentityConflictError` where an encoder is stored under another identity, and `RunStoppedError` where the
    environment failed; in both cases everything committed so far stays.
    """
    check_store(config)
    listing = load_dataset(
        config.dataset,
        config.root,
        stage=config.stage,
        kind=config.kind,
        limit=config.limit,
        **config.options,
    )
    run = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}"
    summary = ExtractSummary(
        store=str(config.store_path),
        run=run,
        dataset=config.dataset,
        listed=len(listing.clips),
        samples=sum(len(samples) for samples in listing.samples.values()),
        missing=dict(listing.missing),
        rejected={reason: found.count for reason, found in listing.rejected.items()},
    )
    if config.forecast:
        summary.predicted = read_plan(config.forecast).to_dict()
    for note in listing.notes:
        say(note)
    if (encoders := settled(config, listing)) is not None:
        _settle(config, listing, encoders, summary, say)
        return summary
    say(f"{config.dataset}: {len(listing.clips)} clips listed; loading {', '.join(config.encoders)}")
    with connect(config.cluster_request, say=say) as client, performance_report(_report_path(config, run, say), say):
        for line in dashboard_lines(client) if config.dashboard else ():
            say(line)
        encoders = describe(client, config, say)
        store = StoreWriter.open_or_create(config.store_path, block_rows=dict(config.block_rows) or None)
        with StoreLease(config.store_path, run):  # a second driver would be safe, and waste its work
            _fill(client, store, config, listing, encoders, summary, quiet, say)
    return summary


def _settle(
    config: ExtractConfig,
    listing: DatasetListing,
    encoders: dict[str, EncoderDescription],
    summary: ExtractSummary,
    say: Callable[[str], None],
) -> None:
    """A run that has nothing to compute: samples, a look at the media, and its record."""
    started, identities = time.time(), {name: encoder.identity for name, encoder in encoders.items()}
    store = StoreWriter.open_or_create(config.store_path, block_rows=dict(config.block_rows) or None)
    with StoreLease(config.store_path, summary.run):
        look_at_media(store, config, listing, identities, summary, say)
        _add_samples(store, config, listing)
        _sum_up(store, config, listing, encoders, summary, started)


def _report_path(config: ExtractConfig, run: str, say: Callable[[str], None]) -> Path | None:
    """Where Dask's report of the run goes; beside the store, not in it: a store holds what somebody depends on."""
    if config.performance_report is None and not config.dashboard:
        return None
    place = config.store_path
    beside = Path(str(place).rpartition("/")[2]) if is_url(place) else Path(place)
    path = Path(config.performance_report or beside.with_name(f"{beside.stem}-dask-{run}.html"))
    say(f"performance report, at the end: {path}")
    return path


def _fill(
    client: Client,
    store: StoreWriter,
    config: ExtractConfig,
    listing: DatasetListing,
    encoders: dict[str, EncoderDescription],
    summary: ExtractSummary,
    quiet: bool,
    say: Callable[[str], None],
) -> None:
    """Give out rows, plan what is missing, and run it."""
    _register(store, config, listing, encoders)
    identities = {name: encoder.identity for name, encoder in encoders.items()}
    if config.retry_quarantine:
        again = clips_to_retry(client, store, config, listing, identities, summary, say)
        store.add_clips(again, retry=True)
    if config.canaries:
        _add_canaries(client, store, config, _kinds(listing), identities, summary, say)
    for line in told_identities(store, identities) if config.new_identity else ():
        say(line)
    stale = look_at_media(store, config, listing, identities, summary, say)
    blocks = plan_blocks(store, identities, clip_ids={clip.clip_id for clip in listing.clips}, stale=stale)
    _check_space(config, blocks, encoders)
    tasks = _tasks(config, listing, encoders, blocks, summary.run)
    with _summed_up(store, config, listing, encoders, summary):
        run_blocks(client, store, tasks, blocks, summary, config, quiet=quiet)


def _register(
    store: StoreWriter, config: ExtractConfig, listing: DatasetListing, encoders: dict[str, EncoderDescription]
) -> None:
    """Make the encoders' groups, give out rows and write samples: all that must stand before the first block.

    Groups come first: where they are refused, nothing has been written.
    """
    for kind in _kinds(listing):
        for encoder in encoders.values():
            store.ensure_group(
                kind,
                encoder.identity,
                batch_shape=_batch_shape(store, config, kind, encoder),
                weights_label=encoder.weights_label,
                new_identity=config.new_identity,
            )
    store.add_clips(listing.clips)
    _add_samples(store, config, listing)


def _kinds(listing: DatasetListing) -> list[str]:
    return [kind for kind in KINDS if any(clip.kind == kind for clip in listing.clips)]


def _add_canaries(
    client: Client,
    store: StoreWriter,
    config: ExtractConfig,
    kinds: list[str],
    identities: dict[str, FeatureIdentity],
    summary: ExtractSummary,
    say: Callable[[str], None],
) -> None:
    """Canaries for the groups that have none, before the first block: a run that is cut short has them."""
    from pipeline.certify.canaries import CanaryTask, missing_canaries, write_canaries

    if missing := missing_canaries(store, identities, kinds):
        task = CanaryTask(store=str(config.store_path), engine=config.engine_settings, groups=missing)
        done = on_a_worker(client, config, write_canaries, task)
        summary.canaries = done["written"]
        for problem in done["problems"]:
            say(f"no canaries, which `verify --parity` needs: {problem}")


def _add_samples(store: StoreWriter, config: ExtractConfig, listing: DatasetListing) -> None:
    if config.samples:
        add_listed_samples(store, listing, is_whole=config.kind is None and config.limit is None)


def _batch_shape(store: StoreWriter, config: ExtractConfig, kind: str, encoder: EncoderDescription) -> int:
    """Clips per forward: as asked, else as the store was begun with, else what the device holds."""
    if asked := config.batch.get(kind):
        return asked
    if encoder.identity.group_name in store.encoder_groups(kind):
        return store.open_group(kind, encoder.identity.group_name).batch_shape
    return encoder.batch[kind]


def _check_space(config: ExtractConfig, blocks: list[PlannedBlock], encoders: dict[str, EncoderDescription]) -> None:
    """Refuse to start what cannot end: 16-bit tokens shrink by a seventh at most, so the raw size is the forecast."""
    if is_url(config.store_path):
        return  # a bucket has no end that it tells
    needed = sum(
        len(rows) * clip_bytes(encoders[name].identity, block.kind)
        for block in blocks
        for name, rows in block.wanted.items()
    )
    free = shutil.disk_usage(config.store_path).free
    if needed > free:
        raise RunStoppedError(
            f"the run needs about {needed / 1e9:.1f} GB and {config.store_path} has {free / 1e9:.1f} GB free; "
            "choose another disk with --store, fewer clips with --limit, or --storage-dtype uint8"
        )


def clip_bytes(identity: FeatureIdentity, kind: str) -> int:
    """Stored bytes of one clip before compression."""
    time_steps, height, width = identity.grid_of(kind)
    per_value = 1 if identity.storage_dtype == "uint8" else 2
    scales = 8 * identity.width if identity.storage_dtype == "uint8" else 0
    return time_steps * (height * width + identity.prefix_tokens) * identity.width * per_value + scales


def _tasks(
    config: ExtractConfig,
    listing: DatasetListing,
    encoders: dict[str, EncoderDescription],
    blocks: list[PlannedBlock],
    run: str,
) -> Iterator[Task]:
    from pipeline.block import BlockTask

    groups = {name: encoder.identity.group_name for name, encoder in encoders.items()}
    identities = {name: encoder.identity for name, encoder in encoders.items()}
    other = OtherStore(config.reuse) if config.reuse and blocks else None
    engine = config.engine_settings
    for block in blocks:
        task = BlockTask(
            store=str(config.store_path),
            root=str(listing.root),
            kind=block.kind,
            block=block.block,
            rows=block.rows,
            wanted=block.wanted,
            groups=groups,
            batch=block.batch,
            accept_damaged=config.accept_damaged,
            engine=engine,
            reuse=other and other.task(block, identities),
        )
        yield Task(key=f"{block.kind}-{block.block:08d}-of-{block.batch}-{run}", arguments=(task,))


@contextmanager
def _summed_up(
    store: StoreWriter, config: ExtractConfig, listing: DatasetListing, encoders, summary: ExtractSummary
) -> Iterator[None]:
    """However the run ends, readers see what was committed and the journal tells what happened."""
    started = time.time()
    try:
        yield
    except BaseException:
        with suppress(MervCacheError):  # the first error is the one to tell: on a full disk this fails as well
            _sum_up(store, config, listing, encoders, summary, started)
        raise
    _sum_up(store, config, listing, encoders, summary, started)


def _sum_up(store, config: ExtractConfig, listing: DatasetListing, encoders, summary, started: float) -> None:
    summary.elapsed_s = time.time() - started
    summary.snapshot = store.publish_snapshot()
    ran_as = {name: encoder.journal_entry for name, encoder in encoders.items()}
    store.journal(f"{summary.run}-driver", run_record(config, listing, ran_as, summary, started))

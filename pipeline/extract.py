"""The extraction driver: check the request, list clips, allocate rows, run blocks on a cluster, publish snapshots.

It moves no frames and no tokens and loads no model; workers commit blocks themselves. It may be killed at any moment:
the same command resumes.
"""

from __future__ import annotations

import logging
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurestore.clips import KINDS
from featurestore.identity import FeatureIdentity
from featurestore.layout import ROOT_METADATA
from featurestore.lease import StoreLease
from featurestore.locate import Place, check_room_for_store, is_url
from featurestore.objects.base import Objects
from featurestore.objects.open import check_writable, open_objects
from featurestore.snapshots import newest_snapshot_id
from featurestore.storage_dtypes import SMALLEST
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter, check_holds_nothing_else
from featurestore.zarr_metadata import clip_bytes
from jobs.clusters import check_cluster, check_scheduler, connect
from jobs.metrics import dashboard_lines, performance_report
from jobs.run import Listener, Outcome, Task, run_tasks, worker_seconds
from mervcache.console import ProgressLine
from mervcache.errors import MervCacheError, RunStoppedError
from pipeline.config import ExtractConfig
from pipeline.datasets import DatasetListing, check_has_clips, list_clips
from pipeline.listed_samples import add_listed_samples
from pipeline.plan import NOTHING_STALE, PlannedBlock, StoreView, plan_blocks
from pipeline.refresh import StaleMedia, clips_without_rows, identity_notes, scan_media
from pipeline.remote_shards import narrowed
from pipeline.retry import plan_retry
from pipeline.reuse import OtherStore
from pipeline.run_encoders import describe, encoders_with_several, on_a_worker, remembered_encoders
from pipeline.same_media import same_media_tasks
from pipeline.summary import ExtractSummary, predict_from_first_blocks, read_forecast, run_record
from pipeline.worker.admission import MAX_BLOCKS, QUEUED_TASKS
from pipeline.worker.crash_marks import remove_all_marks
from pipeline.worker.reports import BlockCounts, EncoderDescription

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger(__name__)

SNAPSHOT_INTERVAL_S = 180.0
MIN_FAILED = 32  # clips; below this the share is not judged: the run goes on and reports `failures` at its end


def extract(config: ExtractConfig, *, quiet: bool = False) -> ExtractSummary:
    """Bring the store up to the `config`: compute what is missing, touch nothing that is there. `quiet`: no progress.

    Raises `UserError` for a request that cannot be met or a store that another run works on, `IdentityConflictError`
    where an encoder is stored under another identity, `ClusterError` without workers, and `RunStoppedError` where the
    environment failed; everything committed so far stays.
    """
    began = time.monotonic()
    objects, view = check_request(config)
    listing = list_clips(config)
    check_has_clips(listing)
    summary = ExtractSummary.begin(config, listing)
    if config.forecast:
        summary.predicted = read_forecast(config.forecast).to_dict()
    for note in listing.notes:
        log.info(note)
    extraction = Extraction(config=config, listing=listing, summary=summary, objects=objects, existing=view)
    if (encoders := extraction.up_to_date_encoders()) is not None:
        with extraction.open(encoders):
            summary.startup_s = time.monotonic() - began
            extraction.finish_without_work()
        return summary
    log.info("%s: %d clips listed; loading %s", config.dataset, len(listing.clips), ", ".join(config.encoders))
    with (
        connect(config.cluster_request) as client,
        performance_report(_report_path(config, summary)),
    ):
        for line in dashboard_lines(client) if config.dashboard else ():
            log.info(line)
        with extraction.open(describe(client, config)):
            extraction.run(client, began=began, quiet=quiet)
    return summary


def check_request(config: ExtractConfig) -> tuple[Objects, StoreView | None]:
    """Reject what is certain to fail before anything is listed or loaded: loading four encoders takes over a minute.

    Returns the opened place and the store in it, if there is one. The same checks are repeated where something is
    written, since another driver may have been there meanwhile.

    Errors: `ClusterError` for an unknown scheduler; `UserError` for a grid finer than an encoder's, a place where no
    store can be and for other block rows; `IdentityConflictError` where an encoder is stored under other settings.
    """
    check_scheduler(config.scheduler)
    config.check_grids()
    objects = check_place(config.store_path)
    if not objects.exists(ROOT_METADATA):
        return objects, None
    writer = StoreWriter.open_or_create(config.store_path, block_rows=config.block_rows, objects=objects)
    for name in config.encoders if not config.new_identity else ():
        # All of an identity but the digest of the weights is known by now: compare as if they were the stored ones.
        stored = writer.stored_identities(name)
        variants = [settings for settings in config.encoder_settings if settings.name == name]
        requested = [settings.identity(known.weights_sha256) for settings in variants for known in stored]
        if stored and not {identity.id for identity in requested} & {identity.id for identity in stored}:
            writer.check_identity(requested[0])
    return objects, StoreView(writer)


def check_place(place: Place) -> Objects:
    """Open the place of a store; `UserError` where no store can be, or where something else is."""
    check_writable(place)
    check_room_for_store(place)
    objects = open_objects(place)
    if not objects.exists(ROOT_METADATA):
        check_holds_nothing_else(objects, place)
    return objects


def _report_path(config: ExtractConfig, summary: ExtractSummary) -> Path | None:
    """Where Dask's report of the run goes; next to the store, which holds only what readers depend on."""
    if config.performance_report is None and not config.dashboard:
        return None
    place = config.store_path
    store = Path(str(place).rpartition("/")[2]) if is_url(place) else Path(place)
    path = Path(config.performance_report or store.with_name(f"{store.stem}-dask-{summary.run}.html"))
    log.info("performance report, at the end: %s", path)
    return path


@dataclass(kw_only=True, eq=False)
class Extraction:
    """One run: its config, the listed clips, the encoders, and the store, opened once."""

    config: ExtractConfig
    listing: DatasetListing
    summary: ExtractSummary  # filled in as the run proceeds
    objects: Objects  # of the store's place
    existing: StoreView | None  # None until `open` has made the store
    encoders: Mapping[str, EncoderDescription] = field(default_factory=dict)
    _scanned: tuple[Any, StaleMedia] | None = None  # the state that it is of, and the last scan
    _planned: tuple[Any, list[PlannedBlock]] | None = None  # the state that it is of, and the last plan

    @property
    def view(self) -> StoreView:
        """The store, which is there once `open` was called."""
        assert self.existing is not None
        return self.existing

    @property
    def identities(self) -> dict[str, FeatureIdentity]:
        return {name: encoder.identity for name, encoder in self.encoders.items()}

    @property
    def kinds(self) -> list[str]:
        """Kinds of the listed clips."""
        return [kind for kind in KINDS if any(clip.kind == kind for clip in self.listing.clips)]

    def up_to_date_encoders(self) -> Mapping[str, EncoderDescription] | None:
        """The encoders, if the store lacks nothing of the listing under their remembered digests; else None."""
        if self.existing is None or self.config.retry_quarantine:
            return None
        encoders = remembered_encoders(self.config, self.view.runs)
        if encoders is None:
            return None
        self.encoders, writer = encoders, self.view.writer
        groups = {identity.group_name for identity in self.identities.values()}
        for kind in self.kinds:
            if not groups <= writer.encoder_groups(kind).keys():
                return None
            shapes = {writer.open_group(kind, group).batch_shape for group in groups}
            if kind in self.config.batch and shapes != {self.config.batch[kind]}:
                return None  # another batch shape than the stored one is an error, raised where groups are made
        if self.config.canaries and self._missing_reference_clips():
            return None
        known = self.view.removed.union(writer.clips()["clip_id"].to_pylist())
        if not all(clip.clip_id in known for clip in self.listing.clips):
            return None
        if self.config.refresh and self.scan_media().clips:
            return None
        return None if self._plan() else encoders

    @contextmanager
    def open(self, encoders: Mapping[str, EncoderDescription]) -> Iterator[None]:
        """Make the store if there is none and hold its lease: a second driver would be safe, and waste its work."""
        self.encoders = encoders
        self.summary.device = next(iter(encoders.values())).device
        if self.existing is None:
            self.existing = StoreView(
                StoreWriter.open_or_create(
                    self.config.store_path, block_rows=self.config.block_rows, objects=self.objects
                )
            )
        with StoreLease(self.config.store_path, self.summary.run):
            self.view.refresh()
            yield

    def finish_without_work(self) -> None:
        """A run that has nothing to compute: scan the media, write samples and the run's record."""
        started = time.time()
        self.scan_media()
        self.add_samples()
        self.write_record(started)

    def run(self, client: Client, *, began: float, quiet: bool) -> None:
        """Allocate rows, plan what is missing, and compute it; `began`: the run, by the monotonic clock."""
        self.register()
        if self.config.retry_quarantine:
            self.retry_quarantine(client)
        if self.config.canaries:
            self.add_reference_clips(client)
        for line in identity_notes(self.view.writer, self.identities) if self.config.new_identity else ():
            log.info(line)
        self.scan_media()
        blocks = self.plan()
        self.check_space(blocks)
        total, tasks = sum(block.num_clips for block in blocks), self.tasks(blocks)
        self.summary.startup_s = time.monotonic() - began
        with self.recording():
            try:
                run_blocks(client, self.view.writer, tasks, self.summary, self.config, total=total, quiet=quiet)
            finally:
                self.summary.worker_s = worker_seconds(client)

    def register(self) -> None:
        """Make the encoders' groups, allocate rows and write samples: all that must exist before the first block.

        Groups come first: where they are refused, nothing has been written.
        """
        writer = self.view.writer
        several = encoders_with_several(writer, self.identities, new_identity=self.config.new_identity)
        for kind in self.kinds:
            stored = writer.encoder_groups(kind)
            for encoder in self.encoders.values():
                group = encoder.identity.group_name
                batch_shape = self.config.batch.get(kind)
                if not batch_shape:  # as the store was made with, else what the device holds
                    is_stored = group in stored
                    batch_shape = writer.open_group(kind, group).batch_shape if is_stored else encoder.batch[kind]
                writer.ensure_group(
                    kind,
                    encoder.identity,
                    batch_shape=batch_shape,
                    weights_label=encoder.weights_label,
                    new_identity=self.config.new_identity or encoder.identity.encoder in several,
                )
        writer.add_clips(self.listing.clips)
        self.add_samples()

    def add_samples(self) -> None:
        """Write the conversations about the clips, unless the config forbids it."""
        if self.config.samples:
            is_whole = self.config.kind is None and self.config.limit is None
            add_listed_samples(self.view.writer, self.listing, is_whole=is_whole)

    def retry_quarantine(self, client: Client) -> None:
        """Give new rows to the clips that failed and may succeed now."""
        retry = plan_retry(client, self.view, self.config, self.listing, self.identities)
        self.summary.unchanged = retry.unchanged
        if retry.unchanged:
            log.info(
                "%d of %d quarantined clips fail as before: they stay as they are, nothing is written",
                retry.unchanged,
                retry.unchanged + len(retry.clips),
            )
        self.view.writer.add_clips(retry.clips, retry=True)

    def add_reference_clips(self, client: Client) -> None:
        """Reference clips for the groups that have none, before the first block: an interrupted run has them."""
        from pipeline.reference_clips import ReferenceClipTask, write_reference_clips

        if missing := self._missing_reference_clips():
            task = ReferenceClipTask(
                store=str(self.config.store_path), engine=self.config.engine_settings, groups=missing
            )
            done = on_a_worker(client, self.config, write_reference_clips, task)
            self.summary.canaries = done["written"]
            for problem in done["problems"]:
                log.warning("no reference clips, which `verify --parity` needs: %s", problem)

    def _missing_reference_clips(self) -> dict[str, dict[str, int]]:
        from pipeline.reference_clips import missing_reference_clips  # only where they are wanted

        return missing_reference_clips(self.view.writer, self.identities, self.kinds)

    def scan_media(self) -> StaleMedia:
        """Count and log clips whose media changed; scanned once for the same encoders and snapshot."""
        if self._scanned is None or self._scanned[0] != self._state:
            media = scan_media(self.view, self.listing, self.identities, refresh=self.config.refresh)
            self._scanned = (self._state, media)  # read after the scan: a refresh publishes first
        media = self._scanned[1]
        self.summary.not_compared = len(media.not_compared)
        if self.config.refresh:
            self.summary.refreshed = len(media.clips)
        else:
            self.summary.changed = len(media.clips)
        return media

    def plan(self) -> list[PlannedBlock]:
        """Blocks with something left to compute; with --refresh, clips whose media changed are in new rows of them."""
        blocks = self._plan()
        if self.config.refresh and (media := self.scan_media()).clips:
            self.view.writer.add_clips(clips_without_rows(self.listing.clips, media, blocks), retry=True)
            blocks = self._plan()
        return blocks

    def _plan(self) -> list[PlannedBlock]:
        """The blocks of now; planned once for the same encoders, snapshot, rows and removed clips."""
        stale = self.scan_media().changed if self.config.refresh else NOTHING_STALE
        state = (self._state, self.view.writer.clips().num_rows, self.view.removed)
        if self._planned is None or self._planned[0] != state:
            clip_ids = {clip.clip_id for clip in self.listing.clips}
            self._planned = (state, plan_blocks(self.view, self.identities, clip_ids=clip_ids, stale=stale))
        return self._planned[1]

    @property
    def _state(self) -> tuple[list[str], str | None]:
        """What scans and plans depend on: another driver may publish while this one waits for its cluster."""
        return sorted(identity.id for identity in self.identities.values()), newest_snapshot_id(self.view.objects)

    def check_space(self, blocks: Collection[PlannedBlock]) -> None:
        """Refuse a run that the disk cannot hold: 16-bit tokens shrink by a seventh at most, so raw bytes are used."""
        place, identities = self.config.store_path, self.identities
        if is_url(place):
            return  # a bucket reports no free space
        needed = sum(
            len(rows) * clip_bytes(identities[name], block.kind)
            for block in blocks
            for name, rows in block.wanted.items()
        )
        free = shutil.disk_usage(place).free
        if needed > free:
            raise RunStoppedError(
                f"the run needs about {needed / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB free; "
                "choose another disk with --store, fewer clips with --limit, or "
                f"--storage-dtype {SMALLEST}"
            )

    def tasks(self, blocks: Collection[PlannedBlock]) -> Iterator[Task]:
        """A task for each block, each made when the cluster has capacity for it."""
        from pipeline.worker.block import BlockTask

        identities = self.identities
        of_this_run = partial(
            BlockTask,
            store=str(self.config.store_path),
            groups={name: identity.group_name for name, identity in identities.items()},
            accept_damaged=self.config.accept_damaged,
            engine=self.config.engine_settings,
        )
        other = OtherStore(self.config.reuse) if self.config.reuse and blocks else None
        same_media = same_media_tasks(self.view.writer, blocks, identities, self.listing.name, self._state[1])
        for block in blocks:
            task = of_this_run(
                root=narrowed(self.listing.root, block.clips["path"].to_pylist()),
                kind=block.kind,
                block=block.block,
                rows=block.rows,
                wanted=block.wanted,
                batch=block.batch,
                reuse=other and other.task(block, identities),
                same_media=same_media[block.kind],
            )
            yield Task(key=f"{block.kind}-{block.block:08d}-of-{block.batch}-{self.summary.run}", arguments=(task,))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """However the run ends, publish what was committed and record the run in the journal."""
        started = time.time()
        try:
            yield
        except BaseException:
            with suppress(MervCacheError):  # the first error is the one to report: on a full disk this fails as well
                self.write_record(started)
                log.info("stopped: %d of %d clips listed are committed", self.summary.committed, self.summary.listed)
            raise
        self.write_record(started)

    def write_record(self, started: float) -> None:
        """Publish what is committed and write the run's record; `started` is a Unix time."""
        self.summary.elapsed_s = time.time() - started
        self.summary.snapshot = self.view.writer.publish_snapshot()
        self._count_outcomes(self.summary.snapshot)
        encoders = {name: encoder.journal_entry for name, encoder in self.encoders.items()}
        record = run_record(self.config, self.listing, encoders, self.summary, started)
        self.view.writer.journal(f"{self.summary.run}-driver", record)
        self.view.objects.cleanup_tmp()  # what workers that died were writing

    def _count_outcomes(self, snapshot: str) -> None:
        """Listed clips that have tokens of every encoder of this run, or failed for one, now or earlier."""
        store = FeatureStore(str(self.config.store_path), snapshot, objects=self.view.objects)
        wanted = {identity.id for identity in self.identities.values()}
        keys = [key for key, identity in store.encoders.items() if identity.id in wanted]
        listed = {clip.clip_id for clip in self.listing.clips}
        clips = store.clips
        for key in keys:
            clips = clips.filter(clips[key])
        self.summary.committed = len(listed.intersection(clips["clip_id"].to_pylist())) if keys else 0
        failed = store.quarantine.select(["clip_id", "encoder"]).to_pylist()
        self.summary.quarantined = len({row["clip_id"] for row in failed if row["encoder"] in keys} & listed)


def run_blocks(
    client: Client,
    store: StoreWriter,
    tasks: Iterator[Task],
    summary: ExtractSummary,
    config: ExtractConfig,
    *,
    total: int,  # clips in all the tasks
    quiet: bool,
) -> None:
    """Submit the tasks and count their results; snapshots are published meanwhile, so that readers see progress."""
    from pipeline.worker.isolate import compute_block, extract_isolated

    request, published, loading_s = config.cluster_request, time.monotonic(), worker_seconds(client)
    progress = ProgressLine("extract", total=total, unit="clips", startup_s=summary.startup_s, quiet=quiet)

    def show_waiting(seconds: float) -> None:
        limit_s = request.worker_wait_s
        progress.wait(f"no worker for {seconds:.0f} s, stops after {limit_s:.0f} s" if seconds else "")

    listener = Listener(
        report=lambda task, attempt, report: progress.report(task.key, attempt, BlockCounts(**report).progress),
        waiting=show_waiting,
        workers_came=lambda addresses: check_cluster(client, request, addresses),
    )
    outcomes = run_tasks(
        client,
        compute_block,
        tasks,
        is_final=lambda error: isinstance(error, RunStoppedError),
        after_deaths=extract_isolated,
        worker_wait_s=request.worker_wait_s,
        listener=listener,
        per_worker=MAX_BLOCKS + QUEUED_TASKS,
    )
    with progress, closing(outcomes):
        for outcome in outcomes:
            _count(outcome, summary, progress)
            if summary.predicted is None:
                predicted = predict_from_first_blocks(
                    done=summary.clips,
                    total=total,
                    seconds=progress.elapsed_s,
                    num_bytes=summary.bytes,
                    worker_s=worker_seconds(client),
                    loading_s=loading_s,
                )
                summary.predicted = predicted and predicted.to_dict()
            if summary.failed >= MIN_FAILED and summary.failed > config.max_failed * summary.clips:
                worst = ", ".join(f"{n} x {reason}" for reason, n in Counter(summary.reasons).most_common(3))
                raise RunStoppedError(
                    f"{summary.failed} of {summary.clips} clips failed, more than --max-failed {config.max_failed:g}: "
                    f"{worst}; fix the cause, or raise --max-failed, and run again"
                )
            if time.monotonic() - published > SNAPSHOT_INTERVAL_S:
                store.publish_snapshot()
                published = time.monotonic()
    remove_all_marks(str(config.store_path))


def _count(outcome: Outcome, summary: ExtractSummary, progress: ProgressLine) -> None:
    """Count a block that is done; raise for one that could not be computed."""
    error = outcome.error
    if error is None:
        summary.add(outcome.result)
        outcome.result.emit()
        progress.finish(outcome.task.key, outcome.result.progress)
        return
    if isinstance(error, RunStoppedError):
        raise error
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""  # for a bug report
    raise RunStoppedError(
        f"block {outcome.task.key} failed twice: {type(error).__name__}: {error}{where}; "
        "everything committed so far is kept, run the same command again after fixing the cause"
    ) from error

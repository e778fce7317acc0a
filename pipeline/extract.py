"""Extraction, from the driver's chair: list, give out rows, hand blocks to the cluster, publish snapshots.

Comes in: an `ExtractConfig`. Goes out: a store with every block committed that could be, and a summary. The driver
moves no frames and no tokens and loads no model; it may be killed at any moment, and the same command goes on.

Blocks on the cluster: handed out, watched, counted.

Comes in: tasks, a store and a summary to fill. Goes out: the summary's counts. Workers commit the blocks themselves;
what they report while they compute only moves the progress line. A block that workers died of is computed once more,
alone and under suspicion.

What a store refuses, told before anything is listed or loaded: loading four encoders takes a minute and more.

Comes in: an `ExtractConfig`. Goes out: nothing, or the error that the run would end with. The same questions are asked
again where something is written, for another driver may have been there meanwhile.

Samples into the store, so that a narrow run takes nothing away.

Comes in: a listing, perhaps of a few clips only (`--limit`, `--kind`, a folder that is not mounted today). Goes out:
new versions of the samples. A listing speaks for the clips that it lists; of every other clip in the store, whose
tokens stay as well, the samples stay. Stored samples are read only where there are such clips.
"""

from __future__ import annotations

import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from featurestore.clips import KINDS, Sample
from featurestore.identity import FeatureIdentity
from featurestore.layout import ROOT_METADATA
from featurestore.lease import StoreLease
from featurestore.locate import Place, check_room_for_store, is_url
from featurestore.objects.open import check_writable, open_objects
from featurestore.storage_dtypes import SMALLEST
from featurestore.writer import StoreWriter, check_holds_nothing_else
from featurestore.zarr_metadata import clip_bytes
from jobs.clusters import check_cluster, check_scheduler, connect
from jobs.metrics import dashboard_lines, performance_report
from jobs.run import Listener, Outcome, Task, run_tasks
from jobs.settings import ClusterRequest
from mervcache.console import Counts, ProgressLine
from mervcache.errors import MervCacheError, RunStoppedError
from pipeline.config import ExtractConfig
from pipeline.datasets import DatasetListing, list_clips
from pipeline.plan import NOTHING_STALE, PlannedBlock, plan_blocks
from pipeline.refresh import identity_notes, scan_media
from pipeline.retry import clips_to_retry
from pipeline.reuse import OtherStore
from pipeline.run_encoders import Say, describe, is_up_to_date, on_a_worker
from pipeline.summary import DECODING, ExtractSummary, from_first_blocks, read_plan, run_record
from pipeline.worker.isolate import remove_all_marks
from pipeline.worker.reports import BlockCounts, EncoderDescription

if TYPE_CHECKING:
    from distributed import Client

BESIDE = ("total", DECODING)  # not counted as a worker's stages: the total, and decoding, which runs beside
SNAPSHOT_INTERVAL_S = 180.0
MIN_FAILED = 32  # clips; below this a share of failures says nothing


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
    """Hand out the tasks and count what comes back; readers see the store grow meanwhile."""
    published = time.monotonic()
    with (
        ProgressLine("extract", total=total, unit="clips", quiet=quiet) as progress,
        closing(_outcomes(client, tasks, progress, config.cluster_request)) as outcomes,
    ):
        for outcome in outcomes:
            _count(outcome, summary, progress)
            _predict(summary, total, progress.elapsed_s)
            _check_failures(summary, config.max_failed)
            if time.monotonic() - published > SNAPSHOT_INTERVAL_S:
                store.publish_snapshot()
                published = time.monotonic()
    remove_all_marks(str(config.store_path))


def _outcomes(
    client: Client, tasks: Iterator[Task], progress: ProgressLine, request: ClusterRequest
) -> Iterator[Outcome]:
    """Outcomes as blocks end; what happens meanwhile moves the progress line."""
    from pipeline.worker.isolate import compute_block, extract_isolated

    return run_tasks(
        client,
        compute_block,
        tasks,
        is_final=lambda error: isinstance(error, RunStoppedError),
        after_deaths=extract_isolated,
        worker_wait_s=request.worker_wait_s,
        listener=Listener(
            report=lambda task, attempt, told: progress.report(task.key, attempt, _counts(BlockCounts(**told))),
            waiting=lambda seconds: progress.wait(_waiting(seconds, request.worker_wait_s)),
            workers_came=lambda addresses: check_cluster(client, request, addresses),
        ),
    )


def _waiting(seconds: float, limit_s: float) -> str:
    """What the progress line says where the cluster has no worker."""
    return f"no worker for {seconds:.0f} s, stops after {limit_s:.0f} s" if seconds else ""


def _count(outcome: Outcome, summary: ExtractSummary, progress: ProgressLine) -> None:
    """Count a block that is done; raise for one that could not be computed."""
    if outcome.error is not None:
        if isinstance(outcome.error, RunStoppedError):
            raise outcome.error
        raise RunStoppedError(
            f"block {outcome.task.key} failed twice: {type(outcome.error).__name__}: {outcome.error}"
            f"{_where(outcome.error)}; "
            "everything committed so far is kept, run the same command again after mending the cause"
        ) from outcome.error
    summary.add(outcome.result)
    progress.finish(outcome.task.key, _counts(outcome.result))


def _check_failures(summary: ExtractSummary, max_failed: float) -> None:
    """Stop the run where more than its share of clips failed: then it is not the clips."""
    if summary.failed >= MIN_FAILED and summary.failed > max_failed * summary.clips:
        raise RunStoppedError(
            f"{summary.failed} of {summary.clips} clips failed, more than --max-failed {max_failed:g}: "
            f"{_worst(summary.reasons)}; mend the cause, or raise --max-failed, and run again"
        )


def _predict(summary: ExtractSummary, total: int, seconds: float) -> None:
    """Where nobody planned, a run's own first blocks tell what the whole will cost."""
    if summary.predicted is None:
        early = from_first_blocks(done=summary.clips, total=total, seconds=seconds, num_bytes=summary.bytes)
        summary.predicted = early and early.to_dict()


def _counts(block: BlockCounts) -> Counts:
    """A block's counts, so far or at its end, as the progress line shows them."""
    return Counts(
        done=block.clips,
        failed=block.failed,
        amounts={"frames": block.frames, "MB": block.bytes / 1e6},
        seconds={name.removeprefix("encode:"): s for name, s in block.seconds.items() if name not in BESIDE},
        notes={"batches halved": block.halvings},
    )


def _where(error: BaseException) -> str:
    """File and line that raised: what a bug report needs."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _worst(reasons: dict[str, int]) -> str:
    """The three most frequent reasons."""
    return ", ".join(f"{count} x {reason}" for reason, count in Counter(reasons).most_common(3))


def check_request(config: ExtractConfig) -> None:
    """Raise what the place, or the store in it, has against the config, and what no cluster is called.

    Errors: `ClusterError` for an unknown scheduler; `UserError` for a place where no store can be and for other block
    rows; `IdentityConflictError` where an encoder is stored under other settings.
    """
    check_scheduler(config.scheduler)
    if not check_place(config.store_path):
        return
    store = StoreWriter.open(config.store_path)
    store.check_block_rows(config.block_rows)
    if not config.new_identity:
        _check_settings(store, config)


def check_place(place: Place) -> bool:
    """Raise `UserError` where no store can be, or where something else is; returns whether there is a store."""
    check_writable(place)
    check_room_for_store(place)
    objects = open_objects(place)
    is_there = objects.exists(ROOT_METADATA)
    if not is_there:
        check_holds_nothing_else(objects, place)
    return is_there


def _check_settings(store: StoreWriter, config: ExtractConfig) -> None:
    """All of an identity but what the weights hash to is known by now: as if they were the stored ones."""
    for settings in config.encoder_settings:
        stored = store.stored_identities(settings.name)
        asked = [settings.identity(known.weights_sha256) for known in stored]
        if stored and not {identity.id for identity in asked} & {known.id for known in stored}:
            store.check_identity(asked[0])


def add_listed_samples(store: StoreWriter, listing: DatasetListing, *, is_whole: bool) -> None:
    """Write a dataset's samples; `is_whole` says that nothing was left out of the listing by request."""
    listed = {clip.clip_id for clip in listing.clips}
    is_growing_only = is_whole and listed.issuperset(store.clips()["clip_id"].to_pylist())

    def stays(sample: Sample) -> bool:
        return not is_whole if sample.clip_id is None else sample.clip_id not in listed

    for name, samples in listing.samples.items():
        store.add_samples(name, samples if is_growing_only else merged(store.samples(name), samples, stays))


def merged(stored: Iterable[Sample], listed: Sequence[Sample], stays: Callable[[Sample], bool]) -> list[Sample]:
    """Listed samples, and of the stored ones those that stay, in the stored order; new ones follow."""
    fresh = {_key(sample): sample for sample in listed}
    kept = [sample for sample in stored if _key(sample) in fresh or stays(sample)]
    if all(_key(sample) in fresh for sample in kept):
        return list(listed)
    return [*(fresh.pop(_key(sample), sample) for sample in kept), *fresh.values()]


def _key(sample: Sample) -> tuple[str, str | None]:
    """An edited annotation file may give one clip's record id to another."""
    return sample.sample_id, sample.clip_id


def extract(config: ExtractConfig, *, quiet: bool = False, say: Say = lambda line: None) -> ExtractSummary:
    """Bring the store up to the config: compute what is missing, touch nothing that is there.

    Raises `IdentityConflictError` where an encoder is stored under another identity, and `RunStoppedError` where the
    environment failed; in both cases everything committed so far stays.
    """
    check_request(config)
    listing = list_clips(config)
    summary = ExtractSummary.begin(config, listing)
    if config.forecast:
        summary.predicted = read_plan(config.forecast).to_dict()
    for note in listing.notes:
        say(note)
    if (encoders := is_up_to_date(config, listing)) is not None:
        with Extraction.begin(config, listing, encoders, summary, say) as extraction:
            extraction.finish_without_work()
        return summary
    say(f"{config.dataset}: {len(listing.clips)} clips listed; loading {', '.join(config.encoders)}")
    with (
        connect(config.cluster_request, say=say) as client,
        performance_report(_report_path(config, summary, say), say),
    ):
        for line in dashboard_lines(client) if config.dashboard else ():
            say(line)
        with Extraction.begin(config, listing, describe(client, config, say), summary, say) as extraction:
            extraction.fill(client, quiet=quiet)
    return summary


def _report_path(config: ExtractConfig, summary: ExtractSummary, say: Say) -> Path | None:
    """Where Dask's report of the run goes; beside the store, which holds only what somebody depends on."""
    if config.performance_report is None and not config.dashboard:
        return None
    place = config.store_path
    beside = Path(str(place).rpartition("/")[2]) if is_url(place) else Path(place)
    path = Path(config.performance_report or beside.with_name(f"{beside.stem}-dask-{summary.run}.html"))
    say(f"performance report, at the end: {path}")
    return path


@dataclass(frozen=True, kw_only=True, eq=False)
class Extraction:
    """A run in the making: what was asked for, what is listed, who encodes it, and the store that it goes to."""

    config: ExtractConfig
    listing: DatasetListing
    encoders: Mapping[str, EncoderDescription]
    store: StoreWriter
    summary: ExtractSummary  # filled in as the run goes on
    say: Say

    @classmethod
    @contextmanager
    def begin(
        cls,
        config: ExtractConfig,
        listing: DatasetListing,
        encoders: Mapping[str, EncoderDescription],
        summary: ExtractSummary,
        say: Say = lambda line: None,
    ) -> Iterator[Extraction]:
        """Open the store, or make it, and hold its lease: a second driver would be safe, and waste its work."""
        store = StoreWriter.open_or_create(config.store_path, block_rows=dict(config.block_rows) or None)
        with StoreLease(config.store_path, summary.run):
            yield cls(config=config, listing=listing, encoders=encoders, store=store, summary=summary, say=say)

    @property
    def identities(self) -> dict[str, FeatureIdentity]:
        return {name: encoder.identity for name, encoder in self.encoders.items()}

    @property
    def groups(self) -> dict[str, str]:
        """Encoder -> the folder of its tokens, ENCODER-IDENTITY12."""
        return {name: identity.group_name for name, identity in self.identities.items()}

    @property
    def kinds(self) -> list[str]:
        """Kinds of the listed clips."""
        return [kind for kind in KINDS if any(clip.kind == kind for clip in self.listing.clips)]

    def finish_without_work(self) -> None:
        """A run that has nothing to compute: a look at the media, samples, and its record."""
        started = time.time()
        self.stale_clips()
        self.add_samples()
        self.write_record(started)

    def fill(self, client: Client, *, quiet: bool) -> None:
        """Give out rows, plan what is missing, and run it."""
        self.register()
        if self.config.retry_quarantine:
            self.retry_quarantine(client)
        if self.config.canaries:
            self.add_reference_clips(client)
        for line in identity_notes(self.store, self.identities) if self.config.new_identity else ():
            self.say(line)
        blocks = self.plan()
        self.check_space(blocks)
        total, tasks = sum(block.num_clips for block in blocks), self.tasks(blocks)
        with self.recording():
            run_blocks(client, self.store, tasks, self.summary, self.config, total=total, quiet=quiet)

    def register(self) -> None:
        """Make the encoders' groups, give out rows and write samples: all that must stand before the first block.

        Groups come first: where they are refused, nothing has been written.
        """
        for kind in self.kinds:
            for encoder in self.encoders.values():
                self.store.ensure_group(
                    kind,
                    encoder.identity,
                    batch_shape=self._batch_shape(kind, encoder),
                    weights_label=encoder.weights_label,
                    new_identity=self.config.new_identity,
                )
        self.store.add_clips(self.listing.clips)
        self.add_samples()

    def _batch_shape(self, kind: str, encoder: EncoderDescription) -> int:
        """Clips per forward: as asked, else as the store was begun with, else what the device holds."""
        if asked := self.config.batch.get(kind):
            return asked
        group = encoder.identity.group_name
        if group in self.store.encoder_groups(kind):
            return self.store.open_group(kind, group).batch_shape
        return encoder.batch[kind]

    def add_samples(self) -> None:
        """Keep the conversations about the clips, unless the config forbids it."""
        if self.config.samples:
            is_whole = self.config.kind is None and self.config.limit is None
            add_listed_samples(self.store, self.listing, is_whole=is_whole)

    def retry_quarantine(self, client: Client) -> None:
        """Give new rows to the clips that failed and may do better now."""
        second = clips_to_retry(client, self.store, self.config, self.listing, self.identities)
        if second.unchanged:
            self.summary.unchanged = second.unchanged
            self.say(
                f"{second.unchanged} of {second.unchanged + len(second.clips)} quarantined clips fail as before: "
                "they stay as they are, nothing is written"
            )
        self.store.add_clips(second.clips, retry=True)

    def add_reference_clips(self, client: Client) -> None:
        """Canaries for the groups that have none, before the first block: a run that is cut short has them."""
        from pipeline.reference_clips import ReferenceClipTask, missing_reference_clips, write_reference_clips

        if missing := missing_reference_clips(self.store, self.identities, self.kinds):
            task = ReferenceClipTask(
                store=str(self.config.store_path), engine=self.config.engine_settings, groups=missing
            )
            done = on_a_worker(client, self.config, write_reference_clips, task)
            self.summary.canaries = done["written"]
            for problem in done["problems"]:
                self.say(f"no canaries, which `verify --parity` needs: {problem}")

    def plan(self) -> list[PlannedBlock]:
        """Blocks with something left to compute; with --refresh, clips whose media changed are in them."""
        clip_ids = {clip.clip_id for clip in self.listing.clips}
        return plan_blocks(self.store, self.identities, clip_ids=clip_ids, stale=self.stale_clips())

    def stale_clips(self) -> Mapping[str, Collection[str]]:
        """Look at the media, count and tell what changed; by encoder, the clips to compute again for it."""
        found = scan_media(self.store, self.listing, self.identities, refresh=self.config.refresh, say=self.say)
        self.summary.not_compared = len(found.not_compared)
        if self.config.refresh:
            self.summary.refreshed = len(found.clips)
            return found.changed
        self.summary.changed = len(found.clips)
        return NOTHING_STALE

    def check_space(self, blocks: Collection[PlannedBlock]) -> None:
        """Refuse to start what cannot end: 16-bit tokens shrink by a seventh at most, so raw bytes are the forecast."""
        place, identities = self.config.store_path, self.identities
        if is_url(place):
            return  # a bucket has no end that it tells
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
        """A task for each block, each made when the cluster has room for it."""
        from pipeline.worker.block import BlockTask

        of_this_run = partial(
            BlockTask,
            store=str(self.config.store_path),
            root=str(self.listing.root),
            groups=self.groups,
            accept_damaged=self.config.accept_damaged,
            engine=self.config.engine_settings,
        )
        identities = self.identities
        other = OtherStore(self.config.reuse) if self.config.reuse and blocks else None
        for block in blocks:
            task = of_this_run(
                kind=block.kind,
                block=block.block,
                rows=block.rows,
                wanted=block.wanted,
                batch=block.batch,
                reuse=other and other.task(block, identities),
            )
            yield Task(key=f"{block.kind}-{block.block:08d}-of-{block.batch}-{self.summary.run}", arguments=(task,))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """However the run ends, readers see what was committed and the journal tells what happened."""
        started = time.time()
        try:
            yield
        except BaseException:
            with suppress(MervCacheError):  # the first error is the one to tell: on a full disk this fails as well
                self.write_record(started)
            raise
        self.write_record(started)

    def write_record(self, started: float) -> None:
        """Publish what is committed and write the run's record; `started` is a Unix time."""
        self.summary.elapsed_s = time.time() - started
        self.summary.snapshot = self.store.publish_snapshot()
        ran_as = {name: encoder.journal_entry for name, encoder in self.encoders.items()}
        record = run_record(self.config, self.listing, ran_as, self.summary, started)
        self.store.journal(f"{self.summary.run}-driver", record)

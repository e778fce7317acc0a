"""Extraction, from the driver's chair: list, give out rows, hand blocks to the cluster, publish snapshots.

Comes in: an `ExtractConfig`. Goes out: a store with every block committed that could be, and a summary. The driver
moves no frames and no tokens and loads no model; it may be killed at any moment, and the same command goes on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from featurestore.clips import KINDS
from featurestore.identity import FeatureIdentity
from featurestore.lease import StoreLease
from featurestore.locate import is_url
from featurestore.writer import StoreWriter
from featurestore.zarr_metadata import clip_bytes
from jobs.clusters import connect
from jobs.metrics import dashboard_lines, performance_report
from jobs.run import Task
from mervcache.errors import MervCacheError, RunStoppedError
from pipeline.admission import check_request
from pipeline.config import ExtractConfig
from pipeline.costs.prediction import read_plan
from pipeline.datasets import DatasetListing, list_clips
from pipeline.describe import Say, describe, on_a_worker, settled
from pipeline.keep_samples import add_listed_samples
from pipeline.plan import NOTHING_STALE, PlannedBlock, plan_blocks
from pipeline.resume.refresh import look_at_media, told_identities
from pipeline.resume.reuse import OtherStore
from pipeline.resume.second_try import clips_to_retry
from pipeline.run_blocks import run_blocks
from pipeline.summary import ExtractSummary, run_record
from pipeline.worker.reports import EncoderDescription

if TYPE_CHECKING:
    from distributed import Client


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
    if (encoders := settled(config, listing)) is not None:
        with Extraction.begin(config, listing, encoders, summary, say) as extraction:
            extraction.settle()
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

    def settle(self) -> None:
        """A run that has nothing to compute: a look at the media, samples, and its record."""
        started = time.time()
        self.stale_clips()
        self.add_samples()
        self.sum_up(started)

    def fill(self, client: Client, *, quiet: bool) -> None:
        """Give out rows, plan what is missing, and run it."""
        self.register()
        if self.config.retry_quarantine:
            self.retry_quarantine(client)
        if self.config.canaries:
            self.add_canaries(client)
        for line in told_identities(self.store, self.identities) if self.config.new_identity else ():
            self.say(line)
        blocks = self.plan()
        self.check_space(blocks)
        total, tasks = sum(block.num_clips for block in blocks), self.tasks(blocks)
        with self.summed_up():
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

    def add_canaries(self, client: Client) -> None:
        """Canaries for the groups that have none, before the first block: a run that is cut short has them."""
        from pipeline.certify.canaries import CanaryTask, missing_canaries, write_canaries

        if missing := missing_canaries(self.store, self.identities, self.kinds):
            task = CanaryTask(store=str(self.config.store_path), engine=self.config.engine_settings, groups=missing)
            done = on_a_worker(client, self.config, write_canaries, task)
            self.summary.canaries = done["written"]
            for problem in done["problems"]:
                self.say(f"no canaries, which `verify --parity` needs: {problem}")

    def plan(self) -> list[PlannedBlock]:
        """Blocks with something left to compute; with --refresh, clips whose media changed are in them."""
        clip_ids = {clip.clip_id for clip in self.listing.clips}
        return plan_blocks(self.store, self.identities, clip_ids=clip_ids, stale=self.stale_clips())

    def stale_clips(self) -> Mapping[str, Collection[str]]:
        """Look at the media, count and tell what changed; by encoder, the clips to compute again for it."""
        found = look_at_media(self.store, self.listing, self.identities, refresh=self.config.refresh, say=self.say)
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
                "choose another disk with --store, fewer clips with --limit, or --storage-dtype uint8"
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
    def summed_up(self) -> Iterator[None]:
        """However the run ends, readers see what was committed and the journal tells what happened."""
        started = time.time()
        try:
            yield
        except BaseException:
            with suppress(MervCacheError):  # the first error is the one to tell: on a full disk this fails as well
                self.sum_up(started)
            raise
        self.sum_up(started)

    def sum_up(self, started: float) -> None:
        """Publish what is committed and write the run's record; `started` is a Unix time."""
        self.summary.elapsed_s = time.time() - started
        self.summary.snapshot = self.store.publish_snapshot()
        ran_as = {name: encoder.journal_entry for name, encoder in self.encoders.items()}
        record = run_record(self.config, self.listing, ran_as, self.summary, started)
        self.store.journal(f"{self.summary.run}-driver", record)

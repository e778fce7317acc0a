"""The encoders of a run, as its driver knows them: identity, label, device; told by a worker, or from memory.

Comes in: an `ExtractConfig`. Goes out: `EncoderDescription` by name. The driver has no torch: a worker loads the
encoders and tells. What their weights hashed to is remembered, so that a run that turns out to have nothing to do says
so at once (`is_up_to_date`). Memory decides nothing that is written: tokens are computed under what a worker loaded.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from featurestore.identity import FeatureIdentity
from featurestore.layout import ROOT_METADATA
from featurestore.objects.open import open_objects
from featurestore.records import driver_runs, tombstoned_clips
from featurestore.writer import StoreWriter
from jobs.run import Listener, Report, Task, run_tasks
from mervcache.errors import MervCacheError, RunStoppedError
from pipeline.config import ExtractConfig
from pipeline.datasets import DatasetListing
from pipeline.encoders.weights import cache_weights_digest, cached_weights_digest, parse_weights, weights_fingerprint
from pipeline.plan import plan_blocks
from pipeline.refresh import stale_media
from pipeline.worker.reports import EncoderDescription

if TYPE_CHECKING:
    from distributed import Client

Say = Callable[[str], None]


class Loading:
    """Says one line for each encoder that a worker has loaded."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._told: set[str] = set()

    def tell(self, name: str, seconds: float) -> None:
        if name not in self._told:
            self._told.add(name)
            self._say(f"{name} loaded in {seconds:.1f} s")

    @property
    def listener(self) -> Listener:
        """For a run of tasks that load encoders."""
        return Listener(report=self._hear)

    def _hear(self, task: Task, attempt: str, report: Report) -> None:
        self.tell(report["loaded"], report["seconds"])


def describe(client: Client, config: ExtractConfig, say: Say = lambda line: None) -> dict[str, EncoderDescription]:
    """Have a worker load the encoders and describe them; `say` gets a line for each, with the seconds it took."""
    from pipeline.worker.engine import describe_encoders  # only here and in workers: it imports torch

    loading = Loading(say)
    encoders = on_a_worker(client, config, describe_encoders, config.engine_settings, listener=loading.listener)
    for name, encoder in encoders.items():
        loading.tell(name, encoder.load_s)  # a report may come late or never
    _remember(config, encoders, say)
    return encoders


def on_a_worker(
    client: Client,
    config: ExtractConfig,
    function: Callable[..., Any],
    *arguments: Any,
    listener: Listener = Listener(),
) -> Any:
    """Run the function on any one worker and return its result; raises if no worker appears in time."""
    task = Task(key=f"{function.__name__}-{uuid.uuid4().hex}", arguments=arguments)
    wait_s = config.cluster_request.worker_wait_s
    (outcome,) = run_tasks(client, function, [task], attempts=1, worker_wait_s=wait_s, listener=listener)
    if outcome.error is None:
        return outcome.result
    if isinstance(outcome.error, MervCacheError):
        raise outcome.error
    raise RunStoppedError(
        f"{function.__name__} failed on a worker: {type(outcome.error).__name__}: {outcome.error}; nothing was "
        "computed: look whether something else holds the device or its memory, and run the same command again"
    ) from outcome.error


def remembered_identities(config: ExtractConfig) -> dict[str, FeatureIdentity] | None:
    """Identities by what the weights hashed to when they were last loaded; None where that is not known of all."""
    found = {}
    for settings in config.encoder_settings:
        sha256 = cached_weights_digest(weights_fingerprint(settings.spec, settings.weights))
        if sha256 is None:
            return None
        found[settings.name] = settings.identity(sha256)
    return found


def is_up_to_date(config: ExtractConfig, listing: DatasetListing) -> dict[str, EncoderDescription] | None:
    """The encoders, if the store lacks nothing of the listing under their remembered digests; None: load them and see.

    Device and threads are those of the last run that had the encoder, for the record of this one.
    """
    if config.retry_quarantine or not open_objects(config.store_path).exists(ROOT_METADATA):
        return None
    identities = remembered_identities(config)
    if identities is None:
        return None
    store = StoreWriter.open(config.store_path)
    if _lacks_anything(store, config, listing, identities):
        return None
    entries = _last_entries(driver_runs(store.objects))
    if not all(identity.group_name in entries for identity in identities.values()):
        return None
    return {
        settings.name: EncoderDescription(
            identity=identities[settings.name],
            weights_label=parse_weights(settings.weights).label,
            **entries[identities[settings.name].group_name],
        )
        for settings in config.encoder_settings
    }


def _lacks_anything(
    store: StoreWriter, config: ExtractConfig, listing: DatasetListing, identities: Mapping[str, FeatureIdentity]
) -> bool:
    kinds = sorted({clip.kind for clip in listing.clips})
    groups = {identity.group_name for identity in identities.values()}
    for kind in kinds:
        if not groups <= store.encoder_groups(kind).keys():
            return True
        shapes = {store.open_group(kind, group).batch_shape for group in groups}
        if shapes != {config.batch.get(kind)} and kind in config.batch:
            return True  # another batch shape than the stored one is an error, told where groups are made
    if config.canaries:
        from pipeline.reference_clips import missing_reference_clips  # only where they are asked for

        if missing_reference_clips(store, identities, kinds):
            return True
    clip_ids = {clip.clip_id for clip in listing.clips}
    if not clip_ids <= {*store.clips()["clip_id"].to_pylist(), *tombstoned_clips(store.objects)}:
        return True
    if plan_blocks(store, identities, clip_ids=clip_ids):
        return True
    return config.refresh and bool(stale_media(store, listing, identities).clips)


def _last_entries(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Group -> device and threads of the newest run that had it."""
    return {
        entry["group"]: {"device": entry["device"], "threads": entry["threads"]}
        for run in runs
        for entry in run["encoders"].values()
        if {"group", "device", "threads"} <= entry.keys()
    }


def _remember(config: ExtractConfig, encoders: Mapping[str, EncoderDescription], say: Say) -> None:
    """Keep what the weights hashed to, where this machine sees the files that the worker read."""
    for settings in config.encoder_settings:
        loaded = encoders[settings.name]
        mark = weights_fingerprint(settings.spec, settings.weights)
        if mark == loaded.fingerprint and cache_weights_digest(mark, loaded.identity.weights_sha256):
            say(f"the remembered digest of {settings.name}'s weights was wrong: replaced by that of what was loaded")

"""Encoder identities of a run: reported by a worker, or computed from a cached digest of the weights.

The driver imports no torch: a worker loads the encoders and describes them. Remembered digests only decide whether a
run has nothing to do; tokens are always written under the identity that a worker loaded.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from featurestore.identity import FeatureIdentity
from featurestore.store import FeatureStore
from jobs.run import Listener, Report, Task, run_tasks
from mervcache.errors import MervCacheError, RunStoppedError, UserError
from pipeline.config import EncoderSettings, ExtractConfig
from pipeline.encoders.weights import cache_weights_digest, cached_weights_digest, parse_weights, weights_fingerprint
from pipeline.worker.admission import run_alone
from pipeline.worker.reports import EncoderDescription

if TYPE_CHECKING:
    from distributed import Client

    from featurestore.writer import StoreWriter

log = logging.getLogger(__name__)


class LoadingLog:
    """Logs one line for each encoder that a worker has loaded; `listener` is for a run of tasks that load encoders."""

    def __init__(self) -> None:
        self._logged: set[str] = set()
        self.listener = Listener(report=self._report)

    def loaded(self, name: str, seconds: float) -> None:
        if name not in self._logged:
            self._logged.add(name)
            log.info("%s loaded in %.1f s", name, seconds)

    def _report(self, task: Task, attempt: str, report: Report) -> None:
        self.loaded(report["loaded"], report["seconds"])


def describe(client: Client, config: ExtractConfig) -> dict[str, EncoderDescription]:
    """Have a worker load the encoders and describe them, and remember what their weights hash to."""
    from pipeline.worker.engine import describe_encoders  # only here and in workers: it imports torch

    loading = LoadingLog()
    encoders = on_a_worker(client, config, describe_encoders, config.engine_settings, listener=loading.listener)
    for name, encoder in encoders.items():
        loading.loaded(name, encoder.load_s)  # a report may come late or never
    for settings in config.encoder_settings:
        encoder = encoders[settings.key]
        files = weights_fingerprint(settings.spec, settings.weights)  # on this machine
        if files == encoder.fingerprint and cache_weights_digest(files, encoder.identity.weights_sha256):
            log.info("the remembered digest of %s's weights was wrong: replaced by the loaded one", settings.key)
    return encoders


def on_a_worker(
    client: Client,
    config: ExtractConfig,
    function: Callable[..., Any],
    *arguments: Any,
    listener: Listener = Listener(),
) -> Any:
    """Run the function on any one worker, with no block in flight there, and return its result.

    Raises if no worker appears in time.
    """
    task = Task(key=f"{function.__name__}-{uuid.uuid4().hex}", arguments=(function, *arguments))
    wait_s = config.cluster_request.worker_wait_s
    (outcome,) = run_tasks(client, run_alone, [task], attempts=1, worker_wait_s=wait_s, listener=listener)
    if outcome.error is None:
        return outcome.result
    if isinstance(outcome.error, MervCacheError):
        raise outcome.error
    raise RunStoppedError(
        f"{function.__name__} failed on a worker: {type(outcome.error).__name__}: {outcome.error}; nothing was "
        "computed: check whether another process holds the device or its memory, and run the same command again"
    ) from outcome.error


def remembered_encoders(
    config: ExtractConfig, runs: Sequence[Mapping[str, Any]]
) -> dict[str, EncoderDescription] | None:
    """The encoders by what their weights hashed to when they were last loaded; None where one is not known.

    Device and threads are those of the newest of `runs` that had the encoder, for the record of this one.
    """
    last = {
        entry["group"]: {"device": entry["device"], "threads": entry["threads"]}
        for run in runs
        for entry in run["encoders"].values()
        if {"group", "device", "threads"} <= entry.keys()
    }
    encoders = {}
    for settings in config.encoder_settings:
        sha256 = cached_weights_digest(weights_fingerprint(settings.spec, settings.weights))
        if sha256 is None:
            return None
        identity = settings.identity(sha256)
        if identity.group_name not in last:
            return None
        encoders[settings.key] = EncoderDescription(
            identity=identity,
            weights_label=parse_weights(settings.weights).label,
            **last[identity.group_name],
        )
    return encoders


def encoders_with_several(
    writer: StoreWriter, identities: Mapping[str, FeatureIdentity], *, new_identity: bool
) -> set[str]:
    """Encoders of which a run asks for several identities, which needs no `--new-identity`.

    `IdentityConflictError` where the store holds such an encoder and none of these identities.
    """
    by_encoder: dict[str, list[FeatureIdentity]] = {}
    for identity in identities.values():
        by_encoder.setdefault(identity.encoder, []).append(identity)
    several = {name: requested for name, requested in by_encoder.items() if len(requested) > 1}
    for name, requested in several.items() if not new_identity else ():
        stored = {identity.id for identity in writer.stored_identities(name)}
        if not stored.intersection(identity.id for identity in requested):
            writer.check_identity(requested[0])
    return set(several)


@dataclass(frozen=True, kw_only=True)
class WantedEncoder:
    """An encoder as the config names it, with the digest of its weights."""

    settings: EncoderSettings
    weights_sha256: str
    known: str  # how the digest is known: "remembered", "loaded", or "assumed"

    @cached_property
    def identity(self) -> FeatureIdentity:
        return self.settings.identity(self.weights_sha256)


def resolve_weights(settings: EncoderSettings, store: FeatureStore, runs: Sequence[Mapping[str, Any]]) -> WantedEncoder:
    """The digest of an encoder's weights: from the cache, else by loading them.

    Where they cannot be loaded here, the digest is that of the newest of `runs` whose config names the same weights.
    """
    files = weights_fingerprint(settings.spec, settings.weights)
    if sha256 := cached_weights_digest(files):
        return WantedEncoder(settings=settings, weights_sha256=sha256, known="remembered")
    from pipeline.encoders import load_encoder  # torch

    log.info("loading %s for the digest of its weights, which is cached from then on", settings.name)
    try:
        sha256 = load_encoder(settings.spec, settings.weights).weights_sha256
    except UserError:
        stored = {identity.group_name: identity for identity in store.encoders.values()}
        for run in reversed(runs):
            named = run["config"].get("weights", {})
            group = run["encoders"].get(settings.key, {}).get("group")
            if named.get(settings.name, named.get("", "hub")) == settings.weights and group in stored:
                sha256 = stored[group].weights_sha256
                return WantedEncoder(settings=settings, weights_sha256=sha256, known="assumed")
        raise
    if files == weights_fingerprint(settings.spec, settings.weights):
        cache_weights_digest(files, sha256)
    return WantedEncoder(settings=settings, weights_sha256=sha256, known="loaded")

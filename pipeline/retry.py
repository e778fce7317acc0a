"""Quarantined clips that are worth new rows.

A retry's rows come in whole blocks and stay, whatever comes of them. So clips whose media failed are first decoded once
on a worker. Those that fail for the same reason as before get no rows, and nothing is written of them. Whether a clip
that one encoder failed on does better shows only when it is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featurestore.clips import Clip
from featurestore.identity import FeatureIdentity
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter
from mervcache.errors import MediaError
from pipeline.config import EngineSettings, ExtractConfig
from pipeline.datasets import DatasetListing
from pipeline.decode.pool import decode_ahead
from pipeline.plan import plan_blocks
from pipeline.run_encoders import on_a_worker

if TYPE_CHECKING:
    from distributed import Client

Reasons = dict[str, set[tuple[str, str]]]  # clip id -> (scope, reason) of its failures


@dataclass(frozen=True, kw_only=True)
class RetryPlan:
    """What is to become of the clips that failed."""

    clips: tuple[Clip, ...]  # these may do better now: they get new rows
    unchanged: int = 0  # so many fail as before: nothing is written of them


def clips_to_retry(
    client: Client,
    store: StoreWriter,
    config: ExtractConfig,
    listing: DatasetListing,
    identities: Mapping[str, FeatureIdentity],
) -> RetryPlan:
    """Of the listed clips that failed with any of the encoders, those that may do better now."""
    failed = _failed(store, config, identities)
    clips = tuple(clip for clip in listing.clips if clip.clip_id in failed)
    suspects = [clip for clip in clips if {scope for scope, _ in failed[clip.clip_id]} == {"clip"}]
    if not suspects or config.reuse:  # another store may have tokens of media that cannot be decoded here
        return RetryPlan(clips=clips)
    found = on_a_worker(
        client, config, try_decoding, config.engine_settings, str(listing.root), suspects, config.accept_damaged
    )
    same = {clip_id for clip_id, reason in found.items() if failed[clip_id] == {("clip", reason)}}
    return RetryPlan(clips=tuple(clip for clip in clips if clip.clip_id not in same), unchanged=len(same))


def _failed(store: StoreWriter, config: ExtractConfig, identities: Mapping[str, FeatureIdentity]) -> Reasons:
    """What failed with any of the encoders, and waits in no later row of a retry cut short."""
    store.publish_snapshot()
    reader = FeatureStore.open(config.store_path)
    groups = {identity.group_name for identity in identities.values()}
    keys = {key for key, identity in reader.encoders.items() if identity.group_name in groups}
    text = (config.retry_reason or "").lower()
    failed: Reasons = {}
    for row in reader.quarantine.to_pylist():
        if row["encoder"] in keys and text in row["reason"].lower():
            failed.setdefault(row["clip_id"], set()).add((row["scope"], row["reason"]))
    for block in plan_blocks(store, identities, clip_ids=failed.keys()):
        for clip_id in block.clip_ids:
            failed.pop(clip_id, None)
    return failed


def try_decoding(settings: EngineSettings, root: str, clips: list[Clip], accept_damaged: bool) -> dict[str, str]:
    """Clip id -> reason of those that cannot be decoded; run by a worker."""
    from pipeline.worker.engine import decode_job, engine_for

    engine = engine_for(settings)
    encoders = engine.encoders.values()
    jobs = ((n, decode_job(root, clip, encoders, accept_damaged=accept_damaged)) for n, clip in enumerate(clips))
    tried = decode_ahead(jobs, engine.pool, engine.num_decoders)
    return {clips[n].clip_id: str(result) for n, result in tried if isinstance(result, MediaError)}

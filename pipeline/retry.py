"""Quarantined clips that are worth new rows.

New rows are permanent, whatever the retry's outcome. So clips whose media failed are first decoded once on a worker;
those that fail for the same reason as before get no rows. A failure of one encoder shows only when it encodes again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featurestore.clips import Clip
from featurestore.identity import FeatureIdentity
from featurestore.store import FeatureStore
from mervcache.errors import MediaError
from pipeline.config import EngineSettings, ExtractConfig
from pipeline.datasets import DatasetListing
from pipeline.decode.pool import decode_ahead
from pipeline.media import Root
from pipeline.plan import StoreView, plan_blocks
from pipeline.run_encoders import on_a_worker

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True, kw_only=True)
class RetryPlan:
    """What a retry does about the clips that failed."""

    clips: tuple[Clip, ...]  # these may succeed now: they get new rows
    unchanged: int = 0  # clips that fail as before: nothing is written for them


def plan_retry(
    client: Client,
    view: StoreView,
    config: ExtractConfig,
    listing: DatasetListing,
    identities: Mapping[str, FeatureIdentity],
) -> RetryPlan:
    """Of the listed clips that failed with any of the encoders, those that may succeed now."""
    view.writer.publish_snapshot()
    store = FeatureStore.open(config.store_path)
    groups = {identity.group_name for identity in identities.values()}
    keys = {key for key, identity in store.encoders.items() if identity.group_name in groups}
    text = (config.retry_reason or "").lower()
    failed: dict[str, set[tuple[str, str]]] = {}  # clip id -> (scope, reason) of its failures
    for row in store.quarantine.to_pylist():
        if row["encoder"] in keys and text in row["reason"].lower():
            failed.setdefault(row["clip_id"], set()).add((row["scope"], row["reason"]))
    for block in plan_blocks(view, identities, clip_ids=failed.keys()):
        for clip_id in block.clip_ids:  # has a row of an interrupted retry
            failed.pop(clip_id, None)
    clips = tuple(clip for clip in listing.clips if clip.clip_id in failed)
    to_decode = [clip for clip in clips if {scope for scope, _ in failed[clip.clip_id]} == {"clip"}]
    if not to_decode or config.reuse:  # the other store may have tokens of media that cannot be decoded here
        return RetryPlan(clips=clips)
    reasons = on_a_worker(
        client, config, try_decoding, config.engine_settings, listing.root, to_decode, config.accept_damaged
    )
    same = {clip_id for clip_id, reason in reasons.items() if failed[clip_id] == {("clip", reason)}}
    return RetryPlan(clips=tuple(clip for clip in clips if clip.clip_id not in same), unchanged=len(same))


def try_decoding(settings: EngineSettings, root: Root, clips: list[Clip], accept_damaged: bool) -> dict[str, str]:
    """Clip id -> reason of those that cannot be decoded; run by a worker."""
    from pipeline.worker.engine import decode_job, engine_for

    engine = engine_for(settings)
    encoders = engine.encoders.values()
    jobs = ((n, decode_job(root, clip, encoders, accept_damaged=accept_damaged)) for n, clip in enumerate(clips))
    results = decode_ahead(jobs, engine.pool, engine.num_decoders)
    return {clips[n].clip_id: str(result) for n, result in results if isinstance(result, MediaError)}

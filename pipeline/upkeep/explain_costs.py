"""What is to be computed, counted and priced: by encoder and kind, in clips, hours and bytes.

Comes in: a store, an identity that is wanted, the clips and what became of their media. Goes out: `Cost` rows. Seconds
are those of the store's own runs or of a probe; bytes are those of the encoder's stored clips, else of the probe, else
before compression. Each row says which.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from featurestore.clips import KINDS, Clip
from featurestore.identity import FeatureIdentity
from featurestore.store import FeatureStore
from featurestore.zarr_metadata import clip_bytes
from pipeline.config import ExtractConfig
from pipeline.costs.ledger import past_rate
from pipeline.datasets import DatasetListing
from pipeline.resume.stale import StaleMedia
from pipeline.worker.reports import ProbeRecord


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Clips of one kind that one encoder would compute."""

    kind: str
    missing: int  # never computed under the wanted identity
    stale: int  # computed, from media that changed since: with --refresh
    quarantined: int  # failed before; left alone but with --retry-quarantine, and in no other figure here
    bytes: int  # of missing and stale clips
    bytes_from: str
    seconds: float | None  # of one worker; None: nobody knows
    seconds_from: str

    @property
    def clips(self) -> int:
        return self.missing + self.stale


Measured = Mapping[str, Sequence[ProbeRecord]]  # kind -> probed clips


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What prices are taken from."""

    store: FeatureStore
    runs: Sequence[Mapping[str, Any]]  # of the store, oldest first
    measured: Measured  # empty without a probe


def costs_of(evidence: Evidence, identity: FeatureIdentity, clips: Sequence[Clip], media: StaleMedia) -> list[Cost]:
    """A row for each kind of which something is to be computed."""
    store = evidence.store
    key = next((key for key, stored in store.encoders.items() if stored.id == identity.id), None)
    removed = {clip for stone in store.tombstones.values() for clip in stone.clips}
    held = set(store.clips.filter(store.clips[key])["clip_id"].to_pylist()) if key else set()
    failed = set()
    if key:
        quarantine = store.quarantine
        failed = set(quarantine.filter(pc.equal(quarantine["encoder"], key))["clip_id"].to_pylist())
    stale = media.changed.get(identity.encoder, frozenset()) if key else frozenset()
    found = []
    for kind in KINDS:
        ids = {clip.clip_id for clip in clips if clip.kind == kind} - removed
        missing, again, waiting = ids - held - failed, ids & stale, ids & failed
        if missing or again or waiting:
            counts = {"missing": len(missing), "stale": len(again), "quarantined": len(waiting)}
            found.append(_priced(evidence, identity, kind, counts))
    return found


def probe_costs(config: ExtractConfig, listing: DatasetListing, probe: int, say: Callable[[str], None]) -> Measured:
    """`probe` clips of each kind, really decoded and encoded on a worker of the cluster asked for."""
    from jobs.clusters import connect
    from pipeline.costs.forecast import spread_clips
    from pipeline.costs.probe_workers import probe_workers
    from pipeline.describe import Loading

    chosen = {kind: spread_clips([c for c in listing.clips if c.kind == kind], probe) for kind in KINDS}
    with connect(config.cluster_request, say=say) as client:
        return probe_workers(client, config, listing.root, chosen, workers=1, listener=Loading(say).listener).clips


def _priced(evidence: Evidence, identity: FeatureIdentity, kind: str, counts: dict[str, int]) -> Cost:
    """Counted clips of one kind, with the bytes and seconds that they would take."""
    clips = counts["missing"] + counts["stale"]
    probed = [clip for clip in evidence.measured.get(kind, ()) if identity.encoder in clip.encoders]
    per_clip, bytes_from = _bytes_per_clip(evidence.store, identity, kind, probed)
    seconds, seconds_from = _seconds_per_clip(evidence, identity, kind, probed)
    return Cost(
        kind=kind,
        **counts,
        bytes=round(clips * per_clip),
        bytes_from=bytes_from,
        seconds=None if seconds is None else clips * seconds,
        seconds_from=seconds_from,
    )


def _seconds_per_clip(
    evidence: Evidence, identity: FeatureIdentity, kind: str, probed: Sequence[ProbeRecord]
) -> tuple[float | None, str]:
    """Seconds of one worker, and where they are from: the probe, else the store's own runs."""
    if probed:
        each = [_share(clip, identity.encoder) for clip in probed]
        return statistics.fmean(each), f"a probe of {len(each)} clips"
    stored = {one.group_name: one for one in evidence.store.encoders.values()}
    rate = past_rate(evidence.runs, stored, identity, kind)
    if rate is None:
        return None, "no run of this store computed it: give --probe 4"
    return rate.seconds, rate.source


def _share(clip: ProbeRecord, encoder: str) -> float:
    """An encoder's part of a probed clip's time: its own, and of decoding what does not hide behind the encoders."""
    encode_s = sum(probed.seconds for probed in clip.encoders.values())
    return clip.encoders[encoder].seconds * max(1.0, clip.wall_s / encode_s if encode_s else 1.0)


def _bytes_per_clip(
    store: FeatureStore, identity: FeatureIdentity, kind: str, probed: Sequence[ProbeRecord]
) -> tuple[float, str]:
    """Stored bytes: of the encoder's nearest stored identity, scaled by the sizes before compression."""
    if probed:
        sizes = [clip.encoders[identity.encoder].stored_bytes for clip in probed]
        return statistics.fmean(sizes), f"a probe of {len(sizes)} clips"
    mine = [one for one in store.encoders.values() if one.encoder == identity.encoder]
    for one in sorted(mine, key=lambda one: len(one.changes(identity))):
        stored_bytes, clips = store.stored_bytes(one, kind)
        if clips:
            scale = clip_bytes(identity, kind) / clip_bytes(one, kind)
            words = f"its {clips} stored clips" + ("" if scale == 1 else f", times {scale:.3g}")
            return stored_bytes / clips * scale, words
    return float(clip_bytes(identity, kind)), "before compression"

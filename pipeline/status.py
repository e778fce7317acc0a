"""The state of a store: what it holds, details of one clip or encoder, and how fast a running extraction commits.

Only the store is read: no media, no weights, and nothing of the run, which may be on another machine or dead.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from featurestore.clip_names import clips_named
from featurestore.clips import KINDS
from featurestore.encoder_keys import keys_of
from featurestore.layout import receipt_blocks, receipt_key, receipts_prefix
from featurestore.lease import StoreLease
from featurestore.locate import Place, is_url, place_of
from featurestore.store import FeatureStore
from featurestore.windows import videos_in_windows, window_length
from featurestore.writer import StoreWriter
from mervcache.console import RATE_WINDOW_S
from mervcache.errors import UserError
from pipeline.encoders.base import layer_text
from pipeline.summary import last_run, spent


def store_status(path: str | Path) -> dict[str, Any]:
    """Counts per kind and per encoder, quarantine by reason, bytes."""
    store = FeatureStore.open(path)
    clips, quarantine, info = store.clips, store.quarantine.to_pylist(), store.info()
    encoders = []
    for key, identity in store.encoders.items():
        committed = int(np.count_nonzero(clips.column(key).to_numpy(zero_copy_only=False)))
        failed = sum(row["encoder"] == key for row in quarantine)
        encoders.append(
            {
                "encoder": key,
                "identity": identity.id,
                "weights": info["groups"][identity.group_name]["weights"],
                "grid": list(identity.grid),
                "layer": layer_text(identity.layer) or identity.layer,
                "width": identity.width,
                "storage": identity.storage_dtype,
                "committed": committed,
                "failed": failed,
                "to_do": clips.num_rows - committed - failed,
            }
        )
    return {
        "store": str(path),
        "snapshot": store.snapshot,
        "tags": store.tags,
        "clips": dict(Counter(clips.column("kind").to_pylist())),
        "datasets": dict(Counter(clips.column("dataset").to_pylist())),
        "samples": {name: len(store.samples(name)) for name in store.sample_names},
        "encoders": encoders,
        "quarantine": dict(Counter(f"{row['encoder']}: {row['reason']}" for row in quarantine).most_common()),
        "bytes": info["stored_bytes"],
        "tombstones": [
            {"id": name, "date": tombstone.date, "reason": tombstone.reason, "clips": len(tombstone.clips)}
            for name, tombstone in sorted(store.tombstones.items(), key=lambda item: (item[1].date, item[0]))
        ],
        "last run": last_run(store),
        "spent": spent(store),
        "unpublished_blocks": store.unpublished_blocks(),
    }


def inspect_store(path: str | Path, name: str) -> dict[str, Any]:
    """Details of an encoder, by its key, or of a clip, by its id or an end of it that no other clip has."""
    store = FeatureStore.open(path)
    if keys_of(name, store.encoders):
        identity = store.encoders[key := store.encoder_key(name)]
        weights = store.info()["groups"][identity.group_name]["weights"]
        return {"encoder": key, "id": identity.id, "weights": weights, **identity.to_dict()}
    try:
        known = set(store.clips["clip_id"].to_pylist())
        videos = _videos(store, known)
        (clip_id,) = clips_named(known | videos.keys(), [name])
    except UserError as error:
        raise UserError(f"{error}; its encoders: {', '.join(store.encoders) or 'none'}") from None
    return _video_details(store, clip_id) if clip_id in videos else _clip_details(store, clip_id)


def _videos(store: FeatureStore, known: Collection[str]) -> dict[str, set[str]]:
    """Whole videos that are stored as windows -> their windows."""
    if all(window_length(identity.frame_rule) is None for identity in store.encoders.values()):
        return {}
    return videos_in_windows({clip_id.partition("#t=")[0] for clip_id in known if "#t=" in clip_id}, known)


def _video_details(store: FeatureStore, clip_id: str) -> dict[str, Any]:
    details: dict[str, Any] = {"video": clip_id}
    for key, identity in store.encoders.items():
        if (length := window_length(identity.frame_rule)) is not None:
            has_tokens = store.windows(clip_id, encoder=key)["has_tokens"].to_pylist()
            details[key] = f"{sum(has_tokens)} of {len(has_tokens)} windows of {float(length):g} s have tokens"
    return details | {"samples": _sample_lines(store, clip_id)}


def _clip_details(store: FeatureStore, clip_id: str) -> dict[str, Any]:
    (clip,) = store.clips.filter(pc.equal(store.clips["clip_id"], clip_id)).to_pylist()
    details = {key: value for key, value in clip.items() if key not in store.encoders and value is not None}
    for key in store.encoders:
        details[key] = "not committed"
        if clip[key]:
            tokens = store.read([clip_id], encoder=key)[0].astype(np.float32)
            details[key] = {
                "shape": list(tokens.shape),
                "mean": round(float(tokens.mean()), 5),
                "std": round(float(tokens.std()), 5),
                "min": round(float(tokens.min()), 4),
                "max": round(float(tokens.max()), 4),
                "row": int(store.rows([clip_id], encoder=key)[0]),
            }
    failures = [row for row in store.quarantine.to_pylist() if row["clip_id"] == clip_id]
    details |= {f"{row['encoder']} failed": row["reason"] for row in failures}
    details["samples"] = _sample_lines(store, clip_id)
    return details


def _sample_lines(store: FeatureStore, clip_id: str) -> list[str]:
    samples = [s for name in store.sample_names for s in store.samples(name) if s.clip_id == clip_id]
    return [f"{s.stage}: {s.turns[0].text.strip()!r} -> {s.turns[1].text.strip()!r}" for s in samples]


@dataclass(frozen=True, kw_only=True)
class EncoderProgress:
    """How far one encoder is, videos and stills together."""

    encoder: str  # the group's name, ENCODER-IDENTITY12
    blocks: int  # committed
    all_blocks: int  # planned
    clips: int  # rows of the committed blocks
    all_clips: int
    clips_per_s: float | None  # over the last minutes; None before two commits
    seconds_left: float | None  # at that rate; None where nothing moves

    @property
    def is_done(self) -> bool:
        return self.blocks >= self.all_blocks


@dataclass(frozen=True, kw_only=True)
class StoreProgress:
    """The progress of every encoder at one time."""

    encoders: tuple[EncoderProgress, ...]

    @property
    def is_done(self) -> bool:
        return all(encoder.is_done for encoder in self.encoders)

    @property
    def seconds_left(self) -> float | None:
        """Until the last encoder that moves is done; one that does not move belongs to no running extraction."""
        return max((e.seconds_left for e in self.encoders if e.seconds_left is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"seconds_left": self.seconds_left, "is_done": self.is_done}


def watch(place: Place, every_s: float, *, sleep: Callable[[float], None] = time.sleep) -> Iterator[StoreProgress]:
    """The progress every `every_s` seconds, until every planned block is committed."""
    monitor = ProgressMonitor(place)
    while True:
        progress = monitor.look(time.time())
        yield progress
        if progress.is_done:
            return
        sleep(every_s)


class ProgressMonitor:
    """Progress of a running extraction from names and times of receipts; a block counts when its receipt is there.

    Remembers when each block was first seen. The listing of a bucket has no times, so rates are known from the second
    look on.
    """

    def __init__(self, place: Place) -> None:
        self._place = place_of(place)
        self._store = StoreWriter.open(self._place)
        self._commits: dict[str, dict[tuple[str, int], float | None]] = {}  # group -> (kind, block) -> Unix time
        self._rows: dict[tuple[str, int], int] = {}  # the rows of a planned block never change
        self._has_looked = False

    def look(self, now: float) -> StoreProgress:
        """The state at Unix time `now`."""
        groups: dict[str, list[str]] = {}
        for kind in KINDS:
            for group in self._store.encoder_groups(kind):
                groups.setdefault(group, []).append(kind)
                known = self._commits.setdefault(group, {})
                for block in receipt_blocks(self._store.objects.list_names(receipts_prefix(kind, group))):
                    if (kind, block) not in known:
                        known[kind, block] = self._committed_at(kind, group, block, now)
        self._has_looked = True
        since = (StoreLease(self._place, "").holder() or {}).get("since")  # when the active run took the store
        began = float(since) if isinstance(since, int | float) else None
        return StoreProgress(
            encoders=tuple(self._progress(group, kinds, now, began) for group, kinds in sorted(groups.items()))
        )

    def _committed_at(self, kind: str, group: str, block: int, now: float) -> float | None:
        if is_url(self._place):
            return now if self._has_looked else None  # None: before the first look
        return (Path(self._place) / receipt_key(kind, group, block)).stat().st_mtime

    def _progress(self, group: str, kinds: list[str], now: float, began: float | None) -> EncoderProgress:
        commits = self._commits[group]
        blocks = [(kind, block) for kind in kinds for block in range(self._store.allocated_blocks(kind))]
        done, all_clips = sum(map(self._clips, commits)), sum(map(self._clips, blocks))
        dated = [(at, self._clips(block)) for block, at in commits.items() if at is not None]
        per_s = rate(dated, now, began=began)
        return EncoderProgress(
            encoder=group,
            blocks=len(commits),
            all_blocks=len(blocks),
            clips=done,
            all_clips=all_clips,
            clips_per_s=per_s,
            seconds_left=(all_clips - done) / per_s if per_s else None,
        )

    def _clips(self, block: tuple[str, int]) -> int:
        if block not in self._rows:
            self._rows[block] = len(self._store.planned_rows(*block))
        return self._rows[block]


def rate(
    commits: list[tuple[float, int]], now: float, *, began: float | None = None, window_s: float = RATE_WINDOW_S
) -> float | None:
    """Clips per second of the commits (time, clips) in the last `window_s`, or since the run `began` within it.

    Where it is not known when a recent run began, its first commit starts the clock and is not counted: the time before
    it was loading. 8 clips at 0 s, 8 at 10 s, now 20 s: 8 / 20.

    >>> rate([(0.0, 8), (10.0, 8)], now=20.0)
    0.4
    >>> rate([(30.0, 8), (31.0, 8), (32.0, 8)], now=40.0, began=0.0)
    0.6
    """
    start = now - window_s
    recent = [(at, clips) for at, clips in commits if at > start]
    if not recent:
        return None
    if began is not None and start < began <= min(recent)[0]:
        return sum(clips for _, clips in recent) / (now - began)
    was_active = any(start - RATE_WINDOW_S < at <= start for at, _ in commits)  # else the run paused, for a night
    since = start if was_active else min(recent)[0]
    clips = sum(clips for at, clips in recent if at > since)
    return clips / (now - since) if clips and now > since else None

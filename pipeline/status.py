"""What a store holds, for a person: progress per encoder, and the details of one clip or encoder.

Comes in: a store's path. Goes out: plain values that `tables` prints and `--json` dumps. Only what the store itself
says is used: no media, no weights, no running driver.

Watching an extraction from another shell: how far it is and how fast, from names and times of receipts alone.

Comes in: a store's path. Goes out: one `Progress` per look. Nothing is asked of the run itself, which may be on another
machine or dead; a block counts when its receipt is there. In a bucket, whose listing tells no times, rates are known
from the second look on.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from featurestore.clips import KINDS
from featurestore.layout import receipt_blocks, receipt_key, receipts_prefix
from featurestore.lease import StoreLease
from featurestore.locate import Place, is_url, place_of
from featurestore.store import FeatureStore, clips_named
from featurestore.writer import StoreWriter
from mervcache.errors import UserError
from pipeline.summary import last_run


def store_status(path: str | Path) -> dict[str, Any]:
    """Counts per kind and per encoder, quarantine by reason, bytes."""
    store = FeatureStore.open(path)
    clips = store.clips
    kinds = Counter(clips.column("kind").to_pylist())
    quarantine = store.quarantine.to_pylist()
    return {
        "store": str(path),
        "snapshot": store.snapshot,
        "clips": dict(kinds),
        "datasets": dict(Counter(clips.column("dataset").to_pylist())),
        "samples": {name: len(store.samples(name)) for name in store.sample_names},
        "encoders": [_encoder_status(store, key, quarantine, sum(kinds.values())) for key in store.encoders],
        "quarantine": dict(Counter(f"{row['encoder']}: {row['reason']}" for row in quarantine).most_common()),
        "bytes": store.info()["stored_bytes"],
        "tombstones": [
            {"id": name, "date": stone.date, "reason": stone.reason, "clips": len(stone.clips)}
            for name, stone in sorted(store.tombstones.items(), key=lambda item: (item[1].date, item[0]))
        ],
        "last run": last_run(store),
        "unpublished_blocks": store.unpublished_blocks(),
    }


def _encoder_status(store: FeatureStore, key: str, quarantine: list[dict], num_clips: int) -> dict[str, Any]:
    identity = store.encoders[key]
    committed = int(np.count_nonzero(store.clips.column(key).to_numpy(zero_copy_only=False)))
    failed = sum(row["encoder"] == key for row in quarantine)
    return {
        "encoder": key,
        "identity": identity.id,
        "weights": store.info()["groups"][identity.group_name]["weights"],
        "grid": list(identity.grid),
        "width": identity.width,
        "storage": identity.storage_dtype,
        "committed": committed,
        "failed": failed,
        "to_do": num_clips - committed - failed,
    }


def inspect_store(path: str | Path, what: str) -> dict[str, Any]:
    """Details of an encoder (by key) or of a clip (by id, or by an end of one that only it has)."""
    store = FeatureStore.open(path)
    if what in store.encoders:
        return _encoder_details(store, what)
    return _clip_details(store, _find_clip(store, what))


def _encoder_details(store: FeatureStore, key: str) -> dict[str, Any]:
    identity = store.encoders[key]
    return {
        "encoder": key,
        "id": identity.id,
        "weights": store.info()["groups"][identity.group_name]["weights"],
        **identity.to_dict(),
    }


def _find_clip(store: FeatureStore, what: str) -> dict[str, Any]:
    twins = [key for key in store.encoders if key.split("@")[0] == what]
    if twins:
        raise UserError(f"{what} is stored under several identities, give one: {', '.join(twins)}")
    try:
        (clip_id,) = clips_named(store.clips["clip_id"].to_pylist(), [what])
    except UserError as error:
        raise UserError(f"{error}; its encoders: {', '.join(store.encoders) or 'none'}") from None
    (found,) = store.clips.filter(pc.equal(store.clips["clip_id"], clip_id)).to_pylist()
    return found


def _clip_details(store: FeatureStore, clip: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in clip.items() if name not in store.encoders and value is not None}
    details: dict[str, Any] = known  # a span that is absent is the whole file
    for key in store.encoders:
        details[key] = _tokens_summary(store, clip["clip_id"], key) if clip[key] else "not committed"
    failures = [row for row in store.quarantine.to_pylist() if row["clip_id"] == clip["clip_id"]]
    details |= {f"{row['encoder']} failed": row["reason"] for row in failures}
    samples = [s for name in store.sample_names for s in store.samples(name) if s.clip_id == clip["clip_id"]]
    details["samples"] = [f"{s.stage}: {s.turns[0].text.strip()!r} -> {s.turns[1].text.strip()!r}" for s in samples]
    return details


def _tokens_summary(store: FeatureStore, clip_id: str, key: str) -> dict[str, Any]:
    tokens = store.read([clip_id], encoder=key)[0].astype(np.float32)
    return {
        "shape": list(tokens.shape),
        "mean": round(float(tokens.mean()), 5),
        "std": round(float(tokens.std()), 5),
        "min": round(float(tokens.min()), 4),
        "max": round(float(tokens.max()), 4),
        "row": int(store.rows([clip_id], encoder=key)[0]),
    }


WINDOW_S = 300.0  # rates are of the last five minutes


@dataclass(frozen=True, kw_only=True)
class EncoderProgress:
    """How far one encoder is, videos and stills together."""

    encoder: str  # the group's name, ENCODER-IDENTITY12
    blocks: int  # committed
    all_blocks: int  # given out
    clips: int  # rows of the committed blocks
    all_clips: int
    clips_per_s: float | None  # over the last minutes; None before two commits
    seconds_left: float | None  # at that rate; None where nothing moves

    @property
    def is_done(self) -> bool:
        return self.blocks >= self.all_blocks


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One look at a store."""

    encoders: tuple[EncoderProgress, ...]

    @property
    def is_done(self) -> bool:
        return all(encoder.is_done for encoder in self.encoders)

    @property
    def seconds_left(self) -> float | None:
        """Until the last encoder that moves is done; encoders that stand still belong to no running extraction."""
        return max((e.seconds_left for e in self.encoders if e.seconds_left is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"seconds_left": self.seconds_left, "is_done": self.is_done}


class ProgressMonitor:
    """Remembers when each block was first seen; every look lists names and nothing else."""

    def __init__(self, place: Place) -> None:
        self._place = place_of(place)
        self._store = StoreWriter.open(self._place)
        self._commits: dict[str, dict[tuple[str, int], float | None]] = {}  # group -> (kind, block) -> Unix time
        self._rows: dict[tuple[str, int], int] = {}  # a block's rows never change once they are given out
        self._has_looked = False
        self._began: float | None = None  # Unix time at which the run that is at work took the store

    def look(self, now: float) -> Progress:
        """The state at Unix time `now`."""
        groups: dict[str, list[str]] = {}
        for kind in KINDS:
            for group in self._store.encoder_groups(kind):
                groups.setdefault(group, []).append(kind)
                self._note_commits(kind, group, now)
        self._has_looked = True
        self._began = self._begin()
        return Progress(encoders=tuple(self._progress(group, kinds, now) for group, kinds in sorted(groups.items())))

    def _note_commits(self, kind: str, group: str, now: float) -> None:
        known = self._commits.setdefault(group, {})
        for block in receipt_blocks(self._store.objects.list_names(receipts_prefix(kind, group))):
            if (kind, block) not in known:
                known[kind, block] = self._committed_at(kind, group, block, now)

    def _begin(self) -> float | None:
        since = (StoreLease(self._place, "").holder() or {}).get("since")
        return float(since) if isinstance(since, int | float) else None

    def _committed_at(self, kind: str, group: str, block: int, now: float) -> float | None:
        if is_url(self._place):
            return now if self._has_looked else None  # None: before we came
        return (Path(self._place) / receipt_key(kind, group, block)).stat().st_mtime

    def _progress(self, group: str, kinds: list[str], now: float) -> EncoderProgress:
        commits = self._commits[group]
        blocks = [(kind, block) for kind in kinds for block in range(self._store.sealed_blocks(kind))]
        done, all_clips = sum(map(self._clips, commits)), sum(map(self._clips, blocks))
        dated = [(at, self._clips(block)) for block, at in commits.items() if at is not None]
        per_s = rate(dated, now, began=self._began)
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
    commits: list[tuple[float, int]], now: float, *, began: float | None = None, window_s: float = WINDOW_S
) -> float | None:
    """Clips per second of the commits (time, clips) in the last `window_s`, or since the run `began` within it.

    Where it is not known when a young run began, its first commit starts the clock and is not counted: what came before
    it was loading. 8 clips at 0 s, 8 at 10 s, looked at after 20 s: 8 / 20.

    >>> rate([(0.0, 8), (10.0, 8)], now=20.0)
    0.4
    >>> rate([(30.0, 8), (31.0, 8), (32.0, 8)], now=40.0, began=0.0)
    0.6
    """
    recent = [(at, clips) for at, clips in commits if at > now - window_s]
    if not recent:
        return None
    if began is not None and now - window_s < began <= min(recent)[0]:
        return sum(clips for _, clips in recent) / (now - began)
    since = now - window_s if len(recent) < len(commits) and _goes_on(commits, now - window_s) else min(recent)[0]
    clips = sum(clips for at, clips in recent if at > since)
    return clips / (now - since) if clips and now > since else None


def _goes_on(commits: list[tuple[float, int]], since: float) -> bool:
    """Was the same run at work before? A run that went on after a night's pause starts its own clock."""
    return any(since - WINDOW_S < at <= since for at, _ in commits)


def watch(place: Place, every_s: float, *, sleep: Callable[[float], None] = time.sleep) -> Iterator[Progress]:
    """A look every `every_s` seconds, until every block given out is committed."""
    watcher = ProgressMonitor(place)
    while True:
        progress = watcher.look(time.time())
        yield progress
        if progress.is_done:
            return
        sleep(every_s)

"""What a store holds, for a person: progress per encoder, and the details of one clip or encoder.

Comes in: a store's path. Goes out: plain values that `tables` prints and `--json` dumps. Only what the store itself
says is used: no media, no weights, no running driver.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from featurestore.store import FeatureStore, clips_named
from mervcache.errors import UserError
from pipeline.costs.prediction import last_run


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

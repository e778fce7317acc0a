"""The command that comes after an extraction or a list of near-duplicates, one that works as it is printed."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from featurestore.store import FeatureStore
from pipeline.duplicates import THRESHOLD, Duplicates
from pipeline.summary import ExtractSummary

MANY_SAMPLES = 5000  # that teach more than a small LLM's own clips: the user's LLM then


def train_command(result: ExtractSummary) -> str:
    """`merv-train` on the store that a run filled; it names encoders where the store has one in several forms."""
    how = "--recipe demo" if result.dataset == "demo" else "--recipe small"
    if result.samples > MANY_SAMPLES:
        how = "--llm FOLDER_OR_HUB_ID"
    return f"merv-train --from-cache {result.store} {how}{_encoders(result)} --out runs/first"


def quarantine_advice(result: ExtractSummary) -> str:
    """How to list the clips that failed, and how to retry them."""
    command = f"merv-pipeline quarantine list {shlex.quote(result.store)}"
    return f"each clip: {command}\nonce the cause is fixed: the same command with --retry-quarantine"


def exclude_command(found: Duplicates, encoders: str | None, out: Path | None) -> str:
    """`merv-train` without the clips in the file `out`, or the command that writes such a file where there is none."""
    store = shlex.quote(found.store)
    if out is not None:
        exclude = shlex.quote(str(out))
        return f"train: merv-train --from-cache {store} --exclude {exclude} --llm FOLDER_OR_HUB_ID --out runs/first"
    chosen = f" --encoders {shlex.quote(encoders)}" if encoders else ""
    threshold = "" if found.threshold == THRESHOLD else f" --threshold {found.threshold}"
    dedup = "" if found.leaked else " --dedup"
    return f"leave them out of training: merv-pipeline duplicates {store}{chosen}{threshold} --out exclude.txt{dedup}"


def _encoders(result: ExtractSummary) -> str:
    """The finest grid of each encoder, where one is stored more than once."""
    identities = FeatureStore.open(result.store, snapshot=result.snapshot).encoders if result.snapshot else {}
    finest: dict[str, str] = {}
    for key, identity in identities.items():
        best = finest.setdefault(identity.encoder, key)
        if math.prod(identity.grid) > math.prod(identities[best].grid):
            finest[identity.encoder] = key
    return f" --encoders {','.join(finest.values())}" if len(finest) < len(identities) else ""

"""Predictions: what a run was thought to cost, kept beside what it did cost.

Comes in: what `merv-pipeline plan --json` printed, or, where nobody planned, the pace of a run's own first blocks. Goes
out: a `Prediction` for the run's record in the journal, and the newest run's, side by side with what it came to.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featurestore.store import FeatureStore
from mervcache.errors import UserError

FIRST_SHARE = 0.05  # of the clips: then the pace is known, and most of the run is still to come


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was expected of a whole run."""

    by: str  # "plan", or "its first N clips"
    clips: int
    seconds: float | None  # None: a plan without a probe
    interval_s: tuple[float, float] | None  # None: nobody knows
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_plan(path: str | Path) -> Prediction:
    """The prediction in a file that holds what `merv-pipeline plan --json` printed."""
    try:
        plan = json.loads(Path(path).read_text())
        by_clip: dict[tuple[str, str], int] = {}  # an encoder's rows count the same clips once more
        for row in plan["rows"]:
            group = (row["stage"], row["kind"])
            by_clip[group] = max(by_clip.get(group, 0), int(row["to_do"]))
        start_s = float(plan.get("startup_s", 0.0))  # a run counts its seconds from when the encoders are loaded
        seconds = None if plan["seconds"] is None else float(plan["seconds"]) - start_s
        low_high = plan["interval_s"]
        interval = low_high and (float(low_high[0]) - start_s, float(low_high[1]) - start_s)
        return Prediction(
            by="plan", clips=sum(by_clip.values()), seconds=seconds, interval_s=interval, bytes=int(plan["bytes"])
        )
    except OSError as error:
        raise UserError(f"forecast {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} holds no forecast: save one with `merv-pipeline plan --json > {path}`") from error


def from_first_blocks(*, done: int, total: int, seconds: float, num_bytes: int) -> Prediction | None:
    """Once a twentieth is done: the rest at the same pace and size. None before that, and when all is done."""
    if not FIRST_SHARE * total <= done < total:
        return None
    scale = total / done
    return Prediction(
        by=f"its first {done} clips",
        clips=total,
        seconds=seconds * scale,
        interval_s=None,
        bytes=round(num_bytes * scale),
    )


def last_run(store: FeatureStore) -> dict[str, Any] | None:
    """Of the newest run that computed anything: run, clips, seconds, bytes and what was predicted (or None)."""
    busy = [run["summary"] for run in store.runs() if run["summary"]["clips"]]
    if not busy:
        return None
    newest = max(busy, key=lambda summary: summary["run"])  # a run's name begins with its time
    return {
        "run": newest["run"],
        "clips": newest["clips"],
        "seconds": newest["elapsed_s"],
        "bytes": newest["bytes"],
        "predicted": newest.get("predicted"),
    }

"""Metrics: metrics.jsonl in a run's folder, a line per step, and all lines are one curve.

A line has loss, gradient norm, learning rates, tokens and speed; that of a step behind which was a validation has its
metrics too, as `val_...`. A resumed run drops the lines behind its checkpoint, since it takes these steps again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from trainer.runs.files import replace_text

METRICS_FILE = "metrics.jsonl"


def open_metrics(path: Path, start: int) -> TextIO:
    """The metrics file open for appending, without lines of steps that will be done again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) < start]
        replace_text(path, "".join(line + "\n" for line in kept))  # the curve so far is nowhere else
    return path.open("a")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All steps' metrics of a run."""
    return [json.loads(line) for line in (Path(run) / METRICS_FILE).read_text().splitlines()]


def _step_of(line: str) -> float:
    """The step of a line; a line that a kill cut short belongs to no step that is kept."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")

"""Folders of sweeps, written as `merv-train sweep` writes them, with answers that a test chooses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest

ENCODERS = ("a", "b")
OPTIONS = 4


def all_subsets(encoders: Sequence[str]) -> list[tuple[str, ...]]:
    return list(chain.from_iterable(combinations(encoders, size) for size in range(len(encoders) + 1)))


def make_answer(index: int, *, right: bool, margin: float = 1.0, per_video: int = 2, **changes: Any) -> dict[str, Any]:
    """Question `index`, option 1 of 4 right; `margin` is by how much the best option beats the others."""
    predicted = 1 if right else 2
    return {
        "sample_id": f"q{index}",
        "clip_id": f"set/clip{index // per_video}.mp4",
        "category": "colour",
        "num_options": OPTIONS,
        "predicted": predicted,
        "correct": 1,
        "scores": [-2.0 + (margin if option == predicted else 0.0) for option in range(OPTIONS)],
        **changes,
    }


def entry(encoders: Iterable[str], seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A run's entry in sweep.json."""
    encoders = list(encoders)
    visual = {"fusion": "cross_attention", "projector": "2d-average"} if encoders else {"fusion": "", "projector": ""}
    return {
        "encoders": encoders,
        **visual,
        "tokens_per_frame": None,
        "rate": 1.0,
        "seed": seed,
        "mode": "frozen" if encoders else "text-only",
        "is_trained": bool(encoders),
        "method": "retrained",
        **changes,
    }


class SweepFolder:
    """A sweep on disk; runs and scores are added one by one."""

    def __init__(self, path: Path, encoders: Sequence[str], **changes: Any) -> None:
        self.path, self.runs = path, {}
        self.record = {
            "format": 1,
            "encoders": list(encoders),
            "snapshot": "00001-abc",
            "store": "nowhere.zarr",
            "samples_digest": "5a",
            "num_samples": 9,
            "questions_digest": "77",
            "protocol": "likelihood",
            "split": "heldout",
            **changes,
        }
        path.mkdir()
        self._write()

    def _write(self) -> None:
        (self.path / "sweep.json").write_text(json.dumps({**self.record, "runs": self.runs}))

    def add(self, run: Mapping[str, Any], answers: Sequence[Mapping[str, Any]] | None = None, **changes: Any) -> str:
        """A run, and its scores if it has answers; its name."""
        grid = str(run["tokens_per_frame"] or "stored")
        parts = ["+".join(run["encoders"]) or "text-only", run["fusion"], run["projector"], grid, run["method"]]
        name = re.sub(r"[^\w+-]", "", "__".join([*filter(None, parts), f"seed{run['seed']}"]))
        self.runs[name] = dict(run)
        self._write()
        folder = self.path / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        if run["is_trained"]:
            identity = {"num_frames": 16, "frame_rule": "linspace-32/2"}
            facts = {encoder: {"identity": identity} for encoder in run["encoders"]}
            (folder / "run.json").write_text(json.dumps({"num_steps": 60, "encoders": facts}))
        if answers is not None:
            self.score(name, answers=list(answers), **changes)
        return name

    @property
    def _stem(self) -> str:
        protocol = self.record.get("protocol", "likelihood")
        return "heldout" if protocol == "likelihood" else f"heldout-{protocol}"

    def score(self, name: str, *, file: str | None = None, **content: Any) -> Path:
        """Write a file of scores, by default that of the sweep's protocol."""
        file = file or self._stem
        step = 60 if self.runs[name]["is_trained"] else 0
        record = {"split": "heldout", "limit": None, "store": "nowhere.zarr", "snapshot": "00001-abc", "step": step}
        path = self.path / "runs" / name / "scores" / f"{file}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**record, "scores": [], "beside": {}, **content}))
        return path

    def mask(self, name: str, subsets: Mapping[str, Sequence[Mapping[str, Any]]], method: str = "post-hoc") -> Path:
        """Write a run's scores with masks."""
        return self.score(name, file=f"{self._stem}-masked", method=method, subsets=subsets)


@pytest.fixture
def new_sweep(tmp_path) -> Callable[..., SweepFolder]:
    return lambda encoders=ENCODERS, **changes: SweepFolder(tmp_path / "sweep", encoders, **changes)

"""A sweep whose process is killed again and again ends with the weights and the answers of one that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from trainer.runs.run_record import read_metrics

pytestmark = pytest.mark.slow

KILLS = 5
SETTINGS = {
    "llm": "fresh:tiny",
    "projector": {"grid": [2, 2, 2]},
    "max_steps": 6,
    "batch_size": 6,
    "micro_batch_size": 6,
    "checkpoint_every": 2,
    "keep_checkpoints": 9,
}


def start(out: Path, store: Path) -> subprocess.Popen:
    (out.parent / "small.yaml").write_text(yaml.safe_dump(SETTINGS))
    options = ["--from-cache", str(store), "--recipe", "demo", "--config", str(out.parent / "small.yaml")]
    command = [sys.executable, "-P", "-m", "trainer.main", "train", "sweep", *options, "--post-hoc", "--out", str(out)]
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def checkpoints(out: Path) -> int:
    return len(list(out.glob("runs/*/checkpoints/step-*/state.json")))


def results(out: Path) -> dict[str, object]:
    """Weights, losses and answers of every run."""
    found: dict[str, object] = {}
    for run in sorted((out / "runs").iterdir()):
        newest = max(run.glob("checkpoints/step-*/model.safetensors"))
        found[f"{run.name} weights"] = newest.read_bytes()
        found[f"{run.name} losses"] = [row["loss"] for row in read_metrics(run)]
        for scores in sorted((run / "scores").glob("*.json")):
            record = json.loads(scores.read_text())
            found[f"{run.name} {scores.name}"] = record.get("answers") or record["subsets"]
    return found


def test_a_sweep_that_is_killed_five_times_ends_as_if_it_had_not_been(question_store, tmp_path):
    assert start(tmp_path / "whole", question_store).wait(timeout=300) == 0
    cut = tmp_path / "cut"
    for _ in range(KILLS):
        before, process = checkpoints(cut), start(cut, question_store)
        deadline = time.monotonic() + 120
        while checkpoints(cut) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "cut.log").read_text()[-2000:]
    assert start(cut, question_store).wait(timeout=300) == 0
    expected, found = results(tmp_path / "whole"), results(cut)
    assert set(found) == set(expected)
    assert [name for name in expected if found[name] != expected[name]] == []

"""Scripts that are run by this process, and by two that train together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def run_here():
    """What a script defines: `run_here(SCRIPT)["go"](...)`."""

    def names_of(script):
        names = {"__name__": "script"}
        exec(compile(script, "script", "exec"), names)
        return names

    return names_of


@pytest.fixture(scope="session")
def run_by_two():
    """Two ranks call a script with `runs` as JSON: (exit code, stdout, stderr) of each."""

    def start(folder, script, runs, port, environment=None):
        (folder / "script.py").write_text(script)
        shared = {
            **(environment or {}),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONFAULTHANDLER": "1",  # a crash in torch's own threads names the place
        }
        started = [
            subprocess.Popen(
                [sys.executable, str(folder / "script.py"), json.dumps(runs)],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=240) for process in started]
        return [(process.returncode, *texts) for process, texts in zip(started, outputs, strict=True)]

    return start

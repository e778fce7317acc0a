"""A run of a sweep on a Dask worker: `merv-train` and `merv-eval` in processes of their own.

A run that trained inside the worker would lose SIGTERM, `--launch` and, at a crash, the worker. Imports no torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mervcache.errors import MervCacheError

PR_SET_PDEATHSIG = 1  # Linux's prctl option: the signal to get when the parent dies
LAST_LINES = 20  # of a failed process's log that its error quotes
# -P: Python does not look for modules in the folder it is started from.
START = (sys.executable, "-P", "-m", "trainer.ablation.supervise")


class RunFailedError(MervCacheError):
    """A run's process ended with an error again and again without a new checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RunJob:
    """One run of a sweep as command lines."""

    run: str  # folder
    train: tuple[str, ...]
    score: tuple[str, ...]
    views: tuple[tuple[str, ...], ...]  # score it with subsets of its encoders, or at its grids
    log: str  # file that gets what both print
    attempts: int = 2  # in a row without a new checkpoint


def supervise(job: RunJob) -> None:
    """Train to the end and score.

    A training that fails is started again, and goes on from its newest checkpoint; only attempts without a new
    checkpoint count. Raises `RunFailedError` with the end of the log.
    """
    failures, before = 0, _checkpoints(job.run)
    while (code := _run(job.train, job.log)) != 0:
        now = _checkpoints(job.run)
        failures, before = (failures + 1 if now <= before else 0), now
        if failures == job.attempts:
            raise RunFailedError(f"merv-train ended with code {code}: {_end_of(job.log)}")
    for command in (job.score, *job.views):
        if (code := _run(command, job.log)) != 0:
            raise RunFailedError(f"merv-eval ended with code {code}: {_end_of(job.log)}")


def _run(command: Sequence[str], log: str) -> int:
    with Path(log).open("ab") as file:
        process = subprocess.Popen(
            [*START, str(os.getpid()), *command], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        return process.wait()


def _checkpoints(run: str) -> frozenset[str]:
    """The newest checkpoint of every stage."""
    folders = {folder.parent for folder in Path(run).rglob("checkpoints/step-*")}
    return frozenset(str(max(folder.glob("step-*"))) for folder in folders)


def _end_of(log: str) -> str:
    lines = Path(log).read_text(errors="replace").splitlines()
    return "\n".join(lines[-LAST_LINES:])


def main() -> None:
    """`PARENT COMMAND...`: become the command, and get SIGTERM, which saves a run, when the parent dies (Linux)."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()

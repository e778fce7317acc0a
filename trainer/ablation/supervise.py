"""A run of a sweep on a Dask worker: `merv-train` and `merv-eval` in processes of their own.

A run that trained inside the worker would lose SIGTERM, `--launch` and, at a crash, the worker. Imports no torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mervcache.errors import EXIT_WITH_FAILURES, MervCacheError, UserError
from trainer.runs.lock import STAGES_LOCK, run_lock

PR_SET_PDEATHSIG = 1  # Linux's prctl option: the signal to get when the parent dies
LAST_LINES = 20  # of a failed process's log that its error quotes
FINISHED = (0, EXIT_WITH_FAILURES)  # 3: with skipped steps; as in one process, the folder decides what it is
LOCK_POLL_S, LOCK_WAIT_S = 1.0, 900.0  # for a trainer whose worker retired: it saves a checkpoint and ends
# -P: Python does not look for modules in the folder it is started from.
START = (sys.executable, "-P", "-m", "trainer.ablation.supervise")


class RunFailedError(MervCacheError):
    """A run's process ended with an error again and again without a new checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RunTime:
    """Elapsed seconds of a run that got through."""

    train_s: float  # loading and all attempts of this task included
    score_s: float


@dataclass(frozen=True, kw_only=True)
class RunJob:
    """One run of a sweep as command lines."""

    run: str  # folder
    train: tuple[str, ...]
    score: tuple[str, ...]
    views: tuple[tuple[str, ...], ...]  # score it with subsets of its encoders, or at its grids
    log: str  # file that gets what both print
    attempts: int = 2  # in a row without a new checkpoint


def supervise(job: RunJob) -> RunTime:
    """Train to the end and score; how long that took.

    A training that fails is started again, and goes on from its newest checkpoint; only attempts without a new
    checkpoint count. Raises `RunFailedError` with the end of the log.
    """
    began = time.monotonic()
    failures, before = 0, checkpoints_of(job.run)
    _wait_until_free(Path(job.run))
    while (ended := _run(job.train, job.log)).code not in FINISHED:
        now = checkpoints_of(job.run)
        failures, before = (failures + 1 if now <= before else 0), now
        if failures == job.attempts:
            raise RunFailedError(f"merv-train ended with code {ended.code}: {ended.reason}")
    trained = time.monotonic()
    for command in (job.score, *job.views):
        if (ended := _run(command, job.log)).code not in FINISHED:
            raise RunFailedError(f"merv-eval ended with code {ended.code}: {ended.reason}")
    return RunTime(train_s=trained - began, score_s=time.monotonic() - trained)


def _wait_until_free(run: Path) -> None:
    """Wait for another trainer of the run, such as one that saves its last step on a node whose job ends."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while time.monotonic() < deadline:
        try:
            with run_lock(run, STAGES_LOCK):
                return
        except UserError:  # held
            time.sleep(LOCK_POLL_S)


@dataclass(frozen=True)
class _Ended:
    code: int
    reason: str  # the command's own error, else the end of what it printed: launchers add pages of their own


def _run(command: Sequence[str], log: str) -> _Ended:
    with Path(log).open("ab") as file:
        began = file.tell()
        process = subprocess.Popen(
            [*START, str(os.getpid()), *command], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        code = process.wait()
    lines = Path(log).read_bytes()[began:].decode(errors="replace").splitlines()
    errors = dict.fromkeys(line for line in lines if line.startswith("Error: "))  # of several ranks, once
    return _Ended(code, "\n".join(errors or lines[-LAST_LINES:]))


def checkpoints_of(run: str) -> frozenset[str]:
    """The newest checkpoint of every stage."""
    folders = {folder.parent for folder in Path(run).rglob("checkpoints/step-*")}
    return frozenset(str(max(folder.glob("step-*"))) for folder in folders)


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

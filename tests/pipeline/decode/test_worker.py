"""A decode process on its own, without a pool to mind it."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.decode import worker as protocol

HOSTILE = [sys.executable, "-P", str(Path(__file__).with_name("hostile_worker.py"))]


@pytest.fixture
def worker():
    process = subprocess.Popen(HOSTILE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def receive(process) -> dict:
    header, _ = protocol.receive(process.stdout.fileno(), time.monotonic() + 60)
    return header


def ask(process, job, timeout_s: float = 60.0, *, asks: bool = False) -> None:
    protocol.send(process.stdin.fileno(), {"job": job.to_record(), "timeout_s": timeout_s, "asks": asks})


def test_worker_reports_ready_then_the_size_of_the_media_then_that_it_is_read_then_the_result(worker, studio) -> None:
    path = studio.film("a.mp4")
    assert receive(worker) == {"ready": worker.pid}
    ask(worker, studio.job(path))
    assert receive(worker) == {"started": path.stat().st_size}
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert receive(worker) == {"read": sha256}
    answer = receive(worker)
    assert answer["shapes"] == [[32, 48, 48, 3]]
    assert answer["decoded"]["num_frames"] == 60


def test_worker_that_asks_decodes_what_is_wanted_and_nothing_else(worker, studio) -> None:
    path = studio.film("a.mp4")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    receive(worker)
    for is_wanted in (False, True):
        ask(worker, studio.job(path), asks=True)
        assert "started" in receive(worker)
        assert receive(worker) == {"read": sha256}
        protocol.send(worker.stdin.fileno(), {"decode": is_wanted})
        answer = receive(worker)
        assert answer["decoded"]["media_sha256"] == sha256
        assert answer["shapes"] == ([[32, 48, 48, 3]] if is_wanted else [])


def test_worker_ends_when_its_pipe_closes(worker) -> None:
    receive(worker)
    worker.stdin.close()
    assert worker.wait(timeout=30) == 0


def test_worker_that_spins_ends_by_its_own_processor_limit(worker, studio) -> None:
    """Protects a machine whose driver is gone: no other process is left to kill it."""
    receive(worker)
    ask(worker, studio.job(studio.film("a.mp4"), decoder="burn"), timeout_s=0.1)
    assert worker.wait(timeout=60) == -signal.SIGXCPU


@pytest.mark.parametrize(("kind", "limit_mb"), [("-S", 900), ("-SH", 900), ("-S", 6000), ("-SH", 6000)])
def test_worker_takes_the_smaller_of_two_memory_limits(kind, limit_mb, studio) -> None:
    """`ulimit -v` may be below the wanted 4 GB, as the limit or as the most that the limit may be raised to."""
    command = f'ulimit {kind} -v {limit_mb << 10} && exec "$0" "$@"'
    worker = [sys.executable, "-P", "-m", "pipeline.decode.worker", "--memory-bytes", str(4 << 30)]
    process = subprocess.Popen(
        ["bash", "-c", command, *worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    with process:
        assert receive(process) == {"ready": process.pid}
        limits = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
        (line,) = [line for line in limits if line.startswith("Max address space")]
        assert line.split()[3:5] == [str(min(limit_mb << 20, 4 << 30))] * 2
        ask(process, studio.job(studio.film("a.mp4")))
        assert [receive(process) for _ in range(3)][-1]["decoded"]["num_frames"] == 60
        process.stdin.close()


def test_worker_ends_if_its_parent_is_another_than_stated() -> None:
    done = subprocess.run(
        [*HOSTILE, "--parent", "1"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 1

"""Isolated blocks: the clip announced last before a crash is at fault, and machine faults are distinguished."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from featurestore.clips import Clip
from mervcache.errors import RunStoppedError
from pipeline.config import EngineSettings
from pipeline.worker.admission import IN_FLIGHT
from pipeline.worker.block import BlockTask
from pipeline.worker.isolate import extract_isolated
from pipeline.worker.reports import BlockReport, EncoderWork

pytestmark = pytest.mark.slow

# In place of the child: announces its rows, and ends on a row by the signal that `fates` has for it.
CHILD = """
import json, os, pickle, signal, sys
fates = json.loads(sys.argv.pop(1))
writes = int(sys.argv[1])
task, crashed = pickle.loads(sys.stdin.buffer.read())
def send(message):
    os.write(writes, (json.dumps(message) + "\\n").encode())
if "start" in fates:
    signal.raise_signal(fates["start"])
for row, _ in task.rows:
    if ("siglip", row) in crashed:
        continue
    send({"encoding": ["siglip", row], "counts": {"clips": row}})
    if str(row) in fates:
        signal.raise_signal(fates[str(row)])
reasons = {f"{row}: {why}": 1 for (_, row), why in crashed.items()}
if name := fates.get("environment"):
    reasons = {os.environ[name]: 1}
counts = dict.fromkeys(("clips", "failed", "frames", "bytes", "halvings", "block", "reused"), 0)
work = {"siglip": {"clips": 8, "seconds": 0.5, "bytes": 80}}
report = counts | {"kind": "video", "seconds": {"total": 1.5}, "made": work, "reasons": reasons}
send(fates.get("end") or {"report": report})
"""
ABORT, SEGV, KILL = 6, 11, 9


@pytest.fixture
def suspect(tmp_path, monkeypatch):
    """Run a block of eight clips whose rows have these fates."""
    rows = tuple((row, Clip(dataset="d", path=f"{row}.mp4", kind="video")) for row in range(8))
    task = BlockTask(
        store=str(tmp_path),
        root=str(tmp_path),
        kind="video",
        block=0,
        rows=rows,
        wanted={"siglip": frozenset(range(8))},
        groups={},
        batch=2,
        accept_damaged=False,
        engine=EngineSettings(encoders=()),
    )

    def run(**fates):
        plain = {name.lstrip("_"): fate for name, fate in fates.items()}
        monkeypatch.setattr("pipeline.worker.isolate.COMMAND", (sys.executable, "-c", CHILD, json.dumps(plain)))
        return extract_isolated(task)

    return run


def test_a_block_without_a_culprit_ends_as_any_other(suspect):
    assert suspect() == BlockReport(
        kind="video",
        block=0,
        clips=0,
        failed=0,
        frames=0,
        bytes=0,
        halvings=0,
        reused=0,
        seconds={"total": 1.5},
        made={"siglip": EncoderWork(clips=8, seconds=0.5, bytes=80)},
        reasons={},
    )


def test_two_culprits_are_found_one_after_the_other_by_how_they_ended(suspect):
    assert suspect(_2=ABORT, _5=SEGV).reasons == {
        "2: encoding crashes the process: signal SIGABRT": 1,
        "5: encoding crashes the process: signal SIGSEGV": 1,
    }


def test_a_process_killed_from_outside_blames_no_clip(suspect):
    with pytest.raises(RunStoppedError, match=r"killed from outside \(signal SIGKILL\), while siglip encoded d/3.mp4"):
        suspect(_3=KILL)


def test_a_suspect_waits_until_the_blocks_in_flight_have_left(suspect):
    with ThreadPoolExecutor(1) as threads:
        with IN_FLIGHT.admit("an engine", 1):
            report = threads.submit(suspect)
            with pytest.raises(TimeoutError):
                report.result(timeout=0.5)
        assert report.result(timeout=60).kind == "video"


def test_a_suspect_launches_one_kernel_at_a_time(suspect):
    assert suspect(environment="CUDA_LAUNCH_BLOCKING").reasons == {"1": 1}


def test_many_culprits_are_the_machines_fault(suspect):
    with pytest.raises(RunStoppedError, match="on more than 3 clips: it is the machine"):
        suspect(_0=SEGV, _1=SEGV, _2=SEGV, _3=SEGV)


def test_a_process_that_dies_before_its_first_clip_is_the_machines_fault(suspect):
    with pytest.raises(RunStoppedError, match=r"signal SIGSEGV\) before its first clip"):
        suspect(start=SEGV)


def test_what_stops_the_child_stops_the_run_in_its_words(suspect):
    with pytest.raises(RunStoppedError, match="the disk is full"):
        suspect(end={"stopped": "the disk is full"})
    with pytest.raises(RuntimeError, match="ValueError: out of range"):
        suspect(end={"error": "ValueError: out of range"})

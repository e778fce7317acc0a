"""Crash marks: a crash leaves one, a kill from outside and an exception do not."""

from __future__ import annotations

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pipeline.worker.crash_marks import crash_mark, has_crashed, remove_all_marks, remove_marks

BLOCK = """
import signal, sys
from types import SimpleNamespace
from pipeline.worker.crash_marks import crash_mark
with crash_mark(SimpleNamespace(store=sys.argv[1], kind="video", block=1, batch=2)):
    signal.raise_signal(int(sys.argv[2]))
"""


SEVERAL_BLOCKS = """
import signal, sys
from types import SimpleNamespace
from pipeline.worker.crash_marks import crash_mark
def mark(block):
    return crash_mark(SimpleNamespace(store=sys.argv[1], kind="video", block=block, batch=2))
with mark(1):
    with mark(2):
        with mark(3):
            pass
        signal.raise_signal(signal.SIGSEGV)
"""


def task(store, block=1):
    return SimpleNamespace(store=str(store), kind="video", block=block, batch=2)


@pytest.mark.parametrize(
    ("number", "remembered"), [(signal.SIGABRT, True), (signal.SIGSEGV, True), (signal.SIGKILL, False)]
)
def test_only_a_crash_is_remembered_and_only_of_its_own_block(number, remembered, tmp_path):
    code = subprocess.run([sys.executable, "-c", BLOCK, str(tmp_path), str(int(number))], stderr=subprocess.DEVNULL)
    assert code.returncode == -number
    assert has_crashed(task(tmp_path)) is remembered
    assert not has_crashed(task(tmp_path, block=11))
    remove_marks(task(tmp_path))
    assert not has_crashed(task(tmp_path))


def test_a_crash_suspects_every_block_in_flight_and_none_that_had_left(tmp_path):
    code = subprocess.run([sys.executable, "-c", SEVERAL_BLOCKS, str(tmp_path)], stderr=subprocess.DEVNULL)
    assert code.returncode == -signal.SIGSEGV
    assert [has_crashed(task(tmp_path, block)) for block in (1, 2, 3, 4)] == [True, True, False, False]
    remove_marks(task(tmp_path, 1))  # its block was computed alone
    assert [has_crashed(task(tmp_path, block)) for block in (1, 2)] == [False, True]


def test_blocks_of_other_processes_are_not_suspected(tmp_path):
    """A process that was killed leaves marks too, beside those of one that crashed."""
    for number in (signal.SIGKILL, signal.SIGSEGV):
        block = BLOCK.replace("block=1", f"block={int(number)}")
        subprocess.run([sys.executable, "-c", block, str(tmp_path), str(int(number))], stderr=subprocess.DEVNULL)
    assert not has_crashed(task(tmp_path, int(signal.SIGKILL)))
    assert has_crashed(task(tmp_path, int(signal.SIGSEGV)))


def test_an_exception_and_a_good_end_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="no crash"), crash_mark(task(tmp_path)):
        raise ValueError("no crash")
    with crash_mark(task(tmp_path)):
        pass
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    remove_all_marks(str(tmp_path))
    assert not list((tmp_path / "tmp").iterdir())


def test_stores_in_buckets_have_no_marks():
    assert not has_crashed(task("s3://bucket/one.zarr"))
    with crash_mark(task("s3://bucket/one.zarr")):
        pass

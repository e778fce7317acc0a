"""One trainer per run: real processes that hold the lock, and are killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mervcache.errors import UserError
from trainer.loop.train import train
from trainer.runs.lock import run_lock

ROOT = Path(__file__).resolve().parents[3]
HOLDING = """
import sys, time
from pathlib import Path
from trainer.runs.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the run."""
    command = [sys.executable, "-c", HOLDING, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_trainer_is_refused_and_named_until_the_first_was_killed(tmp_path, holder, config, samples, tokens):
    for resume in (False, True):
        with pytest.raises(UserError, match=f"another trainer works on .*run: process {holder.pid} on "):
            train(config, samples, tokens, tmp_path / "run", resume=resume, quiet=True)
    assert not (tmp_path / "run/config.yaml").exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert train(config, samples, tokens, tmp_path / "run", stop_at=1, quiet=True).steps == 1


def test_a_lock_ends_with_its_block_and_leaves_no_folder_of_a_run_that_did_not_begin(tmp_path):
    def begin_and_fail():
        with run_lock(tmp_path / "deep/run"):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            begin_and_fail()
    assert not (tmp_path / "deep/run").exists()
    (tmp_path / "deep/run").mkdir()
    held, again = (run_lock(tmp_path / "deep/run") for _ in range(2))
    with held, pytest.raises(UserError, match="another trainer"), again:
        pass
    assert (tmp_path / "deep/run").exists()


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    """As a parallel file system mounted without them answers."""
    import errno
    import fcntl

    def refuse(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock(tmp_path):
        pass
    assert "without locks" in caplog.text

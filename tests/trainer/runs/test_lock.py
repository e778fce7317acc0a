"""One trainer per run: real processes that hold the lock, and are killed."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mervcache.errors import UserError
from trainer.config import TrainConfig
from trainer.loop.train import train
from trainer.recipes import Stage
from trainer.runs.load import load_run
from trainer.runs.lock import RUN_LOCK, STAGES_LOCK, run_lock
from trainer.runs.stage_folders import check_are_trained, write_stages

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


def test_a_run_in_training_that_is_evaluated_says_how_far_it_is(tmp_path, holder, config, samples, tokens):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=rf"being trained by process {holder.pid} on .*not begun its first step"):
        check_are_trained(run)
    train(
        replace(config, max_steps=30, checkpoint_every=20), samples, tokens, tmp_path / "whole", stop_at=3, quiet=True
    )
    shutil.rmtree(tmp_path / "whole/checkpoints")
    shutil.copytree(tmp_path / "whole", run, ignore=lambda *_: [RUN_LOCK], dirs_exist_ok=True)
    for refused in (check_are_trained, load_run):
        with pytest.raises(UserError, match=rf"process {holder.pid} on .*, at step 3 of 30; its first .* step 20; ask"):
            refused(run)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with pytest.raises(UserError, match="was stopped before its first checkpoint"):
        check_are_trained(run)


def test_a_later_stage_waits_for_the_command_that_trains_the_first(tmp_path):
    write_stages(tmp_path, (Stage(name="align", config=TrainConfig()), Stage(name="finetune", config=TrainConfig())))
    with (
        run_lock(tmp_path, STAGES_LOCK),
        pytest.raises(UserError, match=rf"finetune is being trained by process {os.getpid()} on "),
    ):
        check_are_trained(tmp_path)


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

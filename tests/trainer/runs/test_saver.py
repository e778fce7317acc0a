"""Checkpoints that are written while the run goes on: a kill in the middle of one, and a disk that is full."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mervcache.errors import RunStoppedError
from tests.trainer.loop.toy_runs import toy_config, toy_questions, toy_tokens
from trainer.loop.train import train
from trainer.runs import checkpoint
from trainer.runs.run_record import read_metrics

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from tests.trainer.loop.toy_runs import toy_config, toy_questions, toy_tokens
from trainer.loop.train import train
from trainer.runs import checkpoint

out, place, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
calls, really = [], getattr(checkpoint, place)

def dying(*arguments):
    calls.append(1)
    if len(calls) == number:
        time.sleep(0.5)  # the steps go on meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
    return really(*arguments)

setattr(checkpoint, place, dying)
torch.set_num_threads(1)
config = toy_config(max_steps=8, checkpoint_every=2, keep_checkpoints=1)
train(config, toy_questions(12), toy_tokens(12), out, quiet=True)
"""


def settings(**changes):
    return toy_config(max_steps=8, checkpoint_every=2, keep_checkpoints=1, **changes)


def losses(run):
    return [row["loss"] for row in read_metrics(run)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(settings(), toy_questions(12), toy_tokens(12), out, quiet=True)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "number", "kept"),
    [
        ("save_file", 1, None),  # weights of the first checkpoint
        ("save_file", 4, "step-00000002"),  # moments of the second
        ("seal", 2, "step-00000002"),  # its state
        ("_sync", 8, "step-00000004"),  # its folder has its name
    ],
)
def test_a_run_that_is_killed_while_it_writes_loses_nothing_before(tmp_path, whole, place, number, kept):
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", SCRIPT, str(out), place, str(number)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    newest = checkpoint.newest(out)
    assert (newest.name if newest else None) == kept
    if newest is not None:
        assert checkpoint.load_state(newest).step == int(kept[-1])
    train(settings(), toy_questions(12), toy_tokens(12), out, resume=True, quiet=True)
    assert losses(out) == losses(whole)
    assert [path.name for path in out.glob("checkpoints/*")] == ["step-00000008"]
    found, wanted = (load_file(checkpoint.newest(run) / checkpoint.MODEL_FILE) for run in (out, whole))
    assert all(found[name].equal(wanted[name]) for name in wanted)


def test_steps_go_on_while_a_checkpoint_is_written_and_it_holds_the_values_of_its_step(tmp_path, monkeypatch, whole):
    """The first checkpoint is held back until the loop has come to the next one."""
    really, can_go, started = checkpoint.save, threading.Event(), []

    def held(run, *, step, **values):
        started.append(step)
        if step == 2:
            can_go.wait(60)
        return really(run, step=step, **values)

    from trainer.loop import train as module

    read = module._Loop._step

    def step(self, model, optimizer, number, batches):
        if number == 3:
            assert not (tmp_path / "run/checkpoints/step-00000002").exists()
            can_go.set()
        return read(self, model, optimizer, number, batches)

    monkeypatch.setattr(checkpoint, "save", held)
    monkeypatch.setattr(module._Loop, "_step", step)
    config = settings()
    train(config, toy_questions(12), toy_tokens(12), tmp_path / "run", quiet=True, stop_at=4)
    assert started == [2, 4]
    assert losses(tmp_path / "run") == losses(whole)[:4]
    monkeypatch.undo()
    train(config, toy_questions(12), toy_tokens(12), tmp_path / "run", resume=True, quiet=True)
    assert losses(tmp_path / "run") == losses(whole)


def test_a_full_disk_in_the_background_ends_the_run_with_its_reason(tmp_path, monkeypatch):
    out = tmp_path / "run"

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunStoppedError, match="the disk is full"):
        train(settings(), toy_questions(12), toy_tokens(12), out, quiet=True)
    assert not list(out.glob("checkpoints/*"))
    monkeypatch.undo()
    assert train(settings(), toy_questions(12), toy_tokens(12), out, resume=True, quiet=True).steps == 8

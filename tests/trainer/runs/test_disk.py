"""Disks that are full, and what killed processes leave behind."""

import errno
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from mervcache.errors import RunStoppedError
from mervcache.files import replace_text
from trainer.loop.train import train
from trainer.runs import checkpoint
from trainer.runs.disk import disk_faults, remove_leftovers

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def files_up_to(num_bytes):
    """Larger ones are refused by the kernel, as by a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def left_in(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_checkpoint_that_does_not_fit_leaves_nothing_and_says_so(tmp_path, config, samples, tokens):
    out = tmp_path / "run"
    train(config, samples, tokens, out, stop_at=2, quiet=True)
    size = (checkpoint.newest(out) / checkpoint.MODEL_FILE).stat().st_size
    for _ in range(2):
        with (
            files_up_to(size // 2),
            pytest.raises(RunStoppedError, match=r"cannot write a checkpoint of \d") as e,
        ):
            train(config, samples, tokens, out, resume=True, quiet=True)
        assert "are free there" in str(e.value)
        assert "--resume auto" in str(e.value)
        assert left_in(out) == ["step-00000002"]
    assert train(config, samples, tokens, out, resume=True, quiet=True).steps == 6


def test_metrics_that_do_not_fit_are_said(tmp_path, config, samples, tokens):
    with files_up_to(200_000):  # room for settings and tokenizer
        (tmp_path / "run").mkdir()
        (tmp_path / "run/metrics.jsonl").write_text('{"step": -1, "filler": "' + "x" * 199_900 + '"}\n')
        with pytest.raises(RunStoppedError, match="cannot write metrics"):
            train(config, samples, tokens, tmp_path / "run", quiet=True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_faults_of_the_disk_are_named_and_others_pass(tmp_path, number):
    with pytest.raises(RunStoppedError, match=os.strerror(number)), disk_faults(tmp_path / "not/yet", "x", num_bytes=5):
        raise OSError(number, os.strerror(number))
    with pytest.raises(FileNotFoundError), disk_faults(tmp_path, "x"):
        (tmp_path / "none").read_text()


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from trainer.runs import checkpoint

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file_really, checkpoint.save_file = checkpoint.save_file, None
files = iter([checkpoint.save_file_really, die])
checkpoint.save_file = lambda *arguments: next(files)(*arguments)
tensors = {"a": torch.zeros(9)}
checkpoint.save(Path(sys.argv[1]), step=2, weights=tensors, optimizer=tensors, data_digest="", identities={}, keep=1)
"""


def test_what_a_killed_process_left_is_removed_at_the_next_start(tmp_path, config, samples, tokens):
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], env=environment, check=False)
        assert killed.returncode == -signal.SIGKILL
    (out / ".tmp-config.yaml-7").write_text("half")
    assert len(left_in(out)) == 2
    train(config, samples, tokens, out, stop_at=2, quiet=True)
    assert left_in(out) == ["step-00000002"]
    assert not (out / ".tmp-config.yaml-7").exists()


def test_links_among_the_leftovers_are_removed_and_not_followed(tmp_path):
    (tmp_path / "else").mkdir()
    (tmp_path / "else/kept").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.tmp-link").symlink_to(tmp_path / "else")
    remove_leftovers(tmp_path / "run")
    assert (tmp_path / "else/kept").exists()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_text_that_does_not_fit_leaves_no_half_of_it(tmp_path):
    path = replace_text(tmp_path / "a.txt", "before")
    with files_up_to(10), pytest.raises(OSError, match="File too large"):
        replace_text(path, "x" * 100)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "before"

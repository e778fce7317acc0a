import os
import stat

import pytest

from trainer.give.export import export_run
from trainer.loop.train import train
from trainer.runs import checkpoint
from trainer.runs.modes import give_usual_modes


@pytest.fixture
def open_umask():
    """A umask that lets a group write, unlike what a temporary file gets."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def modes(folder):
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*.safetensors")}


def test_weights_get_what_the_umask_leaves_and_nothing_else_changes(tmp_path, open_umask):
    for name in ("a.safetensors", "b.json"):
        (tmp_path / name).touch(mode=0o600)
    give_usual_modes(tmp_path)
    assert modes(tmp_path) == {"a.safetensors": 0o664}
    assert stat.S_IMODE((tmp_path / "b.json").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.json"]


def test_whoever_may_read_a_run_may_read_its_weights(tmp_path, config, samples, tokens, open_umask):
    train(config, samples, tokens, tmp_path / "run", is_quiet=True)
    assert modes(checkpoint.newest(tmp_path / "run")) == {"model.safetensors": 0o664, "optimizer.safetensors": 0o664}
    export_run(tmp_path / "run", tmp_path / "export")
    found = modes(tmp_path / "export")
    assert {"projectors.safetensors", "fusion.safetensors", "model.safetensors"} <= set(found)
    assert set(found.values()) == {0o664}

import os
import stat

import pytest

from mervcache.files import apply_umask, atomic_directory, file_sha256, replace_text
from trainer.loop.train import train
from trainer.runs import checkpoint
from trainer.runs.export import export_run


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
    apply_umask(tmp_path)
    assert modes(tmp_path) == {"a.safetensors": 0o664}
    assert stat.S_IMODE((tmp_path / "b.json").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.json"]


def test_weights_have_the_modes_of_the_other_files_of_a_run(tmp_path, config, samples, tokens, open_umask):
    train(config, samples, tokens, tmp_path / "run", quiet=True)
    assert modes(checkpoint.newest(tmp_path / "run")) == {"model.safetensors": 0o664, "optimizer.safetensors": 0o664}
    export_run(tmp_path / "run", tmp_path / "export")
    found = modes(tmp_path / "export")
    assert {"projectors.safetensors", "fusion.safetensors", "model.safetensors"} <= set(found)
    assert set(found.values()) == {0o664}


def test_a_folder_is_there_whole_when_its_block_ends(tmp_path, open_umask):
    out = tmp_path / "deep" / "out"
    with atomic_directory(out) as folder:
        (folder / "a.safetensors").touch(mode=0o600)
        assert folder.parent == out.parent  # a rename from another disk would be a copy
        assert not out.exists()
    assert modes(out) == {"a.safetensors": 0o664}
    assert list(out.parent.iterdir()) == [out]


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(tmp_path):
    left = tmp_path / f".tmp-export-{os.getpid()}"
    left.mkdir()
    (left / "half").touch()
    with atomic_directory(tmp_path / "export") as folder:
        (folder / "a").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "a"]


def test_of_a_folder_that_fails_nothing_is_left(tmp_path):
    def half_of_it():
        with atomic_directory(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_of_it()
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_cannot_be_written_leaves_the_one_of_before(tmp_path):
    path = replace_text(tmp_path / "a.txt", "before")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "\ud800")  # half of a surrogate pair: no UTF-8
    assert path.read_text() == "before"
    assert replace_text(path, "after").read_text() == "after"


def test_a_files_digest_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # the first example of FIPS 180-2
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

"""What a checkpoint from elsewhere may hold: tensors. Everything else is refused before it is built."""

import os
import zipfile

import pytest
import torch

from mervcache.errors import UserError
from trainer.official import read_checkpoint


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, is_zip):
    marker = tmp_path / "was-run"
    saved = {"model": {"projectors": {"weight": torch.zeros(2)}}, "optimizer": Bomb(marker)}
    torch.save(saved, tmp_path / "evil.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match=r"evil.pt is refused, and nothing in it was run") as error:
        read_checkpoint(tmp_path / "evil.pt")
    assert "posix.mkdir" in str(error.value) or not is_zip
    assert "weights_only" not in str(error.value)  # no advice to load it all the same
    assert not marker.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert marker.exists()  # the file is as bad as it should be


def test_the_environment_cannot_open_the_door(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"model": Bomb(tmp_path / "was-run")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="refused"):
        read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "was-run").exists()


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_checkpoint(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a.txt", "a")
    for name in ("text.pt", "other.pt"):
        with pytest.raises(UserError, match="is refused"):
            read_checkpoint(tmp_path / name)
    for index, saved in enumerate(([], {"model": []}, {"model": {"projectors": {"a": 1}}}, {"a": torch.zeros(1)})):
        torch.save(saved, tmp_path / f"{index}.pt")
        with pytest.raises(UserError, match="holds no"):
            read_checkpoint(tmp_path / f"{index}.pt")

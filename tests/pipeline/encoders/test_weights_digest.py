"""A remembered digest is found again as long as nothing that could change it was touched, and never longer."""

from __future__ import annotations

import os
import shutil

import pytest

from pipeline.encoders import load_encoder
from pipeline.encoders import weights as remembered
from pipeline.encoders.weights import cache_weights_digest, cached_weights_digest, weights_fingerprint


@pytest.fixture
def folder(checkpoint, spec_of, tmp_path):
    shutil.copytree(checkpoint(spec_of("siglip")), tmp_path / "weights", symlinks=False)
    return tmp_path / "weights"


def test_a_folder_keeps_its_fingerprint_until_a_file_of_it_is_touched(folder, spec_of):
    spec, seen = spec_of("siglip"), set()
    weights = folder / "model.safetensors"

    def look() -> str:
        mark = weights_fingerprint(spec, str(folder))
        assert mark == weights_fingerprint(spec, str(folder))
        seen.add(mark)
        return mark

    look()
    status = os.stat(weights)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same size under the old date
    look()
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    look()
    shutil.move(folder, folder.with_name("moved"))
    assert weights_fingerprint(spec, str(folder)) is None  # gone: only loading can tell what is wrong
    assert len(seen) == 3


def test_seeded_weights_are_told_apart_by_seed_network_and_versions(spec_of, monkeypatch):
    spec = spec_of("siglip")
    marks = {weights_fingerprint(spec, "random:0"), weights_fingerprint(spec, "random:1")}
    marks.add(
        weights_fingerprint(spec.with_architecture({"num_layers": spec.architecture["num_layers"] + 1}), "random:0")
    )
    monkeypatch.setattr(remembered, "_versions", lambda: ["torch 99"])
    marks.add(weights_fingerprint(spec, "random:0"))
    monkeypatch.setattr(remembered, "LOADER_VERSION", -1)
    marks.add(weights_fingerprint(spec, "random:0"))
    assert len(marks) == 5
    assert None not in marks


def test_what_loading_gave_is_remembered_across_processes_and_replaced_by_what_it_gives_now(
    spec_of, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = spec_of("siglip")
    mark, sha256 = weights_fingerprint(spec, "random:0"), load_encoder(spec, "random:0").weights_sha256
    assert cached_weights_digest(mark) is None
    assert not cache_weights_digest(mark, sha256)
    assert cached_weights_digest(mark) == sha256
    assert [path.name for path in (tmp_path / "merv-pipeline" / "weights").iterdir()] == [f"{mark}.json"]
    assert not cache_weights_digest(mark, sha256)
    assert cache_weights_digest(mark, "0" * 64)  # another one was remembered
    assert cached_weights_digest(mark) == "0" * 64


@pytest.mark.parametrize("text", ["", "[]", '{"sha256": "abc"}', '{"sha256": 3}', "{", '{"sha256": null}'])
def test_a_damaged_memory_is_no_memory(text, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_weights_digest("mark", "0" * 64)
    (tmp_path / "merv-pipeline" / "weights" / "mark.json").write_text(text)
    assert cached_weights_digest("mark") is None
    assert cached_weights_digest(None) is None


def test_a_home_that_cannot_be_written_to_costs_the_memory_alone(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not cache_weights_digest("mark", "0" * 64)
    assert cached_weights_digest("mark") is None

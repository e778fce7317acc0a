"""A folder as the pages assume it: a demo store, a run trained on it, and a clip."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """features/demo.zarr with two encoders at toy size, runs/demo of two steps, clip.mp4."""
    import mervcache

    folder = tmp_path_factory.mktemp("docs")
    before = Path.cwd()
    os.chdir(folder)  # paths in the run's record are relative to it, as a reader's are
    try:
        settings = {"encoders": ("dinov2", "siglip"), "options": {"train": 24, "heldout": 8}}
        config = mervcache.read_extract_config(ROOT / "pipeline/demo.yaml", settings)
        mervcache.extract(config, quiet=True)
        (stage,) = mervcache.get_stages("demo")
        stage = replace(stage, config=replace(stage.config, max_steps=2, batch_size=4, micro_batch_size=4))
        mervcache.train((stage,), "features/demo.zarr", "runs/demo")
        shutil.copy(next(Path("data/demo").rglob("*.mp4")), "clip.mp4")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def reader_folder(made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current folder."""
    folder = tmp_path / "reader"
    shutil.copytree(made_once, folder)
    monkeypatch.chdir(folder)
    return folder

"""Killed at any moment, raced by anybody: the same bytes in the end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from featurestore import FeatureStore, verify_store

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def start(path, first=0, noise=0) -> subprocess.Popen:
    program = [sys.executable, "-m", "tests.featurestore.extract_loop"]
    return subprocess.Popen([*program, str(path), str(first), str(noise)], cwd=ROOT)


def run(path, **options) -> None:
    assert start(path, **options).wait() == 0


def same_input_same_bytes(path: Path) -> dict[str, bytes]:
    """The files that are a function of the input: zarr.json, clip parts, shards and receipts."""
    tops = ("zarr.json", "clips", "video", "image", "receipts")
    files = [file for top in tops for file in [path / top, *(path / top).rglob("*")] if file.is_file()]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "store.zarr"
    run(path)
    return path


def test_a_store_that_was_killed_again_and_again_has_the_bytes_of_an_undisturbed_one(undisturbed, tmp_path):
    path, rng = tmp_path / "store.zarr", random.Random(0)
    kills = 0
    for _ in range(10):
        process = start(path, first=rng.randrange(4))
        # Kill while it works: from the moment the store changes, a random part of what a whole run takes.
        before = time.monotonic()
        while process.poll() is None and not (path / "receipts").exists() and time.monotonic() - before < 20:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.4))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3
    run(path)
    assert same_input_same_bytes(path) == same_input_same_bytes(undisturbed)
    assert verify_store(path, "full") == []


def test_two_writers_of_the_same_blocks_make_one_sound_store(undisturbed, tmp_path):
    path = tmp_path / "store.zarr"
    writers = [start(path), start(path, first=2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    run(path)  # what one planned while the other had not yet added its clips
    assert same_input_same_bytes(path) == same_input_same_bytes(undisturbed)
    assert verify_store(path, "full") == []


def test_two_writers_whose_devices_round_differently_make_one_sound_store(undisturbed, tmp_path):
    path = tmp_path / "store.zarr"
    writers = [start(path, noise=1), start(path, first=1, noise=2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    run(path, noise=3)
    assert verify_store(path, "full") == []
    store = FeatureStore.open(path)
    for encoder in store.encoders:
        table = store.clips
        ok = table.filter(table[encoder])["clip_id"].to_pylist()
        assert store.read(ok, encoder=encoder).shape[0] == len(ok)
        reasons = {row["reason"] for row in store.quarantine.to_pylist()}
        assert reasons <= {"the file is cut off", "lost in an interrupted attempt"}
    assert sorted(same_input_same_bytes(path)) == sorted(same_input_same_bytes(undisturbed))

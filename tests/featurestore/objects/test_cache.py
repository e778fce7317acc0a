"""Reads of remote stores are cached on this machine: bounded, shared among processes, checked on every use."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from featurestore.objects.cache import CacheFolder, cache_bound, cache_folder
from featurestore.objects.open import open_objects
from featurestore.objects.remote import RemoteObjects
from featurestore.store import FeatureStore
from featurestore.transfer.sync import push
from mervcache.errors import UserError


@pytest.fixture
def far(kit, make, s3):
    """A pushed store of 24 videos; `far.ids`, `far.tokens`, `far.url`."""
    kit.writer().add_clips([make.video(n) for n in range(24)])
    kit.fill()
    push(kit.path, s3)

    class Far:
        url = s3
        ids = kit.open().clips["clip_id"].to_pylist()
        tokens = kit.open().read(ids, encoder="dinov2")

    return Far


@pytest.fixture
def requests(monkeypatch):
    """Keys of the ranges that were fetched."""
    fetched: list[str] = []
    get_range = RemoteObjects.get_range

    def counted(self, key, offset, length):
        fetched.append(key)
        return get_range(self, key, offset, length)

    monkeypatch.setattr(RemoteObjects, "get_range", counted)
    return fetched


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_was_read_once_is_not_fetched_again(far, tmp_path, requests):
    first = FeatureStore.open(far.url, cache=tmp_path / "cache")
    assert np.array_equal(first.read(far.ids, encoder="dinov2"), far.tokens)
    assert 24 + 6 <= len(requests) <= 24 + 24  # rows, and the index of each of six shards, by threads at once perhaps
    requests.clear()
    second = FeatureStore.open(far.url, cache=tmp_path / "cache")
    assert np.array_equal(second.read(far.ids[::-1], encoder="dinov2"), far.tokens[::-1])
    assert requests == []


def test_a_flipped_bit_in_the_cache_is_fetched_again(far, tmp_path, requests):
    FeatureStore.open(far.url, cache=tmp_path / "cache").read(far.ids, encoder="dinov2")
    for path in files(tmp_path / "cache"):
        data = bytearray(path.read_bytes())
        for place in range(0, len(data), 97):
            data[place] ^= 0x40
        path.write_bytes(data)
    requests.clear()
    again = FeatureStore.open(far.url, cache=tmp_path / "cache")
    assert np.array_equal(again.read(far.ids, encoder="dinov2"), far.tokens)
    assert len(requests) >= 24


def test_a_hole_or_half_a_write_is_fetched_again(far, tmp_path):
    FeatureStore.open(far.url, cache=tmp_path / "cache").read(far.ids, encoder="dinov2")
    for path in files(tmp_path / "cache"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = FeatureStore.open(far.url, cache=tmp_path / "cache")
    assert np.array_equal(again.read(far.ids, encoder="dinov2"), far.tokens)


def test_the_cache_stays_within_its_bound(far, tmp_path):
    bound = 30_000
    store = FeatureStore.open(far.url, cache=tmp_path / "cache", cache_bytes=bound)
    for start in range(24):
        wanted = far.ids[start:] + far.ids[:start]
        assert np.array_equal(store.read(wanted[:3], encoder="dinov2")[0], far.tokens[start])
        taken = sum(path.stat().st_blocks * 512 for path in files(tmp_path / "cache"))
        assert taken <= bound + 5 * 4096
    assert files(tmp_path / "cache")


def test_the_least_recently_used_go_first(tmp_path):
    folder = CacheFolder(tmp_path / "cache", 1 << 20)
    names = [folder.path("root", f"key{n}", "v") for n in range(4)]
    for number, path in enumerate(names):
        folder.write_whole(path, bytes(3000))
        os.utime(path, (number, number))
    os.utime(names[0], (100, 100))
    folder.bound = 3 * 4096 + 10
    folder.make_room()
    assert [path.exists() for path in names] == [True, False, False, True]


def test_what_was_replaced_in_the_store_is_not_served_from_the_cache(far, tmp_path):
    objects = open_objects(far.url)
    store = FeatureStore.open(far.url, cache=tmp_path / "cache")
    store.read(far.ids, encoder="dinov2")
    shard = next(key for key in objects.list_tree("video") if "/tokens/c/0/" in key)
    other = next(key for key in objects.list_tree("video") if "/tokens/c/1/" in key)
    objects.replace(shard, objects.get(other))
    fresh = FeatureStore.open(far.url, cache=tmp_path / "cache")
    assert np.array_equal(fresh.read(far.ids[:4], encoder="dinov2"), far.tokens[4:8])


def test_threads_and_processes_share_one_cache(far, tmp_path):
    program = (
        "import pickle, sys, numpy as np; store, ids = pickle.load(open(sys.argv[1], 'rb'));"
        "np.save(sys.argv[2], store.read(ids, encoder='dinov2'))"
    )
    store = FeatureStore.open(far.url, cache=tmp_path / "cache")
    (tmp_path / "work").write_bytes(pickle.dumps((store, far.ids)))
    outs = [tmp_path / f"{n}.npy" for n in range(3)]
    running = [subprocess.Popen([sys.executable, "-c", program, tmp_path / "work", out]) for out in outs]
    with ThreadPoolExecutor(4) as pool:
        for tokens in pool.map(lambda _: store.read(far.ids, encoder="dinov2"), range(4)):
            assert np.array_equal(tokens, far.tokens)
    assert [process.wait(120) for process in running] == [0, 0, 0]
    for out in outs:
        assert np.array_equal(np.load(out), far.tokens)


def test_a_cache_that_cannot_be_written_costs_nothing_but_speed(far, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    store = FeatureStore.open(far.url, cache=tmp_path / "cache")
    monkeypatch.setattr(os, "pwrite", full)
    assert np.array_equal(store.read(far.ids, encoder="dinov2"), far.tokens)


def test_without_a_cache_nothing_is_kept(far, tmp_path, monkeypatch):
    monkeypatch.setenv("MERV_CACHE_DIR", str(tmp_path / "cache"))
    FeatureStore.open(far.url, cache=False).read(far.ids, encoder="dinov2")
    assert not (tmp_path / "cache").exists()
    FeatureStore.open(far.url).read(far.ids, encoder="dinov2")
    assert files(tmp_path / "cache")


def test_folder_and_bound_come_from_the_caller_then_the_environment_then_the_users_folder(monkeypatch, tmp_path):
    for name in ("MERV_CACHE_DIR", "MERV_CACHE_BYTES", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/merv-cache"
    assert cache_bound() == 50_000_000_000
    monkeypatch.setenv("MERV_CACHE_DIR", "/scratch/merv")
    monkeypatch.setenv("MERV_CACHE_BYTES", "2e9")
    assert (str(cache_folder()), cache_bound()) == ("/scratch/merv", 2_000_000_000)
    assert (str(cache_folder("/mine")), cache_bound(7)) == ("/mine", 7)
    monkeypatch.setenv("MERV_CACHE_BYTES", "much")
    with pytest.raises(UserError, match="number of bytes"):
        cache_bound()

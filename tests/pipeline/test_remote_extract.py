"""An extraction from tar shards in a bucket gives the store that the same shards in a folder give."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import obstore
import pytest

from featurestore import FeatureStore, verify_store
from featurestore.objects.remote import connect
from featurestore.transfer.sync import transfer
from pipeline.media import Source
from pipeline.recompute import verify_media
from pipeline.remote_shards import connection
from pipeline.removal import remove_clips
from tests.featurestore.s3_server import counts
from tests.pipeline.datasets.conftest import add_to_tar

ONE = ["siglip"]


@pytest.fixture
def shards(lab, tmp_path, s3, monkeypatch) -> tuple[Path, str]:
    """Three shards of the lab's videos with captions: their folder, and the URL of their copies in a bucket."""
    monkeypatch.setenv("MERV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))  # other tests' conversations are kept in theirs
    connection.cache_clear()  # of another server
    folder, url = tmp_path / "shards", f"{s3.rpartition('/stores')[0]}/data"
    folder.mkdir()
    store = connect(url)
    names = list(lab.VIDEOS)
    for number in range(3):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in names[3 * number : 3 * number + 3]:
                add_to_tar(tar, Path(name).name, (lab.root / name).read_bytes())
                add_to_tar(tar, f"{Path(name).stem}.txt", b"A block.")
        (folder / f"{number}.tar").write_bytes(buffer.getvalue())
        obstore.put(store, f"{number}.tar", buffer.getvalue())
    return folder, url


def test_shards_in_a_bucket_and_in_a_folder_give_the_same_store(lab, shards, s3_endpoint, tmp_path):
    folder, url = shards
    lab.extract(encoders=ONE, dataset="webdataset", root=str(folder), store=str(tmp_path / "local.zarr"))
    expected = lab.hashes(tmp_path / "local.zarr")
    counts(s3_endpoint)
    summary = lab.extract(encoders=ONE, dataset="webdataset", root=url)
    assert (summary.clips, summary.failed) == (9, 0)
    assert lab.hashes(lab.store) == expected
    assert sum(requests for requests, _ in counts(s3_endpoint).values()) < 40
    (run,) = FeatureStore.open(lab.store).runs()
    assert run["root"] == url
    assert lab.extract(encoders=ONE, dataset="webdataset", root=url).clips == 0
    assert list(counts(s3_endpoint)) == ["LIST"]
    assert lab.extract(encoders=["siglip", "dinov2"], dataset="webdataset", root=url).clips == 9
    assert list(counts(s3_endpoint)) == ["LIST"]  # the spool held the media
    assert verify_store(lab.store, "full") == []
    assert verify_media(lab.store, "full") == []


def test_a_shard_that_is_replaced_is_seen_as_changed_media_and_encoded_again_on_request(lab, shards):
    folder, url = shards
    settings = {"encoders": ONE, "dataset": "webdataset", "root": url}
    lab.extract(**settings)
    before = FeatureStore.open(lab.store)
    names = {"v0": "v4", "v4": "v0"}  # two videos of two shards change places
    store = connect(url)
    for number in (0, 1):
        buffer = io.BytesIO()
        with tarfile.open(folder / f"{number}.tar") as old, tarfile.open(fileobj=buffer, mode="w") as new:
            for member in old:
                stem, _, ending = member.name.partition(".")
                (path,) = lab.root.rglob(f"{names.get(stem, stem)}.mp4")
                add_to_tar(new, member.name, path.read_bytes() if ending == "mp4" else b"A block.")
        obstore.put(store, f"{number}.tar", buffer.getvalue())
    summary = lab.extract(**settings)
    assert (summary.clips, summary.changed) == (0, 2)
    summary = lab.extract(**settings, refresh=True)
    assert (summary.clips, summary.refreshed) == (2, 2)
    after = FeatureStore.open(lab.store)
    swapped = ["webdataset/1.tar/v4.mp4", "webdataset/0.tar/v0.mp4"]
    assert np.array_equal(after.read(swapped, encoder="siglip"), before.read(swapped[::-1], encoder="siglip"))


def test_what_happens_to_a_shard_between_listing_and_reading_is_counted_or_stops_the_run(lab, shards):
    folder, url = shards
    _, blocks, tasks = lab.plan(encoders=ONE, dataset="webdataset", root=url)
    from pipeline.worker.engine import close_engines
    from pipeline.worker.isolate import compute_block

    assert len(tasks) == len(blocks) == 3  # of four clips each
    obstore.put(connect(url), "0.tar", (folder / "1.tar").read_bytes())
    report = compute_block(tasks[0])
    close_engines()
    assert (report.clips, report.reasons) == (4, {"tar shard changed after it was listed": 3})
    root = lab.plan(encoders=ONE, dataset="webdataset", root=url)[0].listing.root
    assert Source.find(root, "0.tar/v3.mp4").num_bytes == (lab.root / "videochatgpt_tune/v3.mp4").stat().st_size


def test_a_removed_clip_is_in_no_spool_and_no_cache_and_what_is_left_is_named(lab, shards, s3, tmp_path):
    _, url = shards
    lab.extract(encoders=ONE, dataset="webdataset", root=url)
    transfer(lab.store, s3)
    gone = "webdataset/1.tar/v3.mp4"
    FeatureStore.open(s3).read([gone], encoder="siglip")  # through the cache of remote stores
    FeatureStore.open(s3).samples()
    cache = tmp_path / "cache"
    held = [path for path in cache.rglob("*") if path.is_file()]
    done = remove_clips(s3, [gone], reason="consent withdrawn", all_copies=True)
    left = [path for path in cache.rglob("*") if path.is_file()]
    video = (lab.root / "videochatgpt_tune/v3.mp4").read_bytes()
    assert any(video in path.read_bytes() for path in held if path.exists()) is False
    assert done["files removed from spools and caches"] == len(held) - len(left) > 0
    assert not list(cache.glob("??/*"))
    assert len(list((cache / "spool").glob("*-*"))) == 6  # the other shards' members
    assert len(list((cache / "shards").rglob("*.texts.gz"))) == 2
    assert [line.split(":")[0] for line in done["not reached"][:2]] == [
        "the media",
        "older versions of objects below s3",
    ]
    assert f"{url}/1.tar" in done["not reached"][0]
    assert "history of a copy on the Hub" in " ".join(done["not reached"])
    again = remove_clips(s3, [gone], reason="consent withdrawn", all_copies=True)
    assert (again["already removed"], again["files removed from spools and caches"]) == (1, 0)

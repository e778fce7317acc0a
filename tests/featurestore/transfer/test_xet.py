"""Shards go to the Hub and come back over Xet, by huggingface_hub and the real hf_xet; a bucket has all files in it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from featurestore.maintenance.tombstone import tombstone
from featurestore.maintenance.verify import verify_store
from featurestore.store import FeatureStore
from featurestore.tags import tag_snapshot
from featurestore.transfer.sync import push, transfer
from mervcache.errors import StoreDamagedError, UserError
from mervcache.files import sha256_hex

pytestmark = pytest.mark.slow

REPOSITORY, BUCKET = "hf://datasets/lab/feats", "hf://buckets/lab/feats"


@pytest.fixture
def full(kit, make):
    kit.writer().add_clips([make.video(number) for number in range(6)])
    kit.fill(broken=("videos/3.mp4",))
    kit.fill(make.identity(encoder="siglip", storage_dtype="uint8"))
    return kit


def shards_of(kit) -> dict[str, bytes]:
    files = {path.relative_to(kit.path).as_posix(): path for path in kit.path.rglob("*") if path.is_file()}
    return {key: path.read_bytes() for key, path in files.items() if "/c/" in key}


def test_shards_go_to_a_repository_and_come_back_over_xet(full, xet_hub, tmp_path):
    push(full.path, REPOSITORY)
    large = {key for key in shards_of(full) if key in xet_hub.lfs_paths[xet_hub.heads["main"]]}
    assert large
    assert xet_hub.uploads == []  # nothing by the older protocol
    assert {key: xet_hub.files[key] for key in shards_of(full)} == shards_of(full)
    xet_hub.plain.clear()
    transfer(REPOSITORY, tmp_path / "back.zarr", check=True)
    assert not {sha256_hex(shards_of(full)[key]) for key in large} & set(xet_hub.plain)
    assert verify_store(tmp_path / "back.zarr", "full") == []
    here, there = full.open(), FeatureStore.open(REPOSITORY, cache=False)  # in place, by ranges
    ids = [clip for clip in here.clips["clip_id"].to_pylist() if "/3.mp4" not in clip]
    assert np.array_equal(here.read(ids, encoder="dinov2"), there.read(ids, encoder="dinov2"))


def test_pushing_again_sends_nothing(full, xet_hub):
    push(full.path, REPOSITORY)
    commits, blocks = len(xet_hub.commits), sorted(xet_hub.folder.glob("xet/xorbs/xorbs/*"))
    assert push(full.path, REPOSITORY).sent_bytes == 0
    assert (len(xet_hub.commits), sorted(xet_hub.folder.glob("xet/xorbs/xorbs/*"))) == (commits, blocks)


def test_a_store_goes_to_a_bucket_is_read_there_and_comes_back(full, xet_hub, make, tmp_path):
    tag_snapshot(full.path, "v1")
    done = push(full.path, BUCKET)
    assert (done.sent_blocks, done.sent_bytes) == (done.blocks, done.bytes)
    order = [path for paths in xet_hub.batches for path in paths]
    for receipt in (path for path in order if path.startswith("receipts/")):
        _, kind, group, block = receipt.split("/")
        shards = [path for path in order if path.startswith(f"{kind}/{group}/") and f"/c/{int(block[:8])}/" in path]
        assert shards
        assert all(order.index(shard) < order.index(receipt) for shard in shards)
    snapshot = order.index(f"snapshots/{full.open().snapshot}.json")
    assert all(order.index(path) < snapshot for path in order if path.startswith(("receipts/", "clips/")))
    here, there = full.open(), FeatureStore.open(BUCKET, snapshot="v1", cache=False)
    ids = [clip for clip in here.clips["clip_id"].to_pylist() if "/3.mp4" not in clip]
    for encoder in here.encoders:
        assert np.array_equal(here.read(ids, encoder=encoder), there.read(ids, encoder=encoder))
    xet_hub.plain.clear()
    transfer(BUCKET, tmp_path / "back.zarr", check=True)
    assert not set(shards_of(full)) & set(xet_hub.plain)
    assert verify_store(tmp_path / "back.zarr", "full") == []
    assert FeatureStore.open(tmp_path / "back.zarr").tags == here.tags

    sent = len(xet_hub.batches)
    assert push(full.path, BUCKET).sent_bytes == 0
    assert len(xet_hub.batches) == sent
    tombstone(full.path, [make.video(1).clip_id], reason="licence")
    push(full.path, BUCKET)
    assert make.video(1).clip_id not in FeatureStore.open(BUCKET, cache=False).clips["clip_id"].to_pylist()
    assert {path for path in xet_hub.bucket if "/c/" in path} == set(shards_of(full))


def test_a_bucket_is_written_by_push_alone_and_names_what_is_missing(full, xet_hub, monkeypatch):
    with pytest.raises(UserError, match="not written in place"):
        transfer(full.path, BUCKET)
    with pytest.raises(UserError, match="not written in place"):
        tag_snapshot(BUCKET, "v1")
    push(full.path, f"{BUCKET}/stores/one")
    assert {path.split("/")[0] for path in xet_hub.bucket} == {"stores"}
    listing = json.loads(xet_hub.bucket["stores/one/listing.json"][1])["objects"]
    assert listing.keys() >= shards_of(full).keys()
    key = next(path for path in xet_hub.bucket if "/c/" in path)
    xet_hash, data = xet_hub.bucket[key]
    xet_hub.bucket[key] = (xet_hash, bytes(len(data)))
    with pytest.raises(StoreDamagedError, match="arrived with other bytes"):
        push(full.path, f"{BUCKET}/stores/one", check=True)
    with pytest.raises(UserError, match=r"there is no bucket lab/other .*hf buckets create lab/other"):
        push(full.path, "hf://buckets/lab/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with pytest.raises(UserError, match=r"buckets need Xet: pip install hf_xet"):
        push(full.path, BUCKET)

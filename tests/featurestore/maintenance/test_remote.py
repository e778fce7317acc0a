"""A store in a bucket is verified, mended and rid of clips as one in a folder is."""

from __future__ import annotations

import numpy as np
import pytest

from featurestore.maintenance.repair import repair_store
from featurestore.maintenance.tombstone import tombstone
from featurestore.maintenance.verify import verify_store
from featurestore.objects.open import open_objects
from featurestore.store import FeatureStore
from featurestore.transfer.sync import push
from mervcache.errors import ClipUnavailableError

GONE = "tiny/videos/2.mp4"


@pytest.fixture
def pushed(kit, make, s3) -> str:
    kit.writer().add_clips([make.video(n) for n in range(6)])
    kit.fill()
    push(kit.path, s3)
    return s3


def test_a_flipped_bit_in_a_bucket_is_found_and_mended_and_nothing_else_is_put(pushed):
    assert verify_store(pushed, "full") == []
    objects = open_objects(pushed)
    before = {key: objects.get(key) for key in objects.list_tree() if not key.startswith("tmp/")}
    shard = next(key for key in before if "/tokens/c/0/" in key)
    document = "video/zarr.json"  # which no other file is checked by
    for key in (shard, document):
        data = bytearray(before[key])
        data[len(data) // 2] ^= 4
        objects.replace(key, bytes(data))
    assert {finding.key for finding in verify_store(pushed, "full")} >= {shard, document}
    done = repair_store(pushed)
    assert {(each.key, each.done) for each in done} == {
        (shard, "one flipped bit was undone"),
        (document, "made again from what it describes"),
    }
    assert {key: objects.get(key) for key in objects.list_tree() if not key.startswith("tmp/")} == before


def test_a_clip_is_removed_from_a_bucket(pushed, make):
    others = ["tiny/videos/0.mp4", "tiny/videos/5.mp4"]
    expected = FeatureStore.open(pushed, cache=False).read(others, encoder="dinov2")
    assert tombstone(pushed, [GONE], reason="licence")["blocks rewritten"] == 1
    store = FeatureStore.open(pushed, cache=False)
    np.testing.assert_array_equal(store.read(others, encoder="dinov2"), expected)
    with pytest.raises(ClipUnavailableError, match="was removed"):
        store.read([GONE], encoder="dinov2")
    assert verify_store(pushed, "full") == []

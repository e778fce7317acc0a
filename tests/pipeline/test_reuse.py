"""A colleague's tokens are copied where the media are the same to the byte, and computed where they are not."""

from __future__ import annotations

import numpy as np
import pytest

from featurestore import FeatureStore, verify_store
from pipeline.forecast import forecast

ONE = ["siglip"]


def tokens(store, encoder="siglip"):
    opened = FeatureStore.open(store)
    ids = sorted(clip["clip_id"] for clip in opened.clips.to_pylist() if clip[encoder])
    return ids, opened.read(ids, encoder=encoder)


def test_what_another_store_holds_is_copied_and_the_rest_computed(lab, extracted, tmp_path):
    summary = lab.extract(encoders=ONE, reuse=str(extracted.store))
    assert (summary.reused, summary.frames) == (summary.clips, 0)
    ids, mine = tokens(lab.store)
    assert len(ids) == summary.clips
    assert np.array_equal(mine, FeatureStore.open(extracted.store).read(ids, encoder="siglip"))
    assert verify_store(lab.store, "full") == []


def test_other_bytes_under_the_same_name_are_computed(lab, extracted):
    root = lab.copy_of_root()
    changed = next(iter(lab.VIDEOS))
    lab.film(root / changed, "libx264", 30, 10, 64, 48)
    summary = lab.extract(encoders=ONE, reuse=str(extracted.store), kind="video")
    assert summary.reused == summary.clips - 1
    assert summary.frames > 0
    assert verify_store(lab.store, "full") == []
    (clip,) = [c for c in FeatureStore.open(lab.store).clips["clip_id"].to_pylist() if changed in c]
    mine, theirs = (FeatureStore.open(s).read([clip], encoder="siglip") for s in (lab.store, extracted.store))
    assert not np.array_equal(mine, theirs)


def test_tokens_of_a_damaged_file_are_copied_only_where_damaged_files_are_accepted(lab):
    path = lab.copy_of_root() / "valley/v8.mp4"
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 400] = bytes(400)
    path.write_bytes(data)
    theirs = str(lab.folder / "theirs.zarr")
    made = lab.extract(encoders=ONE, kind="video", store=theirs, accept_damaged=True)
    assert made.failed == 0
    kept_out = lab.extract(encoders=ONE, kind="video", reuse=theirs)
    assert (kept_out.reused, kept_out.failed) == (made.clips - 1, 1)
    assert "damaged file" in FeatureStore.open(lab.store).quarantine["reason"][0].as_py()
    accepted = lab.extract(encoders=ONE, kind="video", reuse=theirs, accept_damaged=True, retry_quarantine=True)
    assert (accepted.reused, accepted.failed) == (1, 0)


def test_another_identity_saves_nothing(lab, extracted):
    summary = lab.extract(encoders=ONE, reuse=str(extracted.store), storage_dtype="bfloat16", limit=2)
    assert summary.reused == 0


def test_the_plan_tells_what_the_other_store_saves(lab, extracted):
    plan = forecast(lab.config(encoders=ONE, reuse=str(extracted.store)), probe=0)
    assert sum(row.reusable for row in plan.rows) == sum(row.to_do for row in plan.rows) > 0
    assert sum(row.reusable for row in forecast(lab.config(encoders=ONE), probe=0).rows) == 0


@pytest.mark.parametrize("scheme", ["s3"])
def test_an_extraction_into_a_bucket_gives_the_bytes_of_one_into_a_folder(lab, s3, scheme, tmp_path):
    from featurestore.objects.open import open_objects
    from featurestore.transfer.sync import transfer

    lab.extract(encoders=ONE, kind="video", limit=5)
    summary = lab.extract(encoders=ONE, kind="video", limit=5, store=s3)
    assert (summary.store, summary.clips) == (s3, 5)
    objects = open_objects(s3)
    assert not objects.exists("tmp/driver.lease")
    expected = {key: (lab.store / key).read_bytes() for key in lab.hashes(lab.store)}
    assert {key: objects.get(key) for key in expected} == expected
    assert verify_store(s3, "full") == []
    assert lab.extract(encoders=ONE, kind="video", limit=5, store=s3).clips == 0
    transfer(s3, tmp_path / "pulled.zarr")
    assert verify_store(tmp_path / "pulled.zarr", "full") == []

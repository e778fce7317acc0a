"""The same media in two datasets of one store are encoded once, and nothing but their bytes decides."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featurestore import FeatureStore, verify_store
from featurestore.clips import Clip
from featurestore.layout import shard_key
from featurestore.maintenance.tombstone import tombstone
from featurestore.records import Receipt
from featurestore.shards import Shard
from featurestore.writer import StoreWriter
from pipeline.forecast import forecast
from pipeline.same_media import SameMediaTask, StoredMedia

ONE = ["siglip"]


def digests(store: Path, dataset: str, encoder: str = "siglip") -> dict[str, tuple]:
    """Path -> what the receipt says of the newest row of each video: decoder, media and digest of the stored row."""
    writer = StoreWriter.open(store)
    (group,) = [name for name in writer.encoder_groups("video") if name.startswith(f"{encoder}-")]
    opened, found = writer.open_group("video", group), {}
    for record in writer.clips().to_pylist():
        if record["dataset"] == dataset and record["kind"] == "video":
            receipt: Receipt = opened.receipt(record["row"] // writer.block_rows["video"])
            outcome = receipt.outcome(record["row"])
            found[record["path"]] = (outcome.state, outcome.decoder, outcome.media_sha256, outcome.digest)
    return found


@pytest.fixture
def other_names(lab, tmp_path) -> Path:
    """The lab's videos under other names, and one of other bytes."""
    folder = tmp_path / "other"
    folder.mkdir()
    for number, path in enumerate(lab.VIDEOS):
        shutil.copy(lab.root / path, folder / f"film-{number}.mp4")
    lab.film(folder / "new.mp4", "libx264", 30, 10, 64, 48)
    return folder


def test_a_second_dataset_of_the_same_media_is_copied_and_what_differs_is_encoded(lab, other_names, tmp_path):
    lab.extract(encoders=ONE)
    summary = lab.extract(encoders=ONE, dataset="folder", root=str(other_names))
    assert (summary.clips, summary.failed, summary.same_media, summary.reused) == (10, 0, 9, 0)
    assert summary.made["video/siglip"]["clips"] == 1
    assert verify_store(lab.store, "full") == []
    alone = tmp_path / "alone.zarr"
    lab.extract(encoders=ONE, dataset="folder", root=str(other_names), store=str(alone))
    assert digests(lab.store, "folder") == digests(alone, "folder")
    ids = [f"folder/{path}" for path in digests(alone, "folder")]
    mine, theirs = (FeatureStore.open(store).read(ids, encoder="siglip") for store in (lab.store, alone))
    assert np.array_equal(mine, theirs)


def test_an_encoder_that_the_other_dataset_lacks_is_computed(lab, other_names, tmp_path):
    lab.extract(encoders=ONE, kind="video", limit=4)
    both = {"encoders": ["siglip", "dinov2"], "dataset": "folder", "root": str(other_names)}
    summary = lab.extract(**both)
    assert summary.same_media == 4
    assert {name: made["clips"] for name, made in summary.made.items()} == {"video/siglip": 6, "video/dinov2": 10}
    assert verify_store(lab.store, "full") == []
    lab.extract(**both, store=str(tmp_path / "alone.zarr"))
    for encoder in both["encoders"]:
        assert digests(lab.store, "folder", encoder) == digests(tmp_path / "alone.zarr", "folder", encoder)


def test_other_identities_and_the_clips_of_the_dataset_itself_are_not_looked_at(lab, other_names):
    lab.extract(encoders=ONE, kind="video", limit=4)
    assert lab.extract(encoders=ONE, kind="video").same_media == 0
    summary = lab.extract(
        encoders=ONE, dataset="folder", root=str(other_names), storage_dtype="bfloat16", new_identity=True
    )
    assert (summary.clips, summary.same_media) == (10, 0)


def test_damaged_and_removed_cells_are_no_source(lab, other_names):
    lab.extract(encoders=ONE, kind="video", limit=4)  # one block
    removed, damaged = (f"videollava/{path}" for path in list(lab.VIDEOS)[:2])
    writer = StoreWriter.open(lab.store)
    (name,) = writer.encoder_groups("video")
    key = shard_key("video", name, "tokens", 0)
    row = FeatureStore.open(lab.store).rows([damaged], encoder="siglip")[0]
    shard = Shard(writer.open_group("video", name).specs["tokens"], writer.objects.open(key))
    chunk = shard.chunk(row).tobytes()
    shard.close()
    tombstone(lab.store, [removed], reason="licence")
    data = (lab.store / key).read_bytes()
    assert chunk in data
    (lab.store / key).write_bytes(data.replace(chunk, bytes([chunk[0] ^ 1]) + chunk[1:]))
    summary = lab.extract(encoders=ONE, dataset="folder", root=str(other_names))
    assert (summary.clips, summary.failed) == (10, 0)
    assert summary.same_media == 2
    assert all(state == "ok" for state, *_ in digests(lab.store, "folder").values())


def test_a_span_is_part_of_what_must_be_the_same(lab):
    lab.extract(encoders=ONE, kind="video", limit=4)
    (path, (_, _, sha256, digest)) = next(iter(digests(lab.store, "videollava").items()))
    writer = StoreWriter.open(lab.store)
    (group,) = writer.encoder_groups("video")
    stored = StoredMedia(str(lab.store), "video", SameMediaTask("other", (("siglip", group),), None))
    clip = Clip(dataset="other", path="x.mp4", kind="video")
    find = {"encoders": ONE, "accept_damaged": False}
    assert stored.cells(sha256, clip, **find)["siglip"].outcome.digest == digest
    assert stored.cells(sha256, clip, ["dinov2"], accept_damaged=False) == {}
    assert stored.cells(sha256[:16] + "0" * 48, clip, **find) == {}  # the same first 64 bits alone
    assert stored.cells(sha256, replace(clip, end_s=1.0), **find) == {}
    assert stored.cells(sha256, replace(clip, kind="image"), **find) == {}
    assert path


def test_the_plan_says_what_other_datasets_seem_to_hold_and_what_a_probe_finds_under_other_names(lab, other_names):
    lab.extract(encoders=ONE, kind="video")
    plan = forecast(lab.config(encoders=ONE, dataset="folder"), probe=0)
    assert {row.kind: (row.to_do, row.reusable) for row in plan.rows} == {"video": (9, 9), "image": (5, 0)}
    plan = forecast(lab.config(encoders=ONE, dataset="folder", root=str(other_names)), probe=10)
    assert [(row.to_do, row.reusable) for row in plan.rows] == [(10, 0)]
    assert (plan.probed, plan.probed_stored) == (10, 9)
    plan = forecast(lab.config(encoders=["siglip", "dinov2"], dataset="folder", root=str(other_names)), probe=1)
    assert plan.probed_stored == 0  # one encoder has to see the clip

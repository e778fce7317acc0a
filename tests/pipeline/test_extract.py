"""Extraction end to end with toy encoders: what it writes, and what it leaves alone when a store grows."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import zarr

from featurestore import FeatureStore, verify_store
from mervcache.errors import IdentityConflictError, RunStoppedError, UserError
from pipeline.worker.block import extract_block

TWO = ("languagebind", "siglip")


def changed(before: dict, after: dict) -> set[str]:
    """Old files that are other than they were."""
    return {name for name, digest in before.items() if after.get(name) != digest}


def is_shape(name: str) -> bool:
    return name.endswith(("/tokens/zarr.json", "/prefix/zarr.json"))


def test_a_run_commits_every_clip_and_sample_and_says_so(extracted):
    summary, store = extracted.summary, FeatureStore.open(extracted.store)
    assert (summary.clips, summary.failed, summary.blocks) == (14, 0, 5)
    assert summary.snapshot == store.snapshot
    assert summary.frames == 9 * 32 + 5
    assert summary.bytes == sum(f.stat().st_size for f in extracted.store.rglob("c/*/*/*/*/*"))
    assert store.clips["path"].to_pylist() == [*extracted.VIDEOS, *extracted.IMAGES]
    for name in extracted.ENCODERS:
        assert store.clips[name].to_pylist() == [True] * 14
        assert store.encoders[name].grid == (8, 3, 3)
    assert {name: len(store.samples(name)) for name in store.sample_names} == {
        "videollava-align": 3,
        "videollava-finetune": 15,
    }
    assert store.quarantine.num_rows == 0
    assert verify_store(extracted.store, "full") == []


def test_the_journal_tells_how_the_run_came_about_and_no_deterministic_file_does(extracted):
    ((name, record),) = FeatureStore.open(extracted.store).journal()
    assert name == f"{extracted.summary.run}-driver"
    assert record["config"]["weights"] == {"": "random:0"}
    assert record["summary"]["clips"] == 14
    assert {entry["device"] for entry in record["encoders"].values()} == {"cpu"}
    assert all(entry["threads"] >= 1 for entry in record["encoders"].values())
    assert {"torch", "av", "transformers"} <= set(record["versions"])
    host, root = record["host"].encode(), str(extracted.root).encode()
    for file in extracted.hashes(extracted.store):
        data = (extracted.store / file).read_bytes()
        assert root not in data, file
        assert not file.endswith(".json") or host not in data, file


def test_a_second_run_does_nothing_and_leaves_every_byte(lab):
    lab.extract(encoders=TWO)
    before = lab.hashes(lab.store, ("",))
    summary = lab.extract(encoders=TWO)
    after = lab.hashes(lab.store, ("",))
    assert (summary.clips, summary.blocks, summary.bytes) == (0, 0, 0)
    assert not changed(before, after)
    assert all(name.startswith("journal/") for name in after.keys() - before.keys())


def test_new_clips_go_into_new_blocks_and_touch_nothing_old_but_shapes(lab):
    lab.copy_of_root()
    videos, images = list(lab.VIDEOS), list(lab.IMAGES)
    lab.annotate(lab.root, videos[:5], images[:2])
    first = lab.extract(encoders=TWO)
    before, snapshot = lab.hashes(lab.store), FeatureStore.open(lab.store)
    tokens = {name: snapshot.read(snapshot.clips["clip_id"].to_pylist(), encoder=name) for name in TWO}
    lab.annotate(lab.root, videos, images)
    second = lab.extract(encoders=TWO)
    assert (first.clips, second.clips) == (7, 7)
    touched = changed(before, lab.hashes(lab.store))
    assert touched
    assert all(is_shape(name) for name in touched), touched
    store = FeatureStore.open(lab.store)
    for name in TWO:
        old = snapshot.clips["clip_id"].to_pylist()
        assert np.array_equal(store.read(old, encoder=name), tokens[name])
        assert np.array_equal(snapshot.read(old, encoder=name), tokens[name])  # a reader of before goes on reading
        rows = [int(store.rows([clip], encoder=name)[0]) for clip in store.clips["clip_id"].to_pylist()]
        assert rows == [0, 1, 2, 3, 4, 0, 1, 8, 9, 10, 11, 4, 5, 6]  # a batch begins a new block of 4
    assert verify_store(lab.store, "full") == []


def test_a_new_encoder_computes_itself_alone_and_for_every_clip(lab, extracted):
    lab.extract(encoders=("siglip",))
    before = lab.hashes(lab.store)
    summary = lab.extract(encoders=TWO)
    assert summary.clips == 14
    assert not any(stage == "encode:siglip" for stage in summary.stage_s)
    assert not changed(before, lab.hashes(lab.store))
    store, together = FeatureStore.open(lab.store), FeatureStore.open(extracted.store)
    ids = store.clips["clip_id"].to_pylist()
    for name in TWO:
        assert np.array_equal(store.read(ids, encoder=name), together.read(ids, encoder=name))


def test_an_encoder_added_for_one_kind_leaves_the_other_kind_alone(lab):
    lab.extract(encoders=("siglip",))
    summary = lab.extract(encoders=TWO, kind="video")
    assert summary.clips == 9
    flags = FeatureStore.open(lab.store).clips["languagebind"].to_pylist()
    assert flags == [True] * 9 + [False] * 5


def test_quarantined_clips_are_left_alone_until_asked_and_then_get_a_new_row(lab):
    lab.copy_of_root()
    broken = lab.root / "valley/v5.mp4"
    whole = broken.read_bytes()
    broken.write_bytes(b"not a film")
    assert lab.extract(encoders=TWO).failed == 1
    before = lab.hashes(lab.store)
    broken.write_bytes(whole)
    assert lab.extract(encoders=TWO).clips == 0
    assert FeatureStore.open(lab.store).quarantine["encoder"].to_pylist() == list(TWO)
    summary = lab.extract(encoders=TWO, retry_quarantine=True)
    assert (summary.clips, summary.failed) == (1, 0)
    assert all(is_shape(name) for name in changed(before, lab.hashes(lab.store)))
    store = FeatureStore.open(lab.store)
    assert store.quarantine.num_rows == 0
    assert store.rows(["videollava/valley/v5.mp4"], encoder="siglip").tolist() == [12]
    assert lab.extract(encoders=TWO, retry_quarantine=True).clips == 0
    assert verify_store(lab.store, "full") == []


def test_a_retry_that_was_cut_short_is_gone_on_with_in_the_rows_it_had(lab):
    lab.copy_of_root()
    broken = lab.root / "valley/v5.mp4"
    whole = broken.read_bytes()
    broken.write_bytes(b"not a film")
    lab.extract(encoders=TWO)
    broken.write_bytes(whole)
    lab.plan(encoders=TWO, retry_quarantine=True)  # and no more: killed here
    assert len(list((lab.store / "clips").iterdir())) == 2
    summary = lab.extract(encoders=TWO, retry_quarantine=True)
    store = FeatureStore.open(lab.store)
    assert summary.clips == 1
    assert store.rows(["videollava/valley/v5.mp4"], encoder="siglip").tolist() == [12]
    assert len(list((lab.store / "clips").iterdir())) == 2


def test_changed_settings_stop_with_the_fields_that_differ_and_can_be_kept_beside(lab):
    lab.extract(encoders=("siglip",), limit=2)
    before = lab.hashes(lab.store, ("",))
    with pytest.raises(IdentityConflictError) as stopped:
        lab.extract(encoders=("siglip",), limit=2, grid=(8, 2, 2))
    message = str(stopped.value)
    assert "grid: stored [8, 3, 3], requested [8, 2, 2]" in message
    assert "--new-identity" in message
    assert "weights_sha256" not in message
    assert not changed(before, lab.hashes(lab.store, ("",)))
    assert lab.extract(encoders=("siglip",), limit=2, grid=(8, 2, 2), new_identity=True).clips == 2
    assert not changed({n: d for n, d in before.items() if "/siglip-" in n}, lab.hashes(lab.store, ("",)))
    store = FeatureStore.open(lab.store)
    assert {key: identity.grid for key, identity in store.encoders.items()} == {
        "siglip@8x2x2": (8, 2, 2),
        "siglip@8x3x3": (8, 3, 3),
    }


def test_another_batch_shape_than_the_groups_is_refused_with_the_stored_one(lab):
    lab.extract(encoders=("siglip",), limit=2)
    with pytest.raises(UserError, match="made with batches of 2 clips, got 4"):
        lab.extract(encoders=("siglip",), limit=2, batch={"video": 4})


def test_encoders_begun_with_different_batch_shapes_keep_their_own(lab):
    """A forward in another shape may round differently, so a common shape must not be forced on them."""
    lab.extract(encoders=("siglip",), limit=4, batch={"video": 2})
    lab.extract(encoders=("languagebind",), limit=4, batch={"video": 4})
    summary = lab.extract(encoders=TWO, kind="video", batch={})
    assert summary.blocks == 2 * 2  # two new blocks of videos, for each of the two
    groups = [json.loads(path.read_text())["attributes"] for path in (lab.store / "video").glob("*/zarr.json")]
    shapes = {group["identity"]["encoder"]: group["batch_shape"] for group in groups}
    assert shapes == {"siglip": 2, "languagebind": 4}
    assert all(FeatureStore.open(lab.store).clips[name].to_pylist() == [True] * 9 for name in TWO)


def test_the_order_in_which_blocks_are_finished_does_not_change_a_byte(lab, extracted):
    """The blocks of a plan, shuffled and computed one by one as a worker does, make the store that a run makes."""
    *_, tasks = lab.plan()
    assert len(tasks) == 5
    random.Random(1).shuffle(tasks)
    for task in tasks:
        extract_block(task)
    assert lab.extract().clips == 0  # publishes
    assert lab.hashes(lab.store) == lab.hashes(extracted.store)


def test_raw_grids_and_prefix_tokens_are_stored_on_request(lab):
    lab.extract(encoders=("dinov2", "siglip"), limit=2, grid="raw", prefix_tokens=True)
    store = FeatureStore.open(lab.store)
    ids = store.clips["clip_id"].to_pylist()
    assert store.read(ids, encoder="dinov2").shape == (2, 16, 4, 4, 32)
    assert store.read_prefix(ids, encoder="dinov2").shape == (2, 16, 5, 32)
    with pytest.raises(UserError, match="without prefix tokens"):
        store.read_prefix(ids, encoder="siglip")


def test_a_narrower_run_takes_no_sample_of_another_clip_away(lab):
    def ids(name="videollava-finetune"):
        return [sample.sample_id for sample in FeatureStore.open(lab.store).samples(name)]

    lab.extract(encoders=("siglip",))
    whole = ids()
    assert len(whole) == 15
    files = sorted(path.name for path in (lab.store / "samples").iterdir())
    for narrow in ({"kind": "image"}, {"limit": 2}, {"stage": "align"}):
        lab.extract(encoders=("siglip",), **narrow)
        assert ids() == whole
    assert sorted(path.name for path in (lab.store / "samples").iterdir()) == files  # the same content is no new file
    lab.copy_of_root()
    lab.annotate(lab.root, list(lab.VIDEOS)[1:], [])  # today one film has no annotation, and no still is listed
    lab.extract(encoders=("siglip",))
    assert len(ids()) == 15
    assert {sample.clip_id for sample in FeatureStore.open(lab.store).samples("videollava-finetune")} == {
        None,
        *FeatureStore.open(lab.store).clips["clip_id"].to_pylist(),
    }


def test_annotations_stay_out_of_the_store_where_a_licence_forbids_them(lab):
    lab.extract(encoders=("siglip",), limit=2, samples=False)
    assert FeatureStore.open(lab.store).sample_names == []
    assert not (lab.store / "samples").exists()


def test_a_store_that_would_not_fit_the_disk_is_refused_before_the_first_block(lab):
    changes = {"encoders": ("siglip",), "kind": "video", "limit": 1}
    extraction, (block,), _ = lab.plan(**changes)
    far_more = replace(block, wanted={"siglip": range(10**12)})  # 4,608 bytes each
    with pytest.raises(RunStoppedError, match=r"the run needs about 4608000.0 GB and .* GB free; choose another disk"):
        extraction.check_space([far_more])
    extraction.check_space([block])


def test_stored_tokens_are_whole_shards_that_plain_zarr_reads(extracted):
    store = FeatureStore.open(extracted.store)
    ids = store.clips["clip_id"].to_pylist()[:9]
    array = zarr.open_array(extracted.store / "video" / store.encoders["vivit"].group_name / "tokens", mode="r")
    assert array.shape == (12, 8, 3, 3, 32)
    assert np.array_equal(array[:9], store.read(ids, encoder="vivit"))
    assert np.isnan(array[9:]).all()

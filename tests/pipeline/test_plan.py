"""Which rows of which blocks are left to compute: resume, new encoders and retries by one rule."""

from __future__ import annotations

import numpy as np
import pytest

from featurestore.clips import Clip
from featurestore.writer import StoreWriter
from pipeline.plan import StoreView, plan_blocks

ROWS = 4


@pytest.fixture
def both(toy_identity):
    """Two encoders that differ in nothing but their names."""
    return {name: toy_identity(name, num_frames=2, grid=(2, 1, 1), pooling="none", width=3) for name in ("a", "b")}


def video(number: int) -> Clip:
    return Clip(dataset="d", path=f"{number}.mp4", kind="video")


@pytest.fixture
def store(tmp_path) -> StoreWriter:
    return StoreWriter.open_or_create(tmp_path / "s.zarr", block_rows={"video": ROWS, "image": ROWS})


def groups(store, both, kind="video", batch=2):
    return {n: store.ensure_group(kind, i, batch_shape=batch, weights_label="random:0") for n, i in both.items()}


def commit(group, rows, failed=(), skipped=()):
    """A block in which every row of `rows` has an outcome."""
    block = group.begin(rows[0] // ROWS, rows)
    for row in rows:
        if row in failed:
            block.fail(row, "broken")
        elif row in skipped:
            block.skip(row)
        else:
            block.add(row, {"tokens": np.ones((2, 1, 1, 3), np.float32)}, media_sha256=None, decoder="none")
    block.commit()


def plan(store, identities, clips):
    found = plan_blocks(StoreView(store), identities, clip_ids={clip.clip_id for clip in clips})
    return [(b.kind, b.block, {name: sorted(rows) for name, rows in b.wanted.items()}) for b in found]


def test_a_fresh_store_wants_every_block_of_every_encoder_in_the_order_of_rows(store, both):
    clips = [video(n) for n in range(6)]
    store.add_clips(clips)
    groups(store, both)
    assert plan(store, both, clips) == [
        ("video", 0, {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}),
        ("video", 1, {"a": [4, 5], "b": [4, 5]}),
    ]


def test_what_is_committed_is_not_wanted_again_each_encoder_by_itself(store, both):
    clips = [video(n) for n in range(6)]
    store.add_clips(clips)
    made = groups(store, both)
    commit(made["a"], [0, 1, 2, 3], failed=[2])
    assert plan(store, both, clips) == [("video", 0, {"b": [0, 1, 2, 3]}), ("video", 1, {"a": [4, 5], "b": [4, 5]})]
    commit(made["b"], [0, 1, 2, 3])
    commit(made["a"], [4, 5])
    commit(made["b"], [4, 5])
    assert plan(store, both, clips) == []


def test_a_retried_clip_is_wanted_in_its_newest_row_by_the_encoders_that_lack_it(store, both):
    clips = [video(n) for n in range(3)]
    store.add_clips(clips)
    made = groups(store, both)
    commit(made["a"], [0, 1, 2], failed=[1])
    commit(made["b"], [0, 1, 2])
    assert store.add_clips([clips[1]], retry=True) == [(4, clips[1])]
    assert plan(store, both, clips) == [("video", 1, {"a": [4]})]
    commit(made["a"], [4])
    assert plan(store, both, clips) == []


def test_a_new_encoder_computes_a_retried_clip_once_in_its_newest_row(store, both):
    clips = [video(n) for n in range(3)]
    store.add_clips(clips)
    made = groups(store, both)
    commit(made["a"], [0, 1, 2], failed=[1])
    store.add_clips([clips[1]], retry=True)
    commit(made["a"], [4])
    assert plan(store, {"b": both["b"]}, clips) == [("video", 0, {"b": [0, 2]}), ("video", 1, {"b": [4]})]


def test_blocks_without_a_listed_clip_are_left_alone(store, both):
    first, second = [video(n) for n in range(3)], [video(n) for n in range(3, 5)]
    store.add_clips(first)
    store.add_clips(second)
    groups(store, both)
    assert [block for _, block, _ in plan(store, both, second)] == [1]
    assert plan(store, both, []) == []


def test_a_kind_that_is_not_asked_for_needs_no_group(store, both):
    still = Clip(dataset="d", path="0.png", kind="image")
    store.add_clips([video(0), still])
    groups(store, both, "video")
    assert plan(store, both, [video(0)]) == [("video", 0, {"a": [0], "b": [0]})]


def test_encoders_of_different_batch_shapes_get_a_block_each(store, both):
    clips = [video(n) for n in range(2)]
    store.add_clips(clips)
    store.ensure_group("video", both["a"], batch_shape=2, weights_label="random:0")
    store.ensure_group("video", both["b"], batch_shape=8, weights_label="random:0")
    found = plan_blocks(StoreView(store), both, clip_ids={clip.clip_id for clip in clips})
    assert [(b.block, b.batch, sorted(b.wanted)) for b in found] == [(0, 2, ["a"]), (0, 8, ["b"])]


def test_a_block_counts_a_clip_once_however_many_encoders_want_it(store, both):
    clips = [video(n) for n in range(3)]
    store.add_clips(clips)
    made = groups(store, both)
    commit(made["a"], [0, 1, 2])
    (block,) = plan_blocks(StoreView(store), both, clip_ids={clips[0].clip_id})
    assert (block.num_clips, block.clip_ids) == (3, {clip.clip_id for clip in clips})
    assert [row for row, _ in block.rows] == [0, 1, 2]

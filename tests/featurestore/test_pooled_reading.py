"""Pooled reading and wider dtypes, against plain NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from featurestore import Clip, FeatureStore, pooling
from mervcache.errors import ClipUnavailableError, UserError

REDUCED = {"mean": np.mean, "max": np.max}
VIDEOS = [Clip(dataset="toy", path=f"{number}.mp4", kind="video") for number in range(5)]
STILL = Clip(dataset="toy", path="still.png", kind="image")
IDS = [clip.clip_id for clip in (VIDEOS[3], STILL, VIDEOS[0], VIDEOS[3])]  # not in the store's order, one twice


@pytest.fixture
def tokens():
    """float16 tokens by clip id: of a video [4, 2, 2, 8], of a still [1, 2, 2, 8]."""
    rng = np.random.default_rng(0)
    made = {clip.clip_id: rng.standard_normal((4, 2, 2, 8)).astype(np.float16) for clip in VIDEOS}
    return made | {STILL.clip_id: rng.standard_normal((1, 2, 2, 8)).astype(np.float16)}


@pytest.fixture
def store(tmp_path, toy_identity, write_store, tokens):
    arrays = {("toy", clip_id): {"tokens": values} for clip_id, values in tokens.items()}
    writer = write_store(
        tmp_path / "toy.zarr",
        [*VIDEOS, STILL],
        {"toy": toy_identity()},
        arrays,
        failed={("toy", VIDEOS[4].clip_id)},
    )
    writer.publish_snapshot()
    return FeatureStore.open(tmp_path / "toy.zarr")


@pytest.mark.parametrize("pool", list(REDUCED))
@pytest.mark.parametrize("frames", [None, slice(1, 3), [0, 3]])
def test_pooled_reading_reduces_time_height_and_width(store, tokens, pool, frames):
    vectors_BD = store.read(IDS, encoder="toy", pool=pool, frames=frames)
    assert vectors_BD.dtype == np.float32
    for clip_id, vector_D in zip(IDS, vectors_BD, strict=True):
        whole = np.broadcast_to(tokens[clip_id], (4, 2, 2, 8)).astype(np.float64)
        picked = whole if frames is None else whole[frames]
        np.testing.assert_allclose(vector_D, REDUCED[pool](picked, axis=(0, 1, 2)), rtol=1e-5, atol=1e-6)


def test_clips_that_are_pooled_in_parts_have_the_vectors_of_one_part(store, monkeypatch):
    at_once = store.read(IDS, encoder="toy", pool="mean")
    monkeypatch.setattr(pooling, "BYTES_AT_ONCE", 3 * 4 * 4 * 2 * 2 * 8)
    assert pooling.clips_at_once(store.encoders["toy"]) == 3
    np.testing.assert_array_equal(store.read(IDS, encoder="toy", pool="mean"), at_once)


def test_the_mean_of_values_that_overflow_float16_is_finite(tmp_path, toy_identity, write_store):
    large = np.full((4, 2, 2, 8), 60_000, np.float16)
    arrays = {("toy", VIDEOS[0].clip_id): {"tokens": large}}
    write_store(tmp_path / "s.zarr", VIDEOS[:1], {"toy": toy_identity()}, arrays).publish_snapshot()
    store, ids = FeatureStore.open(tmp_path / "s.zarr"), [VIDEOS[0].clip_id]
    assert (store.read(ids, encoder="toy", pool="mean") == np.float32(np.float16(60_000))).all()
    with np.errstate(over="ignore"):  # what the docstring of `read` warns of
        assert not np.isfinite(store.read(ids, encoder="toy").sum())
        assert not np.isfinite(store.read(ids, encoder="toy").std())
    assert store.read(ids, encoder="toy", dtype="float32").sum() == large.astype(np.float64).sum()


@pytest.mark.parametrize("dtype", ["float32", "float64", np.float64])
def test_a_wider_dtype_holds_the_same_values(store, tokens, dtype):
    read = store.read([VIDEOS[1].clip_id], encoder="toy", dtype=dtype)
    assert read.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(read[0], tokens[VIDEOS[1].clip_id].astype(np.float64))


def test_a_mean_is_summed_in_the_dtype_that_is_asked_for(store, tokens):
    vectors_BD = store.read([VIDEOS[2].clip_id], encoder="toy", pool="mean", dtype="float64")
    expected = tokens[VIDEOS[2].clip_id].astype(np.float64).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(vectors_BD[0], expected, rtol=1e-14)


def test_no_clips_give_no_vectors(store):
    assert store.read([], encoder="toy", pool="max").shape == (0, 8)


def test_what_cannot_be_read_so_is_an_error_with_the_values(store):
    ids = [VIDEOS[0].clip_id]
    with pytest.raises(UserError, match=r"'median'.*mean, max"):
        store.read(ids, encoder="toy", pool="median")
    for dtype in ("float16", "int32", "halfway"):
        with pytest.raises(UserError, match=f"float32 or float64.*{dtype}"):
            store.read(ids, encoder="toy", dtype=dtype)
    with pytest.raises(UserError, match="out"):
        store.read(ids, encoder="toy", pool="mean", out=np.empty((1, 8), np.float32))
    with pytest.raises(UserError, match="time step"):
        store.read(ids, encoder="toy", pool="max", frames=slice(0, 0))
    with pytest.raises(ClipUnavailableError, match=r"4\.mp4"):
        store.read([VIDEOS[4].clip_id], encoder="toy", pool="mean")

"""Stores of raw grids and class tokens: every projector trains from one, and reads no more of it than it needs."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from featurestore import Clip, FeatureStore
from mervcache.errors import UserError
from trainer.config import PROJECTORS
from trainer.data.collate import make_batch
from trainer.data.tokens import PrefixedTokens, StoreTokens
from trainer.loop.train import train
from trainer.model.llm import FRESH_LLMS, FreshLLM
from trainer.runs.load import load_run
from trainer.runs.run_record import read_metrics
from trainer.sources import open_store

WIDTHS = {"dinov2": 16, "siglip": 8, "vivit": 8}
PREFIX = {"dinov2": 3, "siglip": 0, "vivit": 1}
NUM_VISUAL = {
    "2d-average": 162,
    "2d-average-upsampled": 162,
    "2d-attention": 128,
    "2d-convolution": 128,
    "3d-average": 81,
    "3d-convolution": 128,
    "class-token": 2,
    "all-tokens": 164,
}


@pytest.fixture(autouse=True)
def roomy_llm(monkeypatch):
    """`fresh:mini` with a context that takes whole grids."""
    monkeypatch.setitem(FRESH_LLMS, "mini", FreshLLM(hidden_size=16, num_layers=1, num_heads=2, context=512))


@pytest.fixture
def identities(toy_identity):
    """Raw grids, with the class tokens that such encoders have."""
    raw = {"num_frames": 2, "frame_rule": "linspace-32/16", "grid": (2, 9, 9), "pooling": "none"}
    return {name: toy_identity(name, **raw, width=WIDTHS[name], prefix_tokens=PREFIX[name]) for name in WIDTHS}


@pytest.fixture
def clips():
    """Those that the first samples of `make_sample` name, and a still."""
    videos = [Clip(dataset="set", path=f"clip{index}.mp4", kind="video") for index in range(4)]
    return [*videos, Clip(dataset="set", path="still.jpg", kind="image")]


@pytest.fixture
def arrays(clips, identities):
    """(encoder, clip id) -> what is stored of it."""
    random = np.random.default_rng(5)
    found = {}
    for clip in clips:
        for encoder, width in WIDTHS.items():
            time = identities[encoder].grid_of(clip.kind)[0]
            shapes = {"tokens": (time, 9, 9, width), "prefix": (time, PREFIX[encoder], width)}
            found[encoder, clip.clip_id] = {
                name: random.standard_normal(shape).astype(np.float16)
                for name, shape in shapes.items()
                if 0 not in shape
            }
    return found


@pytest.fixture
def raw_store(tmp_path, clips, identities, arrays, make_sample, write_store):
    path = tmp_path / "raw.zarr"
    writer = write_store(path, clips, identities, arrays)
    writer.add_samples("toy", [make_sample(index) for index in range(4)])
    writer.publish_snapshot()
    return path


def settings_of(config, row, encoders=("dinov2", "vivit")):
    projector = replace(PROJECTORS[row], standardise=True)
    return replace(config, projector=projector, encoders=encoders, max_steps=2, batch_size=4, micro_batch_size=2)


@pytest.mark.parametrize("row", PROJECTORS)
def test_a_run_with_any_projector_trains_and_is_used_again(row, tmp_path, config, raw_store):
    samples, source = open_store(str(raw_store), settings_of(config, row))
    train(settings_of(config, row), samples, source, tmp_path / "run", quiet=True)
    losses = [metrics["loss"] for metrics in read_metrics(tmp_path / "run")]
    loaded = load_run(tmp_path / "run")
    assert loaded.record.num_visual_tokens == loaded.built.model.num_visual_tokens == NUM_VISUAL[row]
    clip_ids = [sample.clip_id for sample in samples]
    rendered = [loaded.built.renderer(sample.turns) for sample in samples]
    batch = make_batch(rendered, clip_ids, source, NUM_VISUAL[row], loaded.built.model.context)
    after = loaded.built.model(batch).item() / batch.num_supervised
    assert len(losses) == 2
    assert after < losses[0]  # the same four samples, after two steps


def test_an_encoder_without_class_token_is_named(tmp_path, config, raw_store):
    settings = settings_of(config, "class-token", encoders=("dinov2", "siglip"))
    samples, source = open_store(str(raw_store), settings)
    with pytest.raises(UserError, match="siglip: no class token is stored of it"):
        train(settings, samples, source, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("encoder", ["dinov2", "vivit"])
def test_what_is_fetched_is_what_was_stored_bit_for_bit(encoder, raw_store, clips, arrays):
    source = StoreTokens(FeatureStore.open(raw_store), [encoder], parts=("tokens", "prefix"))
    shape = source.shapes[encoder]
    assert (shape.grid, shape.is_pooled, shape.num_prefix) == ((2, 9, 9), False, PREFIX[encoder])
    ids = [clips[index].clip_id for index in (3, 4, 0)]  # the second is a still, whose one step repeats
    found = source.fetch(ids)[encoder]
    for part, values in (("tokens", found.tokens_BTHWD), ("prefix", found.prefix_BTKD)):
        for value, clip_id in zip(values, ids, strict=True):
            stored = torch.from_numpy(arrays[encoder, clip_id][part])
            assert torch.equal(value, stored.expand(2, *stored.shape[1:]))


def test_only_the_parts_that_are_asked_for_are_read(raw_store, clips):
    store = FeatureStore.open(raw_store)
    ids = [clip.clip_id for clip in clips]
    for folder in raw_store.glob("*/dinov2-*/tokens"):
        shutil.rmtree(folder)
    found = StoreTokens(store, ["dinov2"], parts=("prefix",)).fetch(ids)["dinov2"]
    assert isinstance(found, PrefixedTokens)
    assert found.tokens_BTHWD is None
    for folder in raw_store.glob("*/vivit-*/prefix"):
        shutil.rmtree(folder)
    assert StoreTokens(store, ["vivit"]).fetch(ids)["vivit"].shape == (5, 2, 9, 9, 8)

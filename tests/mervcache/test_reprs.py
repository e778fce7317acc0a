"""Values in a notebook: one line, of what a reader looks for, without credentials."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from featurestore import Clip, FeatureDataset, FeatureStore, Sample
from featurestore.clips import Turn
from mervcache.reprs import brief, changed_fields, was_and_is
from pipeline.config import ExtractConfig
from pipeline.datasets.base import DatasetListing
from pipeline.summary import ExtractSummary
from pipeline.vectors import pool_clips
from trainer.config import FusionConfig, LoraConfig, OptimizerConfig, ProjectorConfig, TrainConfig
from trainer.loop.train import TrainResult
from trainer.recipes import RECIPES
from trainer.runs.run_record import RunRecord


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1
    name: str = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    place: str
    inner: Inner = Inner()
    numbers: list[int] = field(default_factory=list)

    __repr__ = changed_fields


def test_of_a_long_list_the_number_is_shown_and_how_two_of_them_differ():
    long = [*range(21)]
    assert repr(Outer(place="here", numbers=long)) == "Outer(place='here', numbers=21 values)"
    assert was_and_is("numbers", long, [*long[1:], 30, 31]) == "numbers was 21 values, is 22 values: 2 new, 1 gone"
    assert was_and_is("numbers", None, long) == "numbers was None, is 21 values: 21 new, 0 gone"
    assert was_and_is("numbers", [1], [2]) == "numbers was [1], is [2]"


def test_fields_that_are_their_defaults_are_left_out_nested_ones_too():
    assert repr(Outer(place="here")) == "Outer(place='here')"
    changed = Outer(place="here", inner=Inner(size=2), numbers=[1])
    assert repr(changed) == "Outer(place='here', inner=Inner(size=2), numbers=[1])"


def test_it_is_one_line_without_credentials():
    shown = repr(Outer(place="s3://key:secret@host/a\nb\x1b[2J"))
    assert "secret" not in shown
    assert shown.isprintable()
    assert brief(Inner(), "a\n b") == "<Inner a b>"


@pytest.mark.parametrize("name", list(RECIPES))
def test_settings_are_python_that_makes_them_again(name):
    kinds = (TrainConfig, FusionConfig, LoraConfig, OptimizerConfig, ProjectorConfig)
    for stage in RECIPES[name]:
        assert eval(repr(stage.config), {kind.__name__: kind for kind in kinds}) == stage.config


def test_settings_of_an_extraction_are_python_that_makes_them_again():
    config = ExtractConfig(dataset="demo", weights="random:0", grid="4,2,2", encoders="siglip", limit=3)
    assert eval(repr(config), {"ExtractConfig": ExtractConfig}) == config
    assert len(repr(config)) < 120


@pytest.fixture
def values(tmp_path, toy_identity, write_store):
    """(value, what its line must hold) of everything that the Python API gives and whose fields fill a page."""
    clips = [Clip(dataset="toy", path=f"{number}.mp4", kind="video") for number in range(20)]
    identity = toy_identity()
    arrays = {("toy", clip.clip_id): {"tokens": np.ones((*identity.grid, identity.width))} for clip in clips}
    write_store(tmp_path / "toy.zarr", clips, {"toy": identity}, arrays).publish_snapshot()
    store = FeatureStore.open(tmp_path / "toy.zarr")
    turns = (Turn(role="human", text="What\nis it? " * 40), Turn(role="gpt", text="A cat. " * 40))
    sample = Sample(sample_id="7", clip_id=clips[0].clip_id, turns=turns, stage="eval", split="heldout", source="toy")
    record = RunRecord(
        store="features/toy.zarr",
        data_digest="d" * 64,
        num_samples=12,
        dropped={},
        shapes={},
        parameters={},
        num_visual_tokens=64,
        num_steps=200,
        encoder_order=("one", "two"),
        software=dict.fromkeys(map(str, range(50)), "1.0"),
    )
    result = TrainResult(
        run="runs/a", steps=7, num_steps=9, loss=None, data_digest="d" * 64, checkpoint="runs/a/7", num_questions=0
    )
    summary = ExtractSummary(store="features/toy.zarr", run="r1", dataset="toy", listed=20, clips=18, failed=2)
    return [
        (identity, ["toy", identity.id, "4x2x2x8", "float16"]),
        (sample, ["7", clips[0].clip_id, "heldout"]),
        (FeatureDataset(store, [clip.clip_id for clip in clips], ["toy"]), ["20", "toy.zarr"]),
        (DatasetListing(name="toy", root="/media", clips=tuple(clips), samples={"a": (sample,) * 30}), ["20", "30"]),
        (pool_clips(store, "toy"), ["20", "8"]),
        (record, ["200", "12", "features/toy.zarr", "one", "two", "64"]),
        (result, ["runs/a", "7", "9", "finite"]),
        (replace(summary, reasons={"cut off": 2}), ["features/toy.zarr", "18", "2", "20"]),
    ]


def test_each_is_one_short_line_with_what_tells_it_from_another(values):
    for value, words in values:
        shown = repr(value)
        assert shown.isprintable(), shown
        assert len(shown) <= 300, shown
        assert type(value).__name__ in shown
        assert [word for word in words if word not in shown] == [], shown

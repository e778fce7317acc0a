"""Identity: everything that decides bytes changes it, nothing else does."""

from dataclasses import replace

import pytest

from featurestore.identity import FeatureIdentity
from mervcache.errors import UserError
from pipeline.encoders import ENCODERS
from pipeline.encoders.base import feature_identity


def identity(spec, **changes):
    given = {"weights_sha256": "a" * 64, "compute_dtype": "bfloat16", "decode": "frames/1"} | changes
    return feature_identity(spec, **given)


def test_the_whole_identity_of_languagebind_is_what_decides_its_bytes():
    assert identity(ENCODERS["languagebind"]) == FeatureIdentity(
        encoder="languagebind",
        architecture={
            "model": "languagebind-video",
            "image_size": 224,
            "patch_size": 14,
            "num_frames": 16,
            "frames_per_chunk": 8,
            "tubelet_frames": 1,
            "hidden_size": 1024,
            "num_layers": 24,
            "num_heads": 16,
            "mlp_size": 4096,
            "activation": "gelu",
            "norm_eps": 1e-5,
        },
        weights_sha256="a" * 64,
        layer="output of block 23 of 24, no final norm",
        num_frames=16,
        frame_rule="linspace-32/2",
        decode="frames/1",
        preprocessing={
            "size": 224,
            "filter": "bilinear",
            "antialias": False,
            "fit": "centre-crop",
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
        },
        still_period=8,
        grid=(16, 8, 8),
        pooling="adaptive-avg",
        width=1024,
        prefix_tokens=0,
        compute_dtype="bfloat16",
        storage_dtype="float16",
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"weights_sha256": "b" * 64}, "weights_sha256"),
        ({"compute_dtype": "float32"}, "compute_dtype"),
        ({"decode": "decord"}, "decode"),
        ({"grid": (16, 4, 4)}, "grid"),
        ({"prefix_tokens": True}, "prefix_tokens"),
        ({"storage_dtype": "bfloat16"}, "storage_dtype"),
    ],
)
def test_what_is_stored_and_how_changes_the_identity_in_that_field(changes, field):
    before, after = identity(ENCODERS["dinov2"]), identity(ENCODERS["dinov2"], **changes)
    assert set(before.differences(after)) == {field}
    assert before.id != after.id


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        (ENCODERS["siglip"].with_architecture({"activation": "gelu"}), {"architecture"}),
        (ENCODERS["siglip"].with_architecture({"num_heads": 6}), {"architecture"}),
        (ENCODERS["siglip"].with_crop("centre-crop"), {"preprocessing"}),
        (replace(ENCODERS["siglip"], skipped_blocks=0), {"layer"}),
        (replace(ENCODERS["siglip"], final_norm=True), {"layer"}),
        (replace(ENCODERS["siglip"], mean=(0.4, 0.5, 0.5)), {"preprocessing"}),
        (
            ENCODERS["siglip"].with_architecture({"num_frames": 32}),
            {"architecture", "num_frames", "frame_rule"},
        ),
    ],
)
def test_what_the_encoder_is_changes_the_identity(spec, fields):
    before = identity(ENCODERS["siglip"])
    assert set(before.differences(identity(spec))) == fields


@pytest.mark.parametrize("changes", [{"summary": "x"}, {"hub_id": "x/y"}, {"builder": "x:y"}])
def test_where_things_are_and_what_they_are_called_does_not(changes):
    assert identity(replace(ENCODERS["siglip"], **changes)).id == identity(ENCODERS["siglip"]).id


def test_raw_grids_say_so():
    raw = identity(ENCODERS["vivit"], grid=None)
    assert (raw.grid, raw.pooling) == ((16, 14, 14), "none")
    assert identity(ENCODERS["vivit"], grid=(16, 14, 14)).pooling == "adaptive-avg"


def test_fewer_steps_than_asked_for_are_refused_before_any_work():
    with pytest.raises(UserError, match="cannot align 8 time steps to 16"):
        identity(ENCODERS["videomae"])


def test_prefix_tokens_of_an_encoder_without_any_are_refused():
    with pytest.raises(UserError, match="siglip has no class or register tokens to store"):
        identity(ENCODERS["siglip"], prefix_tokens=True)


@pytest.mark.parametrize(("time", "period"), [(16, 8), (8, 4), (4, 2), (6, 6)])
def test_the_still_period_is_that_of_the_stored_steps(time, period):
    assert identity(ENCODERS["languagebind"], grid=(time, 8, 8)).grid_of("image") == (period, 8, 8)

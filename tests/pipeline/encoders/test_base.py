"""Specs: the facts of the published encoders written out, sizes that follow, refusals that teach, cheap imports."""

import doctest
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from mervcache.errors import UserError
from pipeline.encoders import ENCODERS, base
from pipeline.encoders.network import build_network
from pipeline.views import ResizeRule, View


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(base).failed == 0


# grid, width, frames, still period, frames of a still, prefix tokens, layer (princetonvisualai/merv for the first four)
FACTS = {
    "languagebind": ((16, 16, 16), 1024, 16, 8, 8, 1, "output of block 23 of 24, no final norm"),
    "dinov2": ((16, 16, 16), 1024, 16, 1, 1, 5, "output of block 23 of 24, no final norm"),
    "vivit": ((16, 14, 14), 768, 32, 16, 32, 1, "output of block 12 of 12, then the final norm"),
    "siglip": ((16, 14, 14), 768, 16, 1, 1, 0, "output of block 11 of 12, no final norm"),
    "clip": ((16, 16, 16), 1024, 16, 1, 1, 1, "output of block 23 of 24, no final norm"),
    "videomae": ((8, 14, 14), 768, 16, 8, 16, 0, "output of block 12 of 12, no final norm"),
    "siglip2": ((16, 14, 14), 768, 16, 1, 1, 0, "output of block 11 of 12, no final norm"),
    "dinov3": ((16, 14, 14), 1024, 16, 1, 1, 5, "output of block 24 of 24, then the final norm"),
    "vjepa2": ((16, 16, 16), 1024, 32, 16, 32, 0, "output of block 24 of 24, then the final norm"),
    "depthanything": ((16, 16, 16), 1024, 16, 1, 1, 1, "output of block 24 of 24, then the final norm"),
    "pe": ((16, 32, 32), 1024, 16, 1, 1, 1, "output of block 23 of 23, no final norm"),
    "videomae2": ((8, 14, 14), 768, 16, 8, 16, 0, "output of block 12 of 12, no final norm"),
}
SQUASH_BICUBIC = ResizeRule(size=224, filter="bicubic", antialias=True, fit="squash")
SQUASH_BILINEAR = ResizeRule(size=224, filter="bilinear", antialias=True, fit="squash")


@pytest.mark.parametrize("name", FACTS)
def test_the_published_sizes_give_the_facts_of_the_paper(name):
    spec = ENCODERS[name]
    facts = (spec.grid, spec.width, spec.num_frames, spec.still_period, spec.still_frames, spec.prefix_tokens)
    assert (*facts, spec.layer) == FACTS[name]


def test_views_follow_the_reference_and_two_encoders_share_one():
    assert (
        ENCODERS["dinov2"].view
        == ENCODERS["siglip"].view
        == View(rule=SQUASH_BICUBIC, num_frames=16, frame_rule="linspace-32/2")
    )
    assert ENCODERS["vivit"].view == View(rule=SQUASH_BILINEAR, num_frames=32, frame_rule="linspace-32/1")
    centre = ResizeRule(size=224, filter="bilinear", antialias=False, fit="centre-crop")
    assert ENCODERS["languagebind"].view == View(rule=centre, num_frames=16, frame_rule="linspace-32/2")


def test_frame_rules_say_which_of_32_frames_are_taken():
    assert ENCODERS["vivit"].frame_rule == "linspace-32/1"
    assert ENCODERS["dinov2"].frame_rule == "linspace-32/2"


@pytest.mark.parametrize(
    ("name", "used_millions", "published_millions"),
    [
        ("languagebind", 387.38, 404.19),
        ("dinov2", 291.77, 304.37),
        ("vivit", 88.65, 88.65),
        ("siglip", 78.71, 85.80),
        ("clip", 290.58, 303.18),
        ("videomae", 86.23, 86.23),
    ],
)
def test_networks_of_real_size_have_the_published_parameter_counts(name, used_millions, published_millions):
    """Without storage. Published: all blocks of the vision tower, without norms and heads after them."""
    spec = ENCODERS[name]
    variants = [(spec, used_millions)]
    if spec.skipped_blocks:
        variants.append((replace(spec, skipped_blocks=0), published_millions))
    for variant, expected in variants:
        parameters = list(build_network(variant).parameters())
        assert {parameter.device.type for parameter in parameters} == {"meta"}
        assert sum(parameter.numel() for parameter in parameters) / 1e6 == pytest.approx(expected, abs=0.005)


def test_grid_width_view_and_mlp_follow_other_sizes():
    toy = ENCODERS["vivit"].with_architecture({"image_size": 64, "hidden_size": 48, "num_heads": 4, "num_frames": 8})
    assert toy.grid == (4, 4, 4)
    assert toy.still_period == 4
    assert toy.width == 48
    assert toy.architecture["mlp_size"] == 192
    assert toy.view == View(rule=replace(SQUASH_BILINEAR, size=64), num_frames=8, frame_rule="linspace-32/4")
    assert ENCODERS["vivit"].grid == (16, 14, 14)


def test_a_mlp_size_that_is_given_is_kept():
    toy = ENCODERS["siglip"].with_architecture({"hidden_size": 48, "mlp_size": 100})
    assert toy.architecture["mlp_size"] == 100


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "dinov2",
            {"hiden_size": 64},
            "architecture key .* 'hidden_size'",
        ),
        (
            "dinov2",
            {"image_size": 60},
            "multiple of patch_size .*image_size=60, patch_size=14; use image_size=56 or",
        ),
        ("dinov2", {"hidden_size": 100}, "multiple of num_heads .* use hidden_size=96 or 112"),
        ("dinov2", {"hidden_size": 0}, "hidden_size of dinov2 must be a whole number >= 1, got 0"),
        ("dinov2", {"hidden_size": "64"}, "hidden_size of dinov2 must be a whole number >= 1, got '64'"),
        ("dinov2", {"num_layers": 1}, "num_layers of dinov2 must be at least 2, got 1"),
        ("dinov2", {"num_frames": 12}, "must divide the 32 frames .* got 12; use 1, 2"),
        ("dinov2", {"num_frames": 64}, "must divide the 32 frames sampled per clip, got 64"),
        ("dinov2", {"activation": "relu"}, "activation of dinov2 must be one of gelu, .*, got 'relu'"),
        ("dinov2", {"norm_eps": "1e-6"}, "norm_eps of dinov2 must be a number > 0 such as 1e-6, got '1e-6'"),
        ("vivit", {"num_frames": 1}, "num_frames of vivit must be a multiple of tubelet_frames"),
        ("languagebind", {"num_frames": 4}, "multiple of frames_per_chunk .* num_frames=4, frames_per_chunk=8; use"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_what_to_do(name, overrides, message):
    with pytest.raises(UserError, match=message):
        ENCODERS[name].with_architecture(overrides)


def test_the_crop_is_a_choice_and_other_words_are_refused():
    squashed = ENCODERS["languagebind"].with_crop("squash")
    assert squashed.view.rule.fit == "squash"
    with pytest.raises(UserError, match="crop of languagebind must be squash or centre-crop, got 'letterbox'"):
        squashed.with_crop("letterbox")


@pytest.mark.parametrize("name", FACTS)
def test_specs_travel_to_workers_and_hash(name):
    spec = ENCODERS[name]
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(spec) == hash(replace(spec))


def test_importing_the_room_brings_in_no_heavy_library():
    heavy = "{'torch', 'transformers', 'numpy', 'accelerate', 'PIL'}"
    program = (
        f"import sys, pipeline.encoders, pipeline.align, pipeline.encoders.base; print({heavy} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"

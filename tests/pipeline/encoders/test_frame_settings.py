"""Frame rule, frame dtype and EXIF as settings: what they change, and that nothing else changes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mervcache.errors import UserError
from pipeline.align import align
from pipeline.config import EncoderSettings, read_config
from pipeline.decode.decoders import decode_clip
from pipeline.decode.pool import DecodePool
from pipeline.decode.resize import NativeFrame, resize
from pipeline.decode.sampling import DecodeJob
from pipeline.encoders import ENCODERS
from pipeline.encoders.base import feature_identity
from tests.pipeline.encoders.conftest import toy_spec

# Of identities as they were before frame rule, frame dtype and EXIF were settings: stores are full of them.
IDS = {
    "languagebind": "3acb907aceea",
    "dinov2": "3639857f5d70",
    "vivit": "0b5178b45f58",
    "siglip": "0ce042194b57",
    "clip": "2482a030a7d8",
    "videomae": "69d73cc5db1f",
}
WEIGHTS = {"weights_sha256": "a" * 64}


@pytest.mark.parametrize("name", IDS)
def test_identities_of_before_keep_their_ids(name):
    settings = EncoderSettings(name=name, grid=None)
    assert settings.identity("a" * 64).id == IDS[name]
    own = feature_identity(ENCODERS[name], **WEIGHTS, compute_dtype="bfloat16", decode="frames/1", grid=None)
    assert own.id == IDS[name]
    same = replace(settings, frame_rule=own.frame_rule, frame_dtype="uint8", exif="ignore")
    assert same.identity("a" * 64).id == IDS[name]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("dinov2", {"frame_rule": "linspace-16"}, {"frame_rule": "linspace-16"}),
        ("dinov2", {"frame_rule": "+times"}, {"frame_rule": "linspace-32/2+times"}),
        ("vivit", {"frame_rule": "+times"}, {"frame_rule": "linspace-32/1+times"}),
        (
            "languagebind",
            {"frame_rule": "linspace-8", "architecture": {"num_frames": 8}, "grid": (8, 8, 8)},
            {"frame_rule": "linspace-8", "num_frames": 8, "architecture.num_frames": 8, "grid": [8, 8, 8]},
        ),
        (
            "vivit",
            {"frame_rule": "linspace-32/1+steps/2", "grid": (8, 8, 8)},
            {"frame_rule": "linspace-32/1+steps/2", "still_period": 8, "grid": [8, 8, 8]},
        ),
        ("languagebind", {"frame_dtype": "float32"}, {"preprocessing.dtype": "float32"}),
        ("siglip", {"exif": "apply"}, {"preprocessing.exif": "apply"}),
    ],
)
def test_a_setting_changes_the_identity_in_its_own_fields_and_can_be_read_back(name, changes, expected):
    before, settings = EncoderSettings(name=name), EncoderSettings(name=name, **changes)
    identity = settings.identity("a" * 64)
    found = {field: now for field, (_, now) in before.identity("a" * 64).changes(identity).items()}
    assert found == expected
    assert EncoderSettings.of_identity(identity, "hub").identity("a" * 64) == identity


def test_settings_name_encoders_or_all_of_them():
    given = {"frame_rule": {"": "+times", "siglip": "linspace-16"}, "frame_dtype": {"languagebind": "float32"}}
    config = read_config(None, {"dataset": "demo", "exif": "apply", **given})
    specs = {settings.name: settings.spec for settings in config.encoder_settings}
    assert {name: spec.frame_rule for name, spec in specs.items()} == {
        "languagebind": "linspace-32/2+times",
        "dinov2": "linspace-32/2+times",
        "vivit": "linspace-32/1+times",
        "siglip": "linspace-16",
    }
    assert {name: spec.resize.dtype for name, spec in specs.items() if spec.resize.dtype != "uint8"} == {
        "languagebind": "float32"
    }
    assert {spec.resize.exif for spec in specs.values()} == {"apply"}
    assert read_config(None, {"dataset": "demo", "frame_rule": "+times"}).frame_rule == {"": "+times"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"frame_rule": {"vivit": "linspace-16"}}, "gives 16 frames, vivit sees 32"),
        ({"frame_rule": {"dinov2": "every-second"}}, "unknown frame rule 'every-second'"),
        ({"frame_rule": {"vivit": "linspace-32/1+steps/3"}}, "keeps every 3-th of 16 time steps"),
        ({"frame_rule": {"dinov": "linspace-16"}}, "unknown encoder 'dinov'"),
        ({"frame_dtype": {"dinov2": "float32"}}, "resized by Pillow, whose result is uint8"),
        ({"frame_dtype": "float16"}, "uint8 or float32, got 'float16'"),
        ({"exif": "yes"}, "a choice of ignore and apply, got 'yes'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_listed(setting, message):
    with pytest.raises(UserError, match=message):
        read_config(None, {"dataset": "demo", **setting})


@pytest.mark.parametrize("name", ["vivit", "languagebind", "dinov2"])
def test_kept_steps_are_every_second_of_all_steps(name, noise):
    from pipeline.encoders import load_encoder

    spec = toy_spec(name)
    kept = spec.with_frame_rule(f"{spec.frame_rule}+steps/2")
    whole, half = (load_encoder(each, "random:0") for each in (spec, kept))
    for frames in (noise(spec), noise(spec, num_frames=1)):
        (features, prefix), (some, some_prefix) = (each.encode(frames, prefix_tokens=True) for each in (whole, half))
        assert torch.equal(some, features[:, ::2])
        assert torch.equal(some_prefix, prefix[:, ::2])
    assert half.spec.grid[0] == whole.spec.grid[0] // 2
    still, clip = noise(spec, num_frames=1), np.repeat(noise(spec, num_frames=1), spec.num_frames, axis=1)
    period, _ = half.encode_tokens(still, grid=None)
    tokens, _ = half.encode_tokens(clip, grid=None)
    steps = np.arange(kept.grid[0]) % kept.still_period
    torch.testing.assert_close(align(period, None)[:, steps], tokens, rtol=1e-4, atol=1e-4)


def languagebind_reference(frames_THWC: np.ndarray, size: int) -> torch.Tensor:
    """LanguageBind's transform on the whole float tensor: scale, normalise, short side by bilinear, centre crop."""
    video_CTHW = torch.from_numpy(frames_THWC).permute(3, 0, 1, 2) / 255.0
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    video_CTHW = (video_CTHW - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(3, 1, 1, 1)
    height, width = video_CTHW.shape[2:]
    scaled = (math.floor(height / width * size), size) if width < height else (size, math.floor(width / height * size))
    video_CTHW = torch.nn.functional.interpolate(video_CTHW, size=scaled, mode="bilinear", align_corners=False)
    top, left = round((scaled[0] - size) / 2.0), round((scaled[1] - size) / 2.0)
    return video_CTHW[:, :, top : top + size, left : left + size].permute(1, 0, 2, 3)


@pytest.mark.parametrize("shape", [(90, 160), (161, 97), (240, 240)])
def test_float_frames_are_the_pixels_of_the_reference_and_rounded_ones_are_near(shape, toy):
    frames = np.random.default_rng(0).integers(0, 256, (16, *shape, 3), dtype=np.uint8)
    encoder = toy("languagebind")
    expected = languagebind_reference(frames, encoder.spec.resize.size)
    errors = {}
    for dtype in ("uint8", "float32"):
        rule = replace(encoder.spec.resize, dtype=dtype)
        small = torch.from_numpy(np.stack([resize(NativeFrame(frame), rule) for frame in frames]))
        errors[dtype] = (encoder._normalise(small[None])[0] - expected).abs().max().item()
    assert errors["float32"] < 5e-5  # float32 arithmetic; a grey level is 15e-3
    assert 0.2 / 255 / 0.27 < errors["uint8"] < 0.51 / 255 / 0.26  # half a grey level


def test_float_frames_travel_beside_rounded_ones(tmp_path):
    from featurestore.clips import Clip
    from tests.pipeline.conftest import film

    film(tmp_path / "a.mp4", "libx264", 20, 25, 64, 48)
    rounded = ENCODERS["languagebind"].view
    exact = replace(rounded, rule=replace(rounded.rule, dtype="float32"))
    odd = replace(rounded, rule=replace(rounded.rule, size=7))  # 16 x 7 x 7 x 3 bytes: what follows is not aligned
    clip = Clip(dataset="d", path="a.mp4", kind="video")
    job = DecodeJob(root=str(tmp_path), clip=clip, views=(odd, exact, rounded))
    with DecodePool(1) as pool:
        frames = pool.submit(job).result().frames
    here = decode_clip(job).frames
    for view in job.views:
        assert frames[view].dtype == view.rule.dtype
        assert np.array_equal(frames[view], here[view])
    assert np.array_equal(np.rint(frames[exact]), frames[rounded])
    assert not np.array_equal(frames[exact], frames[rounded])

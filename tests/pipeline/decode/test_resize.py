"""Resizing, against Pillow and torch themselves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mervcache.errors import UserError
from pipeline.decode.resize import NativeFrame, crop_corner, resize, scaled_size
from pipeline.views import ResizeRule

LANGUAGEBIND = ResizeRule(size=24, filter="bilinear", antialias=False, fit="centre-crop")
sizes = st.integers(1, 150)


def frame(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def languagebind_in_torch(frame_HWC: np.ndarray, size: int) -> np.ndarray:
    """pytorchvideo's ShortSideScale and torchvision's CenterCropVideo on the float tensor, as the tower's transform."""
    pixels_CHW = torch.from_numpy(frame_HWC.copy()).permute(2, 0, 1).double()
    height, width = pixels_CHW.shape[1:]
    if width < height:
        target = (math.floor((float(height) / width) * size), size)
    else:
        target = (size, math.floor((float(width) / height) * size))
    scaled = torch.nn.functional.interpolate(pixels_CHW[None], size=target, mode="bilinear", align_corners=False)[0]
    top, left = round((target[0] - size) / 2.0), round((target[1] - size) / 2.0)
    return scaled[:, top : top + size, left : left + size].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(90, 160), (160, 90), (10, 7), (224, 224)])
def test_squash_is_pillows_resize_to_the_bit(name, shape) -> None:
    frame_HWC = frame(*shape)
    pillow = Image.fromarray(frame_HWC).resize((56, 56), {"bicubic": 3, "bilinear": 2}[name])
    assert np.array_equal(resize(NativeFrame(frame_HWC), ResizeRule(size=56, filter=name)), np.asarray(pillow))


@settings(max_examples=60, deadline=None)
@given(height=sizes, width=sizes, seed=st.integers(0, 5))
def test_languagebind_crop_is_torchs_interpolate_rounded(height, width, seed) -> None:
    frame_HWC = frame(height, width, seed)
    error = np.abs(resize(NativeFrame(frame_HWC), LANGUAGEBIND) - languagebind_in_torch(frame_HWC, 24))
    assert error.max() <= 0.5 + 1e-3


def test_squash_without_antialias_is_torchs_interpolate_rounded() -> None:
    frame_HWC = frame(70, 111)
    pixels_BCHW = torch.from_numpy(frame_HWC).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(pixels_BCHW, size=(30, 30), mode="bilinear", align_corners=False)
    small = resize(NativeFrame(frame_HWC), ResizeRule(size=30, filter="bilinear", antialias=False))
    assert np.abs(small - expected[0].permute(1, 2, 0).numpy()).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("shape", [(90, 160), (161, 90), (64, 64)])
def test_crop_with_antialias_is_pillows_resize_then_crop(shape) -> None:
    frame_HWC = frame(*shape)
    height, width = scaled_size(*shape, 32)
    top, left = crop_corner(height, width, 32)
    whole = np.asarray(Image.fromarray(frame_HWC).resize((width, height), Image.Resampling.BICUBIC))
    small = resize(NativeFrame(frame_HWC), ResizeRule(size=32, fit="centre-crop"))
    assert np.abs(small.astype(int) - whole[top : top + 32, left : left + 32]).max() <= 1


def test_a_very_long_frame_costs_only_its_crop() -> None:
    frame_HWC = np.broadcast_to(np.arange(200_000, dtype=np.uint8)[None, :, None], (2, 200_000, 3))
    assert resize(NativeFrame(frame_HWC), LANGUAGEBIND).shape == (
        24,
        24,
        3,
    )  # the scaled frame would have 2,400,000 columns
    assert resize(NativeFrame(frame_HWC), ResizeRule(size=24, fit="centre-crop")).shape == (24, 24, 3)


def test_unknown_combination_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="only filter='bilinear' is known"):
        resize(NativeFrame(frame(9, 9)), ResizeRule(size=4, filter="bicubic", antialias=False))
    with pytest.raises(UserError, match="use squash or centre-crop"):
        resize(NativeFrame(frame(9, 9)), ResizeRule(size=4, fit="letterbox"))

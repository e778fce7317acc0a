"""Alignment against torch's own adaptive pooling, windows written out by hand, and stills against tiled clips."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from mervcache.errors import UserError
from pipeline import align as align_module
from pipeline.align import adaptive_windows, align, align_time, aligned_period, pool_axis

sizes = st.integers(1, 9)


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(align_module) == (0, 2)


def test_windows_of_14_to_8_overlap_as_torch_has_them():
    assert adaptive_windows(14, 8) == [(0, 2), (1, 4), (3, 6), (5, 7), (7, 9), (8, 11), (10, 13), (12, 14)]


def test_windows_of_16_to_8_are_pairs():
    assert adaptive_windows(16, 8) == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12), (12, 14), (14, 16)]


def test_a_row_of_14_pools_to_8_values_worked_out_by_hand():
    row = torch.arange(14.0).square()
    expected = [1 / 2, 14 / 3, 50 / 3, 61 / 2, 113 / 2, 245 / 3, 365 / 3, 313 / 2]
    torch.testing.assert_close(pool_axis(row, 0, 8), torch.tensor(expected))


@pytest.mark.parametrize("side", [16, 14])
def test_frames_pool_as_adaptive_avg_pool2d_does_frame_by_frame(side):
    native_BTHWD = features(2, 16, side, side, 5)
    expected_XDHW = adaptive_avg_pool2d(native_BTHWD.flatten(0, 1).permute(0, 3, 1, 2), (8, 8))
    expected_BTHWD = expected_XDHW.permute(0, 2, 3, 1).unflatten(0, (2, 16))
    torch.testing.assert_close(align(native_BTHWD), expected_BTHWD, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=80)
@given(native=st.tuples(sizes, sizes, sizes), height=sizes, width=sizes, data=st.data())
def test_every_grid_equals_adaptive_avg_pool3d(native, height, width, data):
    grid = (data.draw(st.integers(1, native[0])), height, width)
    native_BTHWD = features(2, *native, 3, seed=sum(native))
    expected = adaptive_avg_pool3d(native_BTHWD.permute(0, 4, 1, 2, 3), grid).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(align(native_BTHWD, grid), expected, rtol=0, atol=2e-6)


def test_half_precision_features_are_pooled_in_float32():
    native = features(1, 4, 14, 14, 8).bfloat16()
    aligned = align(native, (4, 8, 8))
    assert aligned.dtype == torch.float32
    assert torch.equal(aligned, align(native.float(), (4, 8, 8)))


def test_a_clip_aligns_to_the_same_bits_alone_and_in_a_batch():
    native = features(5, 4, 14, 14, 8)
    assert torch.equal(align(native, (2, 8, 8))[3:4], align(native[3:4].clone(), (2, 8, 8)))


def test_no_grid_keeps_the_encoders_own_as_float32():
    native = features(1, 2, 3, 4, 5).half()
    assert torch.equal(align(native, None), native.float())


def test_more_time_steps_than_there_are_are_refused_with_the_ways_out():
    with pytest.raises(UserError, match=r"cannot align 8 time steps to 16: .* at most 8 steps, or give the enc"):
        align(features(1, 8, 14, 14, 2))


@pytest.mark.parametrize("grid", [(16, 8), (0, 8, 8)])
def test_a_grid_of_another_form_is_refused(grid):
    with pytest.raises(UserError, match="a grid is three numbers >= 1"):
        align(features(1, 16, 8, 8, 2), grid)


@pytest.mark.parametrize("period", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("time", [16, 8, 6, 5, 4, 2, 1])
def test_one_period_of_a_still_aligns_to_one_period_of_the_repeated_clip(period, time):
    still = features(2, period, 4, 4, 3)
    whole = align(still.repeat(1, 16 // period, 1, 1, 1), (time, 2, 2))
    stored = align(still, (time, 2, 2), native_time=16)
    assert stored.shape[1] == aligned_period(period, 16, time)
    repeats = -(-time // stored.shape[1])
    torch.testing.assert_close(stored.repeat(1, repeats, 1, 1, 1)[:, :time], whole, rtol=0, atol=1e-6)


def test_prefix_tokens_are_pooled_over_time_only():
    prefix_BTKD = features(2, 4, 5, 3)
    expected = (prefix_BTKD[:, 0::2] + prefix_BTKD[:, 1::2]) / 2
    torch.testing.assert_close(align_time(prefix_BTKD, 2), expected)


def test_a_period_that_does_not_divide_the_clip_is_refused():
    with pytest.raises(UserError, match="period of 3 steps must divide the encoder's 16 steps"):
        aligned_period(3, 16, 8)

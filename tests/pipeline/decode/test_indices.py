"""The frame index rule, against numbers written out by hand and the reference's expression."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore.clips import Clip
from mervcache.errors import MediaError, UserError
from pipeline.decode.sampling import every_nth, frame_indices

NTSC = 30000 / 1001
# The example for N = 100 of the public reference: 16 of 32 samples, the last frame is never seen.
SIXTEEN_OF_100 = [0, 6, 12, 19, 25, 31, 38, 44, 51, 57, 63, 70, 76, 83, 89, 95]
GOLDEN = {  # (N, fps, span) -> the indices, or the first three and the last
    (1, 30.0, None): [0] * 32,
    (5, 30.0, None): [0] * 8 + [1] * 8 + [2] * 8 + [3] * 7 + [4],
    (32, 25.0, None): list(range(32)),
    (100, 25.0, None): [
        *(0, 3, 6, 9, 12, 15, 19, 22, 25, 28, 31, 35, 38, 41, 44, 47),
        *(51, 54, 57, 60, 63, 67, 70, 73, 76, 79, 83, 86, 89, 92, 95, 99),
    ],
    (300, NTSC, None): [0, 9, 19, 299],
    (300, 30.0, (2.0, 4.0)): [60, 61, 63, 119],
    (300, 30.0, (2.0, None)): [60, 67, 75, 299],
    (300, 30.0, (None, 1.0)): [0, 0, 1, 29],
    (300, 30.0, (8.0, 20.0)): [240, 241, 243, 299],  # an end beyond the end is the end
}


def clip(span: tuple | None = None, end_frame: int | None = None) -> Clip:
    start_s, end_s = span or (None, None)
    return Clip(dataset="d", path="a.mp4", kind="video", start_s=start_s, end_s=end_s, end_frame=end_frame)


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_indices_are_those_written_out_by_hand(case) -> None:
    num_frames, fps, span = case
    indices = frame_indices(clip(span), num_frames, fps).tolist()
    expected = GOLDEN[case]
    assert (indices if len(expected) == 32 else [*indices[:3], indices[-1]]) == expected


def test_sixteen_frames_are_every_second_of_thirty_two_and_miss_the_last_frame() -> None:
    assert frame_indices(clip(), 100, 25.0)[every_nth(16)].tolist() == SIXTEEN_OF_100


def test_rule_differs_from_linspace_to_the_last_frame_where_floating_point_falls_short() -> None:
    """29 / 25 * 25 - 1 is 27.999999999999996: the last index of a video of 29 frames at 25 fps is 27."""
    assert frame_indices(clip(), 29, 25.0)[-1] == 27
    differing = [
        (n, fps)
        for n in range(1, 400)
        for fps in (24000 / 1001, NTSC, 12.5, 14.985)
        if frame_indices(clip(), n, fps)[-1] != n - 1
    ]
    assert differing
    assert all(frame_indices(clip(), n, fps)[-1] == n - 2 for n, fps in differing)


def test_end_frame_overrides_the_span_and_the_frame_rate() -> None:
    assert frame_indices(clip(end_frame=31), 100, 0.0).tolist() == list(range(32))
    assert frame_indices(clip(end_frame=500), 100, 25.0)[-1] == 99
    assert frame_indices(clip((1.0, 2.0), end_frame=31), 100, 25.0).tolist() == list(range(32))


@pytest.mark.parametrize(
    ("span", "num_frames", "fps", "message"),
    [
        ((10.0, 12.0), 300, 30.0, "begins beyond the end"),
        ((None, 0.01), 300, 30.0, "shorter than one frame"),
        ((1.0, 2.0), 300, 0.0, "no frame rate"),
        (None, 0, 30.0, "no frames"),
    ],
)
def test_span_that_holds_no_frame_is_an_error_of_the_clip(span, num_frames, fps, message) -> None:
    with pytest.raises(MediaError, match=message):
        frame_indices(clip(span), num_frames, fps)


def test_frames_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="must divide the 32 sampled frames, got 12"):
        every_nth(12)


@given(
    num_frames=st.integers(1, 100_000),
    fps=st.floats(0.1, 240),
    start=st.floats(0, 500),
    length=st.floats(0.01, 500),
)
def test_indices_are_in_range_and_equal_the_reference_or_the_clip_fails(num_frames, fps, start, length) -> None:
    end = start + length
    try:
        indices = frame_indices(clip((start, end)), num_frames, fps)
    except MediaError:
        assert start * fps > num_frames - 1 or end * fps < 1
        return
    assert 0 <= indices.min() <= indices.max() <= num_frames - 1
    reference = np.linspace(start * fps, min(num_frames - 1, end * fps - 1), 32, dtype=int)
    assert indices.tolist() == reference.tolist()

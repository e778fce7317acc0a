"""The frame index rule, against numbers written out by hand and the reference's expression."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore.clips import Clip
from mervcache.errors import MediaError, UserError
from pipeline.decode.sampling import frame_indices
from pipeline.views import FrameRule, every_nth

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
    assert frame_indices(clip(), 100, 25.0, every_nth(16)).tolist() == SIXTEEN_OF_100


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
        assert start * fps >= num_frames or end * fps < 1
        return
    assert 0 <= indices.min() <= indices.max() <= num_frames - 1
    if start * fps > num_frames - 1:  # while the last frame is on screen: the reference asks for one that is not there
        assert set(indices.tolist()) == {num_frames - 1}
        return
    if -1e-6 < end * fps - 1 < 0:
        assert set(indices.tolist()) == {0}
        return
    reference = np.linspace(start * fps, min(num_frames - 1, end * fps - 1), 32, dtype=int)
    assert indices.tolist() == reference.tolist()


@pytest.mark.parametrize("fps", [1.0, 12.5, 23.98, 25.0, NTSC, 49.0, 98.0, 103.0, 107.0, 161.0])
def test_a_video_of_one_frame_is_that_frame_at_every_rate(fps) -> None:
    """1 / 49 * 49 is 0.9999999999999999: the reference's last index rounds down to -1."""
    assert frame_indices(clip(), 1, fps).tolist() == [0] * 32
    assert frame_indices(clip((0.0, 1 / fps)), 1, fps).tolist() == [0] * 32


def test_at_every_rate_up_to_240_a_video_of_one_frame_can_be_read() -> None:
    for rate in range(1, 24_000):
        assert frame_indices(clip(), 1, rate / 100).max() == 0


@pytest.mark.parametrize("num_frames", [1, 2, 300])
@pytest.mark.parametrize("length", [0.001, 0.5, None])
def test_a_span_that_begins_while_the_last_frame_is_on_screen_is_that_frame(num_frames, length) -> None:
    start = (num_frames - 0.5) / 25
    span = (start, None if length is None else start + length)
    assert frame_indices(clip(span), num_frames, 25.0).tolist() == [num_frames - 1] * 32
    with pytest.raises(MediaError, match="begins beyond the end"):
        frame_indices(clip((num_frames / 25 + 0.001, None)), num_frames, 25.0)


@pytest.mark.parametrize("num_frames", [100, 5, 300])
def test_a_model_of_one_encoder_samples_as_many_frames_as_it_sees(num_frames) -> None:
    """The released single-encoder models: the reference's expression with 16, 8 or 32 in the place of 32."""
    for rule, samples in (("linspace-16", 16), ("linspace-8", 8), ("linspace-32/1", 32)):
        expected = np.linspace(0, num_frames / 25 * 25 - 1, samples, dtype=int).tolist()
        assert frame_indices(clip(), num_frames, 25.0, FrameRule.parse(rule)).tolist() == expected


def test_sixteen_of_one_hundred_by_hand() -> None:
    """99 / 15 = 6.6 apart, rounded down; the last frame is seen, as it is not by every second of 32."""
    expected = [0, 6, 13, 19, 26, 33, 39, 46, 52, 59, 66, 72, 79, 85, 92, 99]
    assert frame_indices(clip(), 100, 25.0, FrameRule.parse("linspace-16")).tolist() == expected
    assert frame_indices(clip((1.0, 3.0)), 100, 25.0, FrameRule.parse("linspace-8")).tolist() == [
        *(25, 32, 39, 46, 53, 60, 67, 74)
    ]


@pytest.mark.parametrize(
    "text",
    ["linspace-32/2", "linspace-16", "linspace-8", "linspace-16/2", "linspace-32/1+steps/2", "linspace-16+times"],
)
def test_a_frame_rule_is_its_text(text) -> None:
    assert str(FrameRule.parse(text)) == text


def test_two_texts_of_one_rule_are_one_text() -> None:
    assert str(FrameRule.parse("linspace-32")) == "linspace-32/1"
    assert str(FrameRule.parse("linspace-16/1")) == "linspace-16"


@pytest.mark.parametrize("text", ["", "none", "linspace", "linspace-0", "linspace-16/3", "linspace-16+time", "16"])
def test_what_is_no_frame_rule_is_refused(text) -> None:
    with pytest.raises(UserError, match="frame rule"):
        FrameRule.parse(text)


UNEVEN = np.array([*np.arange(10) / 25, *np.arange(12, 50, 3) / 25])  # 25 frames per second, then every third
TIMES = FrameRule.parse("linspace-32/1+times")


@pytest.mark.parametrize("span", [(0.0, 0.4), (0.4, 1.0), (1.0, 2.0), (0.1, 0.2), (None, 0.7), (1.1, None)])
def test_a_span_of_variable_rate_video_is_what_is_shown_in_it(span) -> None:
    indices = frame_indices(clip(span), len(UNEVEN), len(UNEVEN) / 2, TIMES, UNEVEN)
    start, end = span[0] or 0.0, span[1] or 2.0
    inside = [i for i, time in enumerate(UNEVEN) if start <= time < end]
    assert indices.tolist() == np.linspace(inside[0], inside[-1], 32, dtype=int).tolist()


def test_a_span_between_two_frames_is_the_one_on_screen() -> None:
    assert set(frame_indices(clip((0.49, 0.55)), len(UNEVEN), 11.5, TIMES, UNEVEN)) == {10}  # shown from 0.48 to 0.60 s
    assert set(frame_indices(clip((1.95, 1.99)), len(UNEVEN), 11.5, TIMES, UNEVEN)) == {22}
    with pytest.raises(MediaError, match="begins beyond the end"):
        frame_indices(clip((2.2, 2.4)), len(UNEVEN), 11.5, TIMES, UNEVEN)


def test_by_average_rate_such_a_span_is_refused_and_the_whole_file_is_not() -> None:
    for rule in (FrameRule(), FrameRule.parse("linspace-16")):
        with pytest.raises(MediaError, match="do not come at its average rate"):
            frame_indices(clip((0.4, 1.0)), len(UNEVEN), 11.5, rule, UNEVEN)
        whole = frame_indices(clip(), len(UNEVEN), 11.5, rule, None)
        assert frame_indices(clip((None, 2.5)), len(UNEVEN), 11.5, rule, UNEVEN).tolist() == whole.tolist()


@given(
    num_frames=st.integers(1, 2000),
    fps=st.sampled_from([12.5, 15.0, 23.976, 24.0, 25.0, NTSC, 30.0, 50.0, 59.94, 120.0]),
    start=st.floats(0, 30),
    length=st.floats(0.05, 30),
    ticks=st.sampled_from([1000, 15360, 90000]),
)
def test_a_constant_rate_has_the_same_frames_by_either_rule(num_frames, fps, start, length, ticks) -> None:
    """Times are those that a container holds: rounded to its ticks."""
    times = np.round(np.arange(num_frames) / fps * ticks) / ticks
    span = clip((start, start + length))

    def indices(rule, times):
        try:
            return frame_indices(span, num_frames, fps, rule, times).tolist()
        except MediaError as error:
            return str(error)

    assert indices(TIMES, times) == indices(FrameRule(), times) == indices(FrameRule(), None)

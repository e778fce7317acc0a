"""Spans in seconds of constant- and variable-rate files, through every decoder."""

from __future__ import annotations

import numpy as np
import pytest

from mervcache.errors import MediaError
from pipeline.decode.decoders import decode_clip
from pipeline.views import ResizeRule, View

RULE = ResizeRule(size=48, filter="bilinear")
BY_TIMES = View(rule=RULE, num_frames=32, frame_rule="linspace-32/1+times")
BY_RATE = View(rule=RULE, num_frames=32, frame_rule="linspace-32/1")
SHORT_GOP = {"g": "12", "x264-params": "b-adapt=0:bframes=3"}
SLOWING = np.cumsum([0, *[20] * 20, *[120] * 19]).tolist()  # ms: 50 frames per second, then 8


def seen(studio, path, view, decoder="frames/1", **span) -> list[int]:
    job = studio.job(path, views=(view,), decoder=decoder, **span)
    return studio.stamps(decode_clip(job).frames[view])


def inside(times: list[int], start_s: float, end_s: float) -> list[int]:
    """The frames whose time is in the span, sampled evenly."""
    frames = [i for i, time in enumerate(times) if start_s <= time / 1000 < end_s]
    return np.array(frames)[np.linspace(0, len(frames) - 1, 32, dtype=int)].tolist()


@pytest.mark.parametrize("name", ["slowing.mp4", "slowing.mkv"])
@pytest.mark.parametrize("decoder", ["frames/1", "decord", "ffmpeg"])
@pytest.mark.parametrize("span", [(0.0, 0.3), (0.3, 0.9), (1.0, 2.5)])
def test_frames_of_a_variable_rate_span_are_those_shown_in_it(name, decoder, span, studio) -> None:
    path = studio.film(name, frames=40, options=SHORT_GOP, pts=SLOWING)
    start_s, end_s = span
    assert seen(studio, path, BY_TIMES, decoder, start_s=start_s, end_s=end_s) == inside(SLOWING, start_s, end_s)
    with pytest.raises(MediaError, match="do not come at its average rate"):
        seen(studio, path, BY_RATE, decoder, start_s=start_s, end_s=end_s)


def test_times_count_from_the_first_frame(studio) -> None:
    path = studio.film("late.mkv", frames=40, options=SHORT_GOP, pts=[time + 7000 for time in SLOWING])
    assert seen(studio, path, BY_TIMES, start_s=1.0, end_s=2.5) == inside(SLOWING, 1.0, 2.5)


def test_a_file_that_is_decoded_in_order_is_cut_by_its_times_too(studio) -> None:
    path = studio.film("slowing.flv", frames=40, options=SHORT_GOP, pts=SLOWING)
    assert decode_clip(studio.job(path)).decoder == "frames/1+sequential"
    assert seen(studio, path, BY_TIMES, start_s=0.3, end_s=0.9) == inside(SLOWING, 0.3, 0.9)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.flv", "a.ts"])
@pytest.mark.parametrize("rate", [25, 24])
def test_a_constant_rate_span_is_that_of_the_reference_by_either_rule(name, rate, studio) -> None:
    codec = "mpeg4" if name == "a.avi" else "libx264"
    path = studio.film(name, codec, rate=rate, options={"g": "12"})
    fps = decode_clip(studio.job(path)).fps
    expected = np.linspace(0.5 * fps, min(59, 1.7 * fps - 1), 32, dtype=int).tolist()
    assert fps == pytest.approx(rate)
    assert seen(studio, path, BY_RATE, start_s=0.5, end_s=1.7) == expected
    assert seen(studio, path, BY_TIMES, start_s=0.5, end_s=1.7) == expected


def test_a_whole_variable_rate_file_is_sampled_evenly_by_either_rule(studio) -> None:
    path = studio.film("slowing.mp4", frames=40, options=SHORT_GOP, pts=SLOWING)
    assert seen(studio, path, BY_RATE) == seen(studio, path, BY_TIMES) == np.linspace(0, 39, 32, dtype=int).tolist()


@pytest.mark.parametrize("decoder", ["frames/1", "decord", "ffmpeg"])
@pytest.mark.parametrize("rate", [25, 49, 98])
def test_a_video_of_one_frame_is_read_at_any_rate(decoder, rate, studio) -> None:
    path = studio.film("one.mp4", frames=1, rate=rate)
    assert seen(studio, path, BY_RATE, decoder) == [0] * 32


@pytest.mark.parametrize("decoder", ["frames/1", "decord", "ffmpeg"])
def test_a_span_inside_the_last_frame_is_that_frame(decoder, studio) -> None:
    path = studio.film("a.mp4", rate=25, options=SHORT_GOP)
    for view in (BY_RATE, BY_TIMES):
        assert seen(studio, path, view, decoder, start_s=59.5 / 25) == [59] * 32


def test_views_of_several_frame_rules_share_one_decode(studio) -> None:
    rules = {"linspace-16": 16, "linspace-8": 8, "linspace-32/2": 16}
    views = [View(rule=RULE, num_frames=number, frame_rule=rule) for rule, number in rules.items()]
    frames = decode_clip(studio.job(studio.film("a.mp4", options=SHORT_GOP), views=tuple(views))).frames
    sixteen, eight, every_second = (studio.stamps(frames[view]) for view in views)
    assert sixteen == np.linspace(0, 59, 16, dtype=int).tolist()
    assert eight == np.linspace(0, 59, 8, dtype=int).tolist()
    assert every_second == np.linspace(0, 59, 32, dtype=int)[::2].tolist() != sixteen

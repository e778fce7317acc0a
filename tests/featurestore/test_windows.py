"""Windows of a video: which spans they are, and how a store finds and reads them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from featurestore.clips import Clip
from featurestore.windows import WindowIndex, count_windows, spread_windows, window_length, window_of
from mervcache.errors import UserError

WHOLE = Clip(dataset="d", path="films/a#1.mp4", kind="video")
SPAN = Clip(dataset="d", path="films/a#1.mp4", kind="video", start_s=2.5, end_s=9.0)


def windows(clip: Clip, length: Fraction, media_s: float) -> list[str]:
    return [window_of(clip, length, number).clip_id for number in range(count_windows(clip, length, media_s))]


def test_windows_are_spans_of_equal_length() -> None:
    found = windows(WHOLE, Fraction(16), 40.0)
    assert found == [f"d/films/a%231.mp4#t={span}" for span in ("0.0,16.0", "16.0,32.0", "32.0,48.0")]


def test_windows_of_a_span_count_from_its_start_and_end_with_it() -> None:
    found = windows(SPAN, Fraction(4), 100.0)
    assert found == [f"d/films/a%231.mp4#t={span}" for span in ("2.5,6.5", "6.5,9.0")]
    assert windows(SPAN, Fraction(4), 6.0) == found[:1]  # the file ends sooner


@pytest.mark.parametrize(
    ("media_s", "number"), [(0.0, 1), (15.9, 1), (16.0, 1), (16.0005, 1), (16.1, 2), (7200.0, 450)]
)
def test_the_last_window_holds_what_is_left(media_s, number) -> None:
    assert count_windows(WHOLE, Fraction(16), media_s) == number


def test_the_length_follows_from_the_frame_rule() -> None:
    assert window_length("rate-4/3x16") == 12
    assert window_length("rate-2x32+steps/2") == 16
    assert window_length("linspace-32/2+times") is None


def test_an_index_finds_the_windows_of_a_video_and_of_its_spans() -> None:
    length = Fraction(16, 3)
    whole, span = windows(WHOLE, length, 30.0), windows(SPAN, length, 30.0)
    others = ["d/films/a%231.mp4", "d/films/a%231.mp4#end_frame=5", "d/films/a%231.mp4#t=1.0,2.0", "d/b.mp4#t=0.0,16.0"]
    index = WindowIndex([*others, *reversed(whole), *span], length)
    assert index.windows(WHOLE.clip_id) == dict(enumerate(whole))
    assert index.windows(SPAN.clip_id) == dict(enumerate(span))
    assert index.windows("d/films/a%231.mp4#end_frame=5") == {}
    assert index.windows("d/c.mp4") == {}


def test_a_window_that_is_gone_leaves_the_others_their_numbers() -> None:
    found = windows(WHOLE, Fraction(16), 70.0)
    index = WindowIndex([found[0], found[3]], Fraction(16))
    assert index.windows(WHOLE.clip_id) == {0: found[0], 3: found[3]}


@pytest.mark.parametrize(("limit", "chosen"), [(None, "abcdefg"), (9, "abcdefg"), (1, "d"), (2, "bf"), (3, "bdf")])
def test_a_bounded_number_of_windows_is_spread_over_the_video(limit, chosen) -> None:
    assert spread_windows(list("abcdefg"), limit) == list(chosen)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        spread_windows(["a"], 0)

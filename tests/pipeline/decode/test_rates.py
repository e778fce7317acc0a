"""Frames by rate: golden indices, and the frames that ffprobe's times say are on screen."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore.clips import Clip
from featurestore.windows import count_windows, window_of
from mervcache.errors import MediaError, UserError
from pipeline.decode.decoders import decode_clip
from pipeline.decode.length import length_s
from pipeline.decode.pool import DecodePool
from pipeline.decode.sampling import LengthJob, frame_indices
from pipeline.media import Source
from pipeline.views import FrameRule, ResizeRule, View

NTSC = 30000 / 1001
SLOWING = np.cumsum([0, *[20] * 20, *[120] * 19]).tolist()  # ms: 50 frames per second, then 8
GOLDEN = {  # (rule, N, fps, span) -> indices
    ("rate-1x4", 300, 30.0, (0.0, 4.0)): [0, 30, 60, 90],
    ("rate-1x4", 300, NTSC, (0.0, 4.0)): [0, 29, 59, 89],  # frame 30 is shown at 1.001 s
    ("rate-1x4", 300, NTSC, (4.0, 8.0)): [119, 149, 179, 209],
    ("rate-2x8", 300, NTSC, (4.0, 8.0)): [119, 134, 149, 164, 179, 194, 209, 224],
    ("rate-1/2x2", 300, NTSC, (4.0, 8.0)): [119, 179],
    ("rate-4/3x4", 300, 30.0, (3.0, 6.0)): [90, 112, 135, 157],
    ("rate-1x4", 300, 30.0, (8.0, 12.0)): [240, 270, 299, 299],  # a short last window repeats its last frame
    ("rate-1x4", 300, 30.0, (8.0, 9.5)): [240, 270, 284, 284],  # so does the last window of a span
    ("rate-1x4", 1, 30.0, (0.0, 4.0)): [0, 0, 0, 0],
    ("rate-100x4", 300, 30.0, (1.0, 1.04)): [30, 30, 30, 30],  # faster than the video
}


def clip(span: tuple | None = None, **fields) -> Clip:
    start_s, end_s = span or (None, None)
    return Clip(dataset="d", path="a.mp4", kind="video", start_s=start_s, end_s=end_s, **fields)


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_indices_are_those_written_out_by_hand(case) -> None:
    text, num_frames, fps, span = case
    rule = FrameRule.parse(text)
    exact = np.arange(num_frames) / fps
    assert frame_indices(clip(span), num_frames, fps, rule, exact).tolist() == GOLDEN[case]
    assert frame_indices(clip(span), num_frames, fps, rule).tolist() == GOLDEN[case]  # by the average rate
    milliseconds = np.round(exact, 3)  # as Matroska has them
    assert frame_indices(clip(span), num_frames, fps, rule, milliseconds).tolist() == GOLDEN[case]


def test_a_window_that_cannot_have_frames_is_the_clips_fault() -> None:
    rule = FrameRule.parse("rate-1x4")
    with pytest.raises(MediaError, match="beyond the end"):
        frame_indices(clip((12.0, 16.0)), 300, 30.0, rule)
    with pytest.raises(MediaError, match="no frame rate"):
        frame_indices(clip((0.0, 4.0)), 300, 0.0, rule)
    with pytest.raises(MediaError, match="ends at a frame"):
        frame_indices(clip(end_frame=4), 300, 30.0, rule)


@pytest.mark.parametrize("text", ["rate-1x16", "rate-1/2x8", "rate-2997/100x16", "rate-2x32+steps/2"])
def test_a_rule_is_its_text(text) -> None:
    assert str(FrameRule.parse(text)) == text


@pytest.mark.parametrize("text", ["rate-0x16", "rate-1x0", "rate-1", "rate-1x16+times", "rate--1x16", "rate-1/0x4"])
def test_other_texts_are_refused(text) -> None:
    with pytest.raises(UserError, match="unknown frame rule"):
        FrameRule.parse(text)


@given(
    st.integers(1, 2000), st.sampled_from((5.0, 12.5, 24000 / 1001, 25.0, NTSC, 60.0)), st.integers(1, 40),
    st.sampled_from((Fraction(1, 2), Fraction(1), Fraction(3), Fraction(2997, 100))),
)  # fmt: skip
def test_windows_are_a_video_without_gap_or_overlap(num_frames, fps, frames, rate) -> None:
    """The frames of all windows, one after the other, are those of one clip at the same rate."""
    whole, length, media_s = clip(), frames / rate, num_frames / fps
    windows = [window_of(whole, length, number) for number in range(count_windows(whole, length, media_s))]
    assert windows[0].start_s == 0.0
    assert all(one.end_s == other.start_s for one, other in itertools.pairwise(windows))
    assert windows[-1].start_s < media_s or len(windows) == 1
    assert windows[-1].end_s >= media_s - 1e-3
    rule = FrameRule(samples=frames, rate=rate)
    seen = np.concatenate([frame_indices(window, num_frames, fps, rule) for window in windows])
    at_once = FrameRule(samples=frames * len(windows), rate=rate)
    assert seen.tolist() == frame_indices(whole, num_frames, fps, at_once).tolist()
    assert (np.diff(seen) >= 0).all()


def shown_at(path: Path) -> np.ndarray:
    """Seconds from the first frame, in presentation order, as the ffprobe program decodes the file."""
    entries = ["-select_streams", "v:0", "-show_entries", "frame=best_effort_timestamp_time", "-of", "json"]
    output = subprocess.run(["ffprobe", "-v", "error", *entries, path], capture_output=True, check=True).stdout
    times = sorted(float(frame["best_effort_timestamp_time"]) for frame in json.loads(output)["frames"])
    return np.array(times) - times[0]


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="the ffprobe program is the reference")
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(25), "slowing"])
def test_frames_are_those_on_screen_at_their_times(name, rate, studio) -> None:
    if rate == "slowing" and name in ("a.ts", "a.avi"):
        pytest.skip("the container has a fixed rate, or its writer wants one")
    codec, timing = "mpeg4" if name == "a.avi" else "libx264", {"pts": SLOWING, "frames": 40}
    options = {"g": "12"} if name == "a.avi" else {"g": "12", "bf": "2"}
    path = studio.film(name, codec, options=options, **(timing if rate == "slowing" else {"rate": rate, "frames": 97}))
    times = shown_at(path)
    view = View(rule=ResizeRule(size=48, filter="bilinear"), num_frames=4, frame_rule="rate-4x4")
    source = Source.find(str(studio.folder), name)
    number = count_windows(clip(), Fraction(1), length_s(source))
    assert number == np.ceil(times[-1] + np.diff(times).mean() - 1e-3)
    for start in range(number):
        decoded = decode_clip(studio.job(path, views=(view,), start_s=float(start), end_s=start + 1.0))
        wanted = start + np.arange(4) / 4
        on_screen = [int(np.flatnonzero(times <= second + 6e-4)[-1]) for second in wanted]
        assert studio.stamps(decoded.frames[view]) == on_screen, start


def test_lengths_come_from_a_process_that_can_be_killed(studio) -> None:
    film, broken = studio.film("a.mp4", frames=75, rate=25), studio.bytes("b.mp4", b"no film")
    with DecodePool(1) as pool:
        found = [pool.submit(LengthJob(root=str(studio.folder), clip=studio.job(p).clip)) for p in (film, broken, film)]
        assert [found[0].result(), found[2].result()] == pytest.approx([3.0, 3.0])
        with pytest.raises(MediaError, match="not a video"):
            found[1].result()
        assert pool.submit(studio.job(film)).result().num_frames == 75


def test_the_length_is_that_of_the_pictures_and_not_of_the_sound(studio) -> None:
    for name in ("a.mp4", "a.mkv"):
        film = studio.film(f"silent-{name}", frames=50, rate=25)
        command = ["ffmpeg", "-v", "error", "-i", film, "-f", "lavfi", "-i", "sine=duration=9"]
        path = studio.folder / name
        subprocess.run([*command, "-c:v", "copy", "-map", "0:v", "-map", "1:a", path], check=True)
        assert length_s(Source.find(str(studio.folder), name)) == pytest.approx(2.0, abs=2e-3)

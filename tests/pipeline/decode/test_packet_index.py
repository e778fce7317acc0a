"""The index path against a plain decode of the whole file, and against the in-order path."""

from __future__ import annotations

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.decode import pyav
from pipeline.decode.container import OpenVideo, open_video
from pipeline.decode.decoders import decode_clip
from pipeline.decode.packet_index import NO_TIME, PacketIndex, UntrustedIndexError, scan_packets
from pipeline.decode.sampling import FrameCollector
from pipeline.media import Source
from pipeline.views import ResizeRule, View

NATIVE = View(rule=ResizeRule(size=96, filter="bilinear"), num_frames=32)


def index_of(pts, keys, shown=None) -> PacketIndex:
    shown = [True] * len(pts) if shown is None else shown
    times = np.array([NO_TIME if time is None else time for time in pts], dtype=np.int64)
    is_key = np.array([i in keys for i in range(len(pts))], dtype=bool)
    return PacketIndex(times, np.arange(len(pts)), is_key, np.array(shown, dtype=bool), None)


def test_frames_are_numbered_by_presentation_time_without_the_hidden_ones() -> None:
    index = index_of([0, 3, 1, 2, 4], keys=[0], shown=[False, True, True, True, True])
    assert index.shown.tolist() == [2, 3, 1, 4]


def test_leading_frames_of_an_open_group_are_decoded_from_the_group_before() -> None:
    index = index_of([0, 2, 1, 6, 4, 5, 8, 7], keys=[0, 3])  # frames 4 and 5 are shown before keyframe 6
    assert index.segments([4]) == [(0, 4)]
    assert index.segments([6]) == [(3, 6)]
    assert index.segments([3, 4]) == [(0, 4)]
    assert index.segments([1, 6]) == [(0, 1), (3, 6)]


@pytest.mark.parametrize(
    ("pts", "keys"), [([0, None, 2], [0]), ([0, 1, 1], [0]), ([0, 1, 2], []), ([0, 1, 2], [1]), ([], [])]
)
def test_times_that_name_no_frame_are_not_trusted(pts, keys) -> None:
    with pytest.raises(UntrustedIndexError):
        index_of(pts, keys).check_trust()


def plain_frames(path) -> np.ndarray:
    """Every frame by PyAV's own loop, brought to the view's size by Pillow: an independent reference."""
    from PIL import Image

    with av.open(str(path)) as container:
        images = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return np.stack([np.asarray(image.resize((96, 96), Image.Resampling.BILINEAR)) for image in images])


def read_both(studio, path, **options) -> tuple[np.ndarray, np.ndarray, str]:
    """The same job by decode_clip (index where it can) and by the in-order path alone."""
    job = studio.job(path, views=(NATIVE,), **options)
    source, collector = Source.find(job.root, job.clip.path), FrameCollector(job)
    with open_video(source) as video:
        index = scan_packets(video)
    pyav.read_in_order(source, index, collector, accept_damaged=False)
    decoded = decode_clip(job)
    return decoded.frames[NATIVE], collector.frames()[NATIVE], decoded.decoder


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    frames=st.integers(1, 70),
    keyint=st.integers(1, 40),
    b_frames=st.integers(0, 4),
    is_open=st.booleans(),
    pyramid=st.sampled_from(["none", "normal"]),
    suffix=st.sampled_from(["mp4", "mkv"]),
    end_frame=st.integers(0, 80),
)
def test_index_and_order_give_the_same_pixels(
    studio, frames, keyint, b_frames, is_open, pyramid, suffix, end_frame
) -> None:
    options = f"keyint={keyint}:min-keyint=1:bframes={b_frames}:open-gop={int(is_open)}:b-pyramid={pyramid}:b-adapt=0"
    path = studio.film(f"a.{suffix}", frames=frames, options={"x264-params": options, "preset": "ultrafast"})
    by_index, by_order, decoder = read_both(studio, path, end_frame=end_frame)
    assert decoder == "frames/1"
    assert np.array_equal(by_index, by_order)
    wanted = np.linspace(0, min(frames - 1, end_frame), 32, dtype=int)
    assert np.array_equal(by_order, plain_frames(path)[wanted])


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "libvpx-vp9"])
@pytest.mark.parametrize("span", [(None, None), (0.5, 1.3), (1.1, None), (0.0, 0.05)])
def test_spans_give_the_same_pixels_by_index_and_in_order(codec, span, studio) -> None:
    options = {"g": "9", "bf": "2", "x265-params": "log-level=none", "deadline": "realtime"}
    accepted = {"libx264": ("g", "bf"), "libx265": ("g", "x265-params"), "mpeg4": ("g", "bf")}
    kept = {name: options[name] for name in accepted.get(codec, ("g", "deadline"))}
    path = studio.film("a.mkv", codec, options=kept)
    by_index, by_order, decoder = read_both(studio, path, start_s=span[0], end_s=span[1])
    assert decoder == "frames/1"
    assert np.array_equal(by_index, by_order)


def test_an_index_that_lies_falls_back_to_order_with_the_same_frames(studio, monkeypatch) -> None:
    path = studio.film("a.mp4", options={"g": "12", "bf": "2"})
    right = decode_clip(studio.job(path))
    without_references = lambda self, wanted: [(position, position) for position in sorted(wanted)]  # noqa: E731
    monkeypatch.setattr(PacketIndex, "segments", without_references)
    fallen = decode_clip(studio.job(path))
    assert (right.decoder, fallen.decoder) == ("frames/1", "frames/1+sequential")
    assert studio.numbers(fallen) == studio.numbers(right)


def test_frames_nobody_asked_for_are_not_converted(studio, monkeypatch) -> None:
    path = studio.film("a.mp4", frames=100, options={"g": "250", "bf": "3"})
    converted = []
    to_rgb = OpenVideo.to_rgb
    monkeypatch.setattr(OpenVideo, "to_rgb", lambda self, frame: converted.append(frame.pts) or to_rgb(self, frame))
    view = View(rule=ResizeRule(size=8), num_frames=4)
    decode_clip(studio.job(path, views=(view,)))
    assert len(converted) == 4


def test_every_real_clip_decodes_as_in_plain_order(real_media) -> None:
    """Real files: the index path was taken (AVI apart) and gives the frames of a decode from start to end."""
    from featurestore.clips import Clip
    from pipeline.decode.sampling import DecodeJob

    view = View(rule=ResizeRule(size=32), num_frames=8)
    names = ["hazard_clips/tc_discard_first_keyframe.mp4", "hazard_clips/tc_h265_video.mp4"]
    names += [f"videollava_mini/videochatgpt_tune/{name}" for name in ("mma2_test_avi.avi", "k400_arm_wrestling.mp4")]
    for name in names:
        clip = Clip(dataset="d", path=name, kind="video")
        job = DecodeJob(root=str(real_media), clip=clip, views=(view,))
        source, collector = Source.find(job.root, name), FrameCollector(job)
        with open_video(source) as video:
            index = scan_packets(video)
        pyav.read_in_order(source, index, collector, accept_damaged=False)
        decoded = decode_clip(job)
        assert decoded.decoder == ("frames/1+sequential" if name.endswith("avi") else "frames/1")
        assert np.array_equal(decoded.frames[view], collector.frames()[view]), name

"""Decoding in order from the first packet: for files whose index cannot be trusted, and for damaged ones.

Frames are counted as they come out of the decoder. N is not known before the end, so the packets' number serves as a
guess; if it was wrong, a second pass takes the right frames. The tolerant path makes two passes always: one to see
which frames survive, one to take them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import av

from mervcache.errors import MediaError
from pipeline.decode.collector import FrameCollector
from pipeline.decode.container import OpenVideo, open_video, reason
from pipeline.decode.job import Reading
from pipeline.decode.packets import PacketIndex
from pipeline.decode.source import Source

NAME = "frames/1+sequential"
MAX_SUBSTITUTED = 0.5  # of the frames wanted; past that the clip is not what it says


def read_frames(source: Source, index: PacketIndex, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    """Fill the collector from a decode of the whole file."""
    try:
        return _read_intact(source, index, collector)
    except av.error.FFmpegError as error:
        if not accept_damaged:
            raise MediaError(f"damaged file: {reason(error)}") from error
    except CorruptFrameError as error:
        if not accept_damaged:
            raise MediaError("damaged file: a frame is corrupt") from error
    return _read_damaged(source, index, collector)


class CorruptFrameError(Exception):
    """The decoder filled holes in a wanted frame with guesses."""


def _read_intact(source: Source, index: PacketIndex, collector: FrameCollector) -> Reading:
    if index.damage:
        raise CorruptFrameError
    guess = sum(index.is_shown)
    try:
        count, fps = _take(source, collector, guess)
    except MediaError:  # the guess left the span no frame: count, then judge
        count, fps = _take(source, None, 0)
        guess = -1
    if count != guess:
        again, fps = _take(source, collector, count)
        if again != count:
            raise MediaError("number of frames differs from one pass to the next")
    return Reading(num_frames=count, fps=fps, decoder=NAME)


def _take(source: Source, collector: FrameCollector | None, num_frames: int) -> tuple[int, float]:
    """One pass that expects `num_frames` frames; returns how many there were, and the frame rate."""
    with open_video(source) as video:
        wanted = set(collector.choose(num_frames, video.fps)) if collector else ()
        count = 0
        for frame in video.container.decode(video.stream):
            if count in wanted:
                if frame.is_corrupt:
                    raise CorruptFrameError
                collector.add(count, video.to_rgb(frame))
            count += 1
        return count, video.fps


def _read_damaged(source: Source, index: PacketIndex, collector: FrameCollector) -> Reading:
    """Take every wanted frame that decodes, and in place of each other one the nearest that does."""
    numbers = _frame_numbers(index)
    with open_video(source) as video:
        fps = video.fps
        good = [number for number, frame in _numbered(video, numbers) if not frame.is_corrupt]
    num_frames = len(numbers) if numbers else len(good)
    wanted = collector.choose(num_frames, fps)
    good = sorted(set(good))
    sources: dict[int, list[int]] = {}  # surviving frame -> wanted frames it stands for
    for number in wanted:
        sources.setdefault(_nearest(good, number), []).append(number)
    substituted = sum(number not in sources.get(number, ()) for number in wanted)
    if substituted > MAX_SUBSTITUTED * len(wanted):
        raise MediaError("damaged file: more than half of the wanted frames cannot be decoded")
    with open_video(source) as video:
        for number, frame in _numbered(video, numbers):
            if number in sources and not frame.is_corrupt:
                frame_HWC = video.to_rgb(frame)
                for wanted_number in sources.pop(number):
                    collector.add(wanted_number, frame_HWC)
    return Reading(num_frames=num_frames, fps=fps, decoder=f"{NAME}+damaged:{substituted}-substituted")


def _frame_numbers(index: PacketIndex) -> dict[int, int]:
    """Presentation time -> frame number where the times can be used, else empty: frames are counted."""
    times = [time for time, shown in zip(index.pts, index.is_shown, strict=True) if shown]
    if None in times or len(set(times)) != len(times):
        return {}
    return {time: number for number, time in enumerate(sorted(times))}


def _numbered(video: OpenVideo, numbers: dict[int, int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(frame number, frame) of all that can be decoded; a packet that cannot is passed over."""
    for count, frame in enumerate(_surviving(video)):
        number = numbers.get(frame.pts, -1) if numbers else count
        if number >= 0:
            yield number, frame


def _surviving(video: OpenVideo) -> Iterator[av.VideoFrame]:
    packets = video.packets()
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.error.FFmpegError):
            break  # the end, or where the file is cut off
        if packet.size:
            yield from _decode_or_nothing(video.codec, packet)
    yield from _decode_or_nothing(video.codec, None)


def _decode_or_nothing(codec: av.VideoCodecContext, packet: av.Packet | None) -> list[av.VideoFrame]:
    try:
        return codec.decode(packet)
    except av.error.InvalidDataError:
        return []


def _nearest(sorted_numbers: list[int], number: int) -> int:
    """The closest of the numbers; the earlier one of two as close."""
    if not sorted_numbers:
        raise MediaError("damaged file: no frame can be decoded")
    after = bisect_left(sorted_numbers, number)
    candidates = sorted_numbers[max(0, after - 1) : after + 1]
    return min(candidates, key=lambda candidate: (abs(candidate - number), candidate))

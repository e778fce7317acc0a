"""The default decoder, "frames/1": exact frames through PyAV, found by presentation time.

The packet index (`packet_index.py`) holds the presentation time of every frame shown; sorted, these are the frame
numbers. It comes from the tables of an MP4 file where they can be trusted, else from a scan of the packets. Each wanted
frame is decoded from the last keyframe shown at or before it, and matched by time, never by counting. Where packet
times cannot be trusted either, the file is decoded in order from its start. All ways give the same pixels, so which one
ran is provenance, not identity.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO, TypeVar

import av
import av.error
import numpy as np

from mervcache.errors import MediaError
from pipeline.decode.container import OpenVideo, open_video, reason
from pipeline.decode.packet_index import (
    NO_TIME,
    PacketIndex,
    UntrustedIndexError,
    index_from_tables,
    read_moov,
    scan_packets,
)
from pipeline.decode.sampling import DAMAGED, FrameCollector, Reading
from pipeline.media import Source

INDEXED_NAME = "frames/1"
SEQUENTIAL_NAME = "frames/1+sequential"
TRUSTED_FORMATS = ("mov,mp4", "matroska")  # AVI has no presentation times; TS and PS may start and jump anywhere
UNTRUSTED_CODECS = ("vp8",)  # its hidden frames have packets of their own
MAX_SUBSTITUTED = 0.5  # of the wanted frames; a clip with more is not accepted as damaged
EBML_ID, SEGMENT_ID = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
MAX_KNOWN_INDEXES = 4  # of 8 MB each for a video of 3 hours
MAX_EBML_HEADER_BYTES = 4096  # real ones have 40; where the segment is not found behind it, no length is known


def read_frames(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    """Fill the collector with exact frames, by the packet index or, where it cannot be trusted, in order.

    A damaged file ends in the scan, which finds the reason: the tables only replace it where every frame decodes.
    """
    with source.open() as file:
        moov = read_moov(file)
    if moov is not None:
        with open_video(source) as video:
            index = _remembered("tables", source, partial(index_from_tables, video, moov))
            reading = _try_indexed(video, index, collector) if index is not None else None
        if reading is not None:
            return reading
    with open_video(source) as video:
        index = _remembered("scan", source, partial(scan_packets, video))
        if not accept_damaged:
            if index.damage:
                raise MediaError(f"damaged file: {index.damage}")
            with source.open() as file:
                if ends_early(file):
                    raise MediaError("damaged file: it is shorter than it says")
        is_sound = not index.damage and not index.is_joined
        reading = _try_indexed(video, index, collector) if is_sound else None
    if reading is not None:
        return reading
    return read_in_order(source, index, collector, accept_damaged=accept_damaged)


Index = TypeVar("Index", bound=PacketIndex | None)
_KNOWN_INDEXES: dict[tuple[Any, ...], Any] = {}  # of the files read last; a process reads one at a time


def _remembered(way: str, source: Source, make: Callable[[], Index]) -> Index:
    """The packet index of a file, made once for all spans of it that a process reads one after the other."""
    key = (way, *source.version)
    if key not in _KNOWN_INDEXES:
        made = make()
        while len(_KNOWN_INDEXES) >= MAX_KNOWN_INDEXES:
            del _KNOWN_INDEXES[next(iter(_KNOWN_INDEXES))]
        _KNOWN_INDEXES[key] = made
    return _KNOWN_INDEXES[key]


class CorruptFrameError(Exception):
    """The decoder filled holes in a wanted frame with guesses."""


def _try_indexed(video: OpenVideo, index: PacketIndex, collector: FrameCollector) -> Reading | None:
    """`_read_indexed`, or None where the index fails: another way may still decode the file, or give the reason."""
    try:
        return _read_indexed(video, index, collector)
    except (UntrustedIndexError, av.error.FFmpegError) as error:
        if isinstance(error, MemoryError):
            raise
        return None


def _read_indexed(video: OpenVideo, index: PacketIndex, collector: FrameCollector) -> Reading:
    if not video.container.format.name.startswith(TRUSTED_FORMATS) or video.codec.name in UNTRUSTED_CODECS:
        raise UntrustedIndexError("times of this format are not reliable")
    index.check_trust()
    pts = index.pts[index.shown]  # of frame 0, 1, 2, ...
    numbers = collector.choose(len(pts), video.fps, video.times(pts) if collector.needs_times else None)
    wanted = dict(zip(pts[numbers].tolist(), numbers, strict=True))
    for first, last in index.segments(index.shown[numbers].tolist()):
        for frame in _decode_segment(video, index, first, last, wanted):
            if frame.pts in wanted and not frame.is_corrupt:
                collector.add(wanted[frame.pts], video.to_rgb(frame))
    if collector.missing():
        raise UntrustedIndexError("a frame did not come at its time")
    return Reading(num_frames=len(pts), fps=video.fps, decoder=INDEXED_NAME)


def _decode_segment(
    video: OpenVideo, index: PacketIndex, first: int, last: int, wanted: Container[object]
) -> Iterator[av.VideoFrame]:
    """Decode packets first..last; frames that no other frame refers to are skipped unless wanted (1.1-1.7x faster)."""
    columns = (index.pts, index.is_key, index.is_shown)  # not dts: after a seek FFmpeg guesses those of Matroska anew
    expected = zip(*(column[first : last + 1].tolist() for column in columns), strict=True)
    for row, packet in zip(expected, _packets_from(video, index, first), strict=False):
        if (packet.pts, packet.is_keyframe, not packet.is_discard) != row:
            raise UntrustedIndexError("packets are not those of the index")
        video.codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from video.codec.decode(packet)
    yield from video.codec.decode(None)  # no more packets needed: what is held back for reordering comes out


def _packets_from(video: OpenVideo, index: PacketIndex, first: int) -> Iterator[av.Packet]:
    """Packets in decode order from `first` on; some formats seek by decode time, some by presentation time."""
    start = min(time for time in (index.pts[0], index.dts[0]) if time != NO_TIME)
    for target in (index.pts[first], index.dts[first], start):
        if target == NO_TIME:
            continue
        video.container.seek(int(target), stream=video.stream, backward=True)  # also empties the decoder
        packets = video.packets()
        for packet in packets:
            position = index.position_of(packet.pts)
            if position > first:
                break  # landed behind it: try the next way to name the position
            if position == first:
                yield packet
                yield from packets
                return
    raise UntrustedIndexError("seeking does not reach a keyframe")


def read_in_order(source: Source, index: PacketIndex, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    """Fill the collector from a decode of the whole file, for untrusted indexes and damaged files.

    Frames are counted as the decoder gives them. N is not known before the end, so the number of packets serves as a
    guess; if it was wrong, a second pass takes the right frames. Damaged files always need two passes.
    """
    try:
        return _read_intact(source, index, collector)
    except (av.error.FFmpegError, CorruptFrameError) as error:
        if isinstance(error, MemoryError):
            raise
        if not accept_damaged:
            is_corrupt = isinstance(error, CorruptFrameError)
            what = "a packet is corrupt" if index.is_joined else "a frame is corrupt" if is_corrupt else reason(error)
            raise MediaError(f"damaged file: {what}") from error
    return _read_damaged(source, index, collector)


def _read_intact(source: Source, index: PacketIndex, collector: FrameCollector) -> Reading:
    if index.damage:
        raise CorruptFrameError
    take = partial(_take, source, is_joined=index.is_joined)
    guess, times = -1, None
    if not collector.needs_times:
        guess = int(index.is_shown.sum())
        try:
            count, fps, _ = take(collector, guess)
        except MediaError:
            guess = -1
    if guess < 0:  # frames are counted first: they are chosen by their times, or the guess left nothing to choose
        count, fps, times = take(None, 0)
    if count != guess:
        again, fps, _ = take(collector, count, times)
        if again != count:
            raise MediaError("number of frames differs from one pass to the next")
    return Reading(num_frames=count, fps=fps, decoder=SEQUENTIAL_NAME)


def _take(
    source: Source,
    collector: FrameCollector | None,
    num_frames: int,
    times: np.ndarray | None = None,
    *,
    is_joined: bool,
) -> tuple[int, float, np.ndarray | None]:
    """One pass that expects `num_frames` frames; returns how many there were, the frame rate, and their times."""
    with open_video(source, is_strict=is_joined) as video:
        wanted = set(collector.choose(num_frames, video.fps, times)) if collector else ()
        pts = []
        for count, frame in enumerate(video.container.decode(video.stream)):
            pts.append(frame.pts)
            if frame.is_corrupt and (is_joined or count in wanted):
                raise CorruptFrameError
            if collector and count in wanted:
                collector.add(count, video.to_rgb(frame))
        return len(pts), video.fps, video.times(pts)


def _read_damaged(source: Source, index: PacketIndex, collector: FrameCollector) -> Reading:
    """Take every wanted frame that decodes, and in place of each other one the nearest that does."""
    pts = np.sort(index.pts[index.is_shown]).tolist()
    is_usable = NO_TIME not in pts and len(set(pts)) == len(pts)  # else frames are counted
    numbers = {time: number for number, time in enumerate(pts)} if is_usable else {}
    with open_video(source) as video:
        fps = video.fps
        good = [number for number, frame in _numbered(video, numbers) if not frame.is_corrupt]
        shown_at = video.times(pts) if is_usable else None
    num_frames = len(numbers) if numbers else len(good)
    wanted = collector.choose(num_frames, fps, shown_at if collector.needs_times else None)
    good = sorted(set(good))
    sources: dict[int, list[int]] = {}  # surviving frame -> the wanted frames that it replaces
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
    return Reading(num_frames=num_frames, fps=fps, decoder=f"{SEQUENTIAL_NAME}{DAMAGED}{substituted}-substituted")


def _numbered(video: OpenVideo, numbers: dict[int, int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(frame number, frame) of all that can be decoded; a packet that cannot is passed over.

    `numbers` maps presentation times to frame numbers; where it is empty, frames are counted.
    """
    for count, frame in enumerate(_decodable_frames(video)):
        number = numbers.get(NO_TIME if frame.pts is None else frame.pts, -1) if numbers else count
        if number >= 0:
            yield number, frame


def _decodable_frames(video: OpenVideo) -> Iterator[av.VideoFrame]:
    packets = video.packets()
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            packet = None  # where the file is cut off
        if packet is not None and not packet.size:
            continue
        with suppress(av.error.InvalidDataError):
            yield from video.codec.decode(packet)  # None: the frames held back for reordering
        if packet is None:
            return


def _nearest(sorted_numbers: list[int], number: int) -> int:
    """The closest of the numbers; the earlier one of two as close."""
    if not sorted_numbers:
        raise MediaError("damaged file: no frame can be decoded")
    after = bisect_left(sorted_numbers, number)
    candidates = sorted_numbers[max(0, after - 1) : after + 1]
    return min(candidates, key=lambda candidate: (abs(candidate - number), candidate))


def ends_early(file: BinaryIO) -> bool:
    """True where a Matroska, WebM or RIFF (AVI) file declares more bytes than there are.

    An MP4 that is cut off lacks samples that its tables name, and FFmpeg reports it. Matroska and AVI are read up to
    the last byte and returned as a shorter video without an error; but both declare their length in the first bytes.
    """
    present = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(MAX_EBML_HEADER_BYTES)
    declared = None  # unknown
    if head[:4] == b"RIFF":
        size = int.from_bytes(head[4:8], "little")
        if size not in (0, 0xFFFFFFFF):  # left by recorders that never closed the file
            declared = 8 + size
    elif head[:4] == EBML_ID:
        size, start = _ebml_size(head, len(EBML_ID))
        if size is not None and head[start + size : start + size + 4] == SEGMENT_ID:
            segment, begin = _ebml_size(head, start + size + len(SEGMENT_ID))
            declared = None if segment is None else begin + segment  # None: written live, without a size
    return declared is not None and declared > present


def _ebml_size(head: bytes, at: int) -> tuple[int | None, int]:
    """(size, where the content begins) of an EBML element; the leading zero bits of a size count its further bytes."""
    if at >= len(head) or head[at] == 0:
        return None, at
    length = 9 - head[at].bit_length()
    value = int.from_bytes(head[at : at + length]) & ((1 << 7 * length) - 1)
    unknown = value == (1 << 7 * length) - 1
    return (None if unknown else value), at + length

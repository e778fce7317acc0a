"""The default decoder, "frames/1": exact frames through PyAV, found by presentation time.

One pass over the packets (no decoding) gives the presentation time of every frame shown; sorted, these are the frame
numbers. Each wanted frame is decoded from the last keyframe shown at or before it, and matched by time, never by
counting. Where packet times cannot be trusted the file is decoded in order from its start instead; both give the same
pixels, so which one ran is provenance, not identity. All video files, whatever the decoder, are opened here with guards
against hostile input.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import BinaryIO

import av
import numpy as np
from av.stream import Disposition

from mervcache.errors import MediaError
from pipeline.decode.display import display_filters
from pipeline.decode.joins import count_joins
from pipeline.decode.sampling import FrameCollector, Reading
from pipeline.media import LocalFile, Source

MAX_PIXELS = 1 << 26  # per frame or image, 8192 x 8192: 201 MB as RGB
FORMATS = (
    *("mov", "matroska", "avi", "flv", "mpegts", "mpeg", "mpegvideo", "asf", "ogg", "rm", "ivf", "nut", "mxf", "dv"),
    *("h264", "hevc", "vvc", "m4v", "h263", "obu", "av1", "mjpeg", "wtv", "ea", "bink", "smk", "swf", "mpegtsraw"),
    *("png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "gif_pipe", "mp3", "wav", "flac", "aac"),
)  # the last line is opened to be refused with a better reason
INDEXED_NAME = "frames/1"
SEQUENTIAL_NAME = "frames/1+sequential"
TRUSTED_FORMATS = ("mov,mp4", "matroska")  # AVI has no presentation times; TS and PS may start and jump anywhere
UNTRUSTED_CODECS = ("vp8",)  # its hidden frames have packets of their own
MAX_SUBSTITUTED = 0.5  # of the wanted frames; a clip with more is not accepted as damaged
EBML_ID, SEGMENT_ID = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
MAX_EBML_HEADER_BYTES = 4096  # real ones have 40; where the segment is not found behind it, no length is known


def read_frames(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    """Fill the collector with exact frames, by the packet index or, where it cannot be trusted, in order."""
    with open_video(source) as video:
        index = scan_packets(video)
        if not accept_damaged:
            if index.damage:
                raise MediaError(f"damaged file: {index.damage}")
            with source.open() as file:
                if ends_early(file):
                    raise MediaError("damaged file: it is shorter than it says")
        try:
            if not index.damage and not index.is_joined:
                return _read_indexed(video, index, collector)
        except (UntrustedIndexError, av.error.FFmpegError) as error:
            if isinstance(error, MemoryError):
                raise
            # in order it may still decode; if it does not, that error is the one to report
    return read_in_order(source, index, collector, accept_damaged=accept_damaged)


class UntrustedIndexError(Exception):
    """The packets do not show which frames are shown when; decode in order instead."""


class CorruptFrameError(Exception):
    """The decoder filled holes in a wanted frame with guesses."""


class OpenVideo:
    """An opened file: its container, its one video stream that is read, and the conversion of that stream's frames."""

    def __init__(self, source: Source, container: av.container.InputContainer, stream: av.VideoStream) -> None:
        self.source, self.container, self.stream, self.codec = source, container, stream, stream.codec_context
        self._graphs: dict[tuple, av.filter.Graph] = {}  # frame size, pixel format and filters -> conversion

    @property
    def fps(self) -> float:
        """Average frames per second, as the reference's reader reports it; 0.0 if the file has no clock."""
        return float(self.stream.average_rate or self.stream.guessed_rate or 0)

    def packets(self) -> Iterator[av.Packet]:
        """The stream's packets from the current position, in decode order."""
        return self.container.demux(self.stream)

    def to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [H, W, 3] as it is shown: converted by the frame's own colour tags, turned by its display matrix.

        Through a filter graph, because its conversion is bit-identical to that of the ffmpeg program and of decord;
        `frame.to_ndarray` chooses another chroma filter for 10-bit and odd-sized video. Frames are turned before they
        are converted, as by the program.
        """
        check_pixels(frame.width, frame.height)
        filters = display_filters(frame)
        key = (frame.width, frame.height, frame.format.name, filters)
        graph = self._graphs.get(key)
        if graph is None:
            graph = av.filter.Graph()
            graph.threads = 1
            size = {"width": frame.width, "height": frame.height}
            buffer = graph.add_buffer(**size, format=frame.format, time_base=self.stream.time_base)
            nodes = [graph.add(name, arguments or None) for name, arguments in filters]
            graph.link_nodes(buffer, *nodes, graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")).configure()
            self._graphs[key] = graph
        graph.push(frame)
        return graph.pull().to_ndarray()

    def times(self, pts: Sequence[int | None]) -> np.ndarray | None:
        """Seconds from the first frame at which each is shown; None where the times are missing or do not rise."""
        if not pts or None in pts or self.stream.time_base is None:
            return None
        ticks = np.array([time - pts[0] for time in pts], dtype=np.float64)
        if (np.diff(ticks) <= 0).any():
            return None
        return ticks * self.stream.time_base.numerator / self.stream.time_base.denominator


@contextmanager
def open_video(source: Source, *, is_strict: bool = False) -> Iterator[OpenVideo]:
    """The best video stream of a file, decoding in one thread; closed on leaving.

    One thread per process: many processes decode at once, and skipping single packets is defined only without
    frame threads. `is_strict` makes an error of every fault that the decoder would pass over.
    """
    is_local = isinstance(source.media, LocalFile)
    # known formats alone: a playlist or concat script named clip.mp4 could make FFmpeg read other files or the network
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    with nullcontext(str(source.media.path)) if is_local else source.open() as file:
        try:
            container = av.open(file, container_options=options, metadata_errors="ignore")
        except av.error.FFmpegError as error:
            raise MediaError(f"not a video: {reason(error)}") from error
        with container:
            if container.format.name.endswith("_pipe"):
                raise MediaError("not a video: the file is a still image")
            # FFmpeg's choice, but the cover art of a song is no video
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise MediaError("file has no video stream")
            best = container.streams.best("video")
            stream = best if best in streams else streams[0]
            codec = stream.codec_context
            if codec is None:
                raise MediaError("not a video: the codec of its stream is unknown")
            codec.thread_type, codec.thread_count = "NONE", 1
            codec.options = {"max_pixels": str(MAX_PIXELS)}  # again inside: a stream may change its size midway
            if is_strict:
                codec.options |= {"err_detect": "explode"}
            check_pixels(codec.width, codec.height)
            yield OpenVideo(source, container, stream)


def check_pixels(width: int, height: int) -> None:
    """Refuse a picture too large to hold; called before any of it is decoded."""
    if width * height > MAX_PIXELS:
        raise MediaError(f"frames are larger than {MAX_PIXELS} pixels")


def reason(error: av.error.FFmpegError) -> str:
    """FFmpeg's message without the file's path, so that a reason is the same on every machine."""
    if isinstance(error, MemoryError):
        raise error
    return error.strerror or type(error).__name__


@dataclass(frozen=True)
class PacketIndex:
    """Every packet of the video stream, in decode order."""

    pts: tuple[int | None, ...]
    dts: tuple[int | None, ...]
    is_key: tuple[bool, ...]
    is_shown: tuple[bool, ...]  # False: hidden by an edit list, decoded only as a reference
    damage: str | None  # why reading stopped early or is not to be believed
    is_joined: bool = False  # a transport stream put together of whole ones: FFmpeg marks a packet at each join

    @cached_property
    def position(self) -> dict[int, int]:
        """Presentation time -> position in decode order."""
        return {time: i for i, time in enumerate(self.pts)}

    @cached_property
    def shown(self) -> list[int]:
        """Positions of the shown frames in presentation order: frame number -> position."""
        return sorted((i for i, shown in enumerate(self.is_shown) if shown), key=self.pts.__getitem__)

    def check_trust(self) -> None:
        """Raise where frames cannot be found by presentation time."""
        if None in self.pts or len(self.position) != len(self.pts):
            raise UntrustedIndexError("missing or repeated presentation times")
        if not self.is_key or not self.is_key[0]:
            raise UntrustedIndexError("stream does not begin with a keyframe")

    def segments(self, wanted: list[int]) -> list[tuple[int, int]]:
        """Stretches of packets (first, last) to decode for the wanted positions.

        Each begins with the last keyframe before a wanted position in decode order that is shown no later than it.
        """
        stretches: list[tuple[int, int]] = []
        for position in sorted(wanted):
            before = range(position, -1, -1)
            key = next((i for i in before if self.is_key[i] and self.pts[i] <= self.pts[position]), None)
            if key is None:
                raise UntrustedIndexError("frame is shown before the first keyframe")
            while stretches and key <= stretches[-1][1]:  # leading frames of an open group begin before its keyframe
                key = min(key, stretches.pop()[0])
            stretches.append((key, position))
        return stretches


def scan_packets(video: OpenVideo) -> PacketIndex:
    """Read every packet's times and flags, up to the end or to where the file breaks."""
    rows: list[tuple] = []
    marked: list[int] = []  # positions of packets that FFmpeg takes for corrupt
    damage = None
    try:
        for packet in video.packets():
            if packet.size == 0 and packet.dts is None:
                continue  # the mark for the end of the stream, not a packet of the file
            if packet.is_corrupt:
                marked.append(len(rows))
            rows.append((packet.pts, packet.dts, packet.is_keyframe, not packet.is_discard))
    except av.error.FFmpegError as error:
        damage = reason(error)
    pts, dts, is_key, is_shown = zip(*rows, strict=True) if rows else ((), (), (), ())
    is_joined = bool(marked) and damage is None and _are_joins(video, marked, is_key)
    if marked and not is_joined:
        damage = damage or "a packet is corrupt"
    return PacketIndex(pts, dts, is_key, is_shown, damage, is_joined)


def _are_joins(video: OpenVideo, marked: Sequence[int], is_key: Sequence[bool]) -> bool:
    """Whether every marked packet ends a whole transport stream that another one was joined to."""
    if video.container.format.name != "mpegts" or not all(any(is_key[i + 1 : i + 3]) for i in marked):
        return False  # a part begins with a keyframe; FFmpeg marks the last packet before it, or the one before that
    with video.source.open() as file:
        return (count_joins(file, video.stream.id) or 0) >= len(marked)


def _read_indexed(video: OpenVideo, index: PacketIndex, collector: FrameCollector) -> Reading:
    if not video.container.format.name.startswith(TRUSTED_FORMATS) or video.codec.name in UNTRUSTED_CODECS:
        raise UntrustedIndexError("times of this format are not reliable")
    index.check_trust()
    times = video.times([index.pts[i] for i in index.shown]) if collector.needs_times else None
    numbers = collector.choose(len(index.shown), video.fps, times)
    wanted = {index.shown[i]: i for i in numbers}  # position -> frame number
    for first, last in index.segments(list(wanted)):
        for frame in _decode_segment(video, index, first, last, wanted):
            number = wanted.get(index.position.get(frame.pts, -1))
            if number is not None and not frame.is_corrupt:
                collector.add(number, video.to_rgb(frame))
    if collector.missing():
        raise UntrustedIndexError("a frame did not come at its time")
    return Reading(num_frames=len(index.shown), fps=video.fps, decoder=INDEXED_NAME)


def _decode_segment(
    video: OpenVideo, index: PacketIndex, first: int, last: int, wanted: Container[int]
) -> Iterator[av.VideoFrame]:
    """Decode packets first..last; frames that no other frame refers to are skipped unless wanted (1.1-1.7x faster)."""
    for position, packet in zip(range(first, last + 1), _packets_from(video, index, first), strict=False):
        if index.position.get(packet.pts) != position:
            raise UntrustedIndexError("packets come in another order after a seek")
        video.codec.skip_frame = "DEFAULT" if position in wanted else "NONREF"
        yield from video.codec.decode(packet)
    yield from video.codec.decode(None)  # no more packets needed: what is held back for reordering comes out


def _packets_from(video: OpenVideo, index: PacketIndex, first: int) -> Iterator[av.Packet]:
    """Packets in decode order from `first` on; some formats seek by decode time, some by presentation time."""
    start = min(time for time in (*index.pts[:1], *index.dts[:1]) if time is not None)
    for target in (index.pts[first], index.dts[first], start):
        if target is None:
            continue
        video.container.seek(target, stream=video.stream, backward=True)  # also empties the decoder
        packets = video.packets()
        for packet in packets:
            position = index.position.get(packet.pts, -1)
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
        guess = sum(index.is_shown)
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
            if count in wanted:
                collector.add(count, video.to_rgb(frame))
        return len(pts), video.fps, video.times(pts)


def _read_damaged(source: Source, index: PacketIndex, collector: FrameCollector) -> Reading:
    """Take every wanted frame that decodes, and in place of each other one the nearest that does."""
    times = [time for time, shown in zip(index.pts, index.is_shown, strict=True) if shown]
    is_usable = None not in times and len(set(times)) == len(times)  # else frames are counted
    numbers = {time: number for number, time in enumerate(sorted(times))} if is_usable else {}
    with open_video(source) as video:
        fps = video.fps
        good = [number for number, frame in _numbered(video, numbers) if not frame.is_corrupt]
        shown_at = video.times(sorted(times)) if is_usable else None
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
    return Reading(num_frames=num_frames, fps=fps, decoder=f"{SEQUENTIAL_NAME}+damaged:{substituted}-substituted")


def _numbered(video: OpenVideo, numbers: dict[int, int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(frame number, frame) of all that can be decoded; a packet that cannot is passed over.

    `numbers` maps presentation times to frame numbers; where it is empty, frames are counted.
    """
    for count, frame in enumerate(_decodable_frames(video)):
        number = numbers.get(frame.pts, -1) if numbers else count
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

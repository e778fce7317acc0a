"""The default reader, "frames/1": the right frames, by presentation time, at the cost of the packets between.

One pass over the packets (no decoding) gives the presentation time of every frame shown. Sorted, these are the frame
numbers. Each wanted frame is decoded from the last keyframe shown at or before it, so the leading frames of an open
group of pictures are taken from the group before, where they decode; frames are matched by time, never by counting.
Frames nobody asked for are skipped inside the decoder where no other frame needs them (1.1-1.7 times faster).

Where the packets' times cannot be trusted, the file is decoded in order from its start instead (`in_order`). Both give
the same pixels, so which one ran is provenance, not identity.

Packets: what a file says of its frames before any is decoded.

Comes in: an open video. Goes out: a `PacketIndex`, every packet's times and flags in decode order, and the arithmetic
on it: which frame is number n, and from which keyframe it is decoded.

Decoding in order from the first packet: for files whose index cannot be trusted, and for damaged ones.

Frames are counted as they come out of the decoder. N is not known before the end, so the packets' number serves as a
guess; if it was wrong, a second pass takes the right frames. The tolerant path makes two passes always: one to see
which frames survive, one to take them.

Container: opening a video file through FFmpeg's libraries (PyAV), with the guards every reader needs.

Files are data from strangers. Only real media formats are opened: a playlist or a concat script named clip.mp4 could
otherwise make FFmpeg read other files or the network. Sizes are checked before anything is decoded.

Files that end before they say: a download or copy that broke off.

An MP4 that is cut off lacks samples that its tables name, and FFmpeg reports it. Matroska and AVI are read up to the
last byte and given as a shorter video, without a word; but both declare their length in the first bytes.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import av
import numpy as np
from av.stream import Disposition

from mervcache.errors import MediaError
from pipeline.decode.sampling import FrameCollector, Reading
from pipeline.media import LocalFile, Source

MAX_PIXELS = 1 << 26  # per frame or image, 8192 x 8192: 201 MB as RGB
FORMATS = (
    *("mov", "matroska", "avi", "flv", "mpegts", "mpeg", "mpegvideo", "asf", "ogg", "rm", "ivf", "nut", "mxf", "dv"),
    *("h264", "hevc", "vvc", "m4v", "h263", "obu", "av1", "mjpeg", "wtv", "ea", "bink", "smk", "swf", "mpegtsraw"),
    *("png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "gif_pipe", "mp3", "wav", "flac", "aac"),
)  # the last line is opened to be refused with a better reason


class OpenVideo:
    """An opened file: its container, the one video stream we read, and the conversion of that stream's frames."""

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream) -> None:
        self.container, self.stream, self.codec = container, stream, stream.codec_context
        self._graphs: dict[tuple, av.filter.Graph] = {}  # frame size and pixel format -> conversion

    @property
    def fps(self) -> float:
        """Average frames per second, as the reference's reader reports it; 0.0 if the file has no clock."""
        return float(self.stream.average_rate or self.stream.guessed_rate or 0)

    def packets(self) -> Iterator[av.Packet]:
        """The stream's packets from where the file stands, in decode order."""
        return self.container.demux(self.stream)

    def to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 [H, W, 3] as it is shown: converted by the frame's own colour tags, turned by its rotation.

        Through a filter graph, because its conversion is the one of the ffmpeg program and of decord to the bit;
        `frame.to_ndarray` chooses another chroma filter for 10-bit and odd-sized video.
        """
        check_pixels(frame.width, frame.height)
        key = (frame.width, frame.height, frame.format.name)
        graph = self._graphs.get(key) or self._graphs.setdefault(key, self._conversion(frame))
        graph.push(frame)
        frame_HWC = graph.pull().to_ndarray()
        if frame.rotation % 360 and frame.rotation % 90 == 0:
            frame_HWC = np.rot90(frame_HWC, k=frame.rotation // 90)
        return frame_HWC

    def _conversion(self, frame: av.VideoFrame) -> av.filter.Graph:
        graph = av.filter.Graph()
        graph.threads = 1
        size = {"width": frame.width, "height": frame.height}
        begin = graph.add_buffer(**size, format=frame.format, time_base=self.stream.time_base)
        graph.link_nodes(begin, graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")).configure()
        return graph


@contextmanager
def open_video(source: Source) -> Iterator[OpenVideo]:
    """The best video stream of a file, decoding in one thread; closed on leaving.

    One thread per process: many processes decode side by side, and skipping single packets is defined only without
    frame threads.
    """
    is_local = isinstance(source.media, LocalFile)
    with nullcontext(str(source.media.path)) if is_local else source.open() as file, _opened(file) as container:
        if container.format.name.endswith("_pipe"):
            raise MediaError("not a video: the file is a still image")
        stream = _best_video(container)
        codec = stream.codec_context
        codec.thread_type, codec.thread_count = "NONE", 1
        codec.options = {"max_pixels": str(MAX_PIXELS)}  # again inside: a stream may change its size midway
        check_pixels(codec.width, codec.height)
        yield OpenVideo(container, stream)


def _opened(file: str | BinaryIO) -> av.container.InputContainer:
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    try:
        return av.open(file, container_options=options, metadata_errors="ignore")
    except av.error.FFmpegError as error:
        raise MediaError(f"not a video: {reason(error)}") from error


def check_pixels(width: int, height: int) -> None:
    """Refuse a picture too large to hold; called before any of it is decoded."""
    if width * height > MAX_PIXELS:
        raise MediaError(f"frames are larger than {MAX_PIXELS} pixels")


def reason(error: av.error.FFmpegError) -> str:
    """FFmpeg's message without the file's path, so that a reason is the same on every machine."""
    if isinstance(error, MemoryError):
        raise error
    return error.strerror or type(error).__name__


def _best_video(container: av.container.InputContainer) -> av.VideoStream:
    """FFmpeg's choice among real video streams; cover art of a song is a video stream to FFmpeg, not to us."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise MediaError("file has no video stream")
    best = container.streams.best("video")
    return best if best in streams else streams[0]


class UntrustedIndexError(Exception):
    """The packets do not tell which frames are shown when; decode in order instead."""


@dataclass(frozen=True)
class PacketIndex:
    """Every packet of the video stream, in decode order."""

    pts: tuple[int | None, ...]
    dts: tuple[int | None, ...]
    is_key: tuple[bool, ...]
    is_shown: tuple[bool, ...]  # False: hidden by an edit list, decoded only as a reference
    damage: str | None  # why reading stopped early or is not to be believed

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
        """Stretches of packets (first, last) to decode for the wanted positions; each begins with a keyframe."""
        stretches: list[tuple[int, int]] = []
        for position in sorted(wanted):
            key = self._keyframe_for(position)
            while stretches and key <= stretches[-1][1]:  # leading frames of an open group begin before its keyframe
                key = min(key, stretches.pop()[0])
            stretches.append((key, position))
        return stretches

    def _keyframe_for(self, position: int) -> int:
        """The last keyframe before `position` in decode order that is shown no later than it."""
        for i in range(position, -1, -1):
            if self.is_key[i] and self.pts[i] <= self.pts[position]:
                return i
        raise UntrustedIndexError("frame is shown before the first keyframe")


def scan_packets(video: OpenVideo) -> PacketIndex:
    """Read every packet's times and flags, up to the end or to where the file breaks."""
    rows: list[tuple] = []
    damage = None
    try:
        for packet in video.packets():
            if packet.size == 0 and packet.dts is None:
                continue  # the mark for the end of the stream, not a packet of the file
            if packet.is_corrupt:
                damage = "a packet is corrupt"
            rows.append((packet.pts, packet.dts, packet.is_keyframe, not packet.is_discard))
    except av.error.FFmpegError as error:
        damage = reason(error)
    pts, dts, is_key, is_shown = zip(*rows, strict=True) if rows else ((), (), (), ())
    return PacketIndex(pts, dts, is_key, is_shown, damage)


SEQUENTIAL_NAME = "frames/1+sequential"
MAX_SUBSTITUTED = 0.5  # of the frames wanted; past that the clip is not what it says


def read_in_order(source: Source, index: PacketIndex, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
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
    return Reading(num_frames=count, fps=fps, decoder=SEQUENTIAL_NAME)


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
    return Reading(num_frames=num_frames, fps=fps, decoder=f"{SEQUENTIAL_NAME}+damaged:{substituted}-substituted")


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


EBML_ID, SEGMENT_ID = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
MAX_EBML_HEADER_BYTES = 4096  # real ones have 40; where the segment is not found behind it, nothing is claimed


def ends_early(file: BinaryIO) -> bool:
    """True where a Matroska, WebM or RIFF file declares more bytes than there are."""
    present = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(MAX_EBML_HEADER_BYTES)
    declared = {EBML_ID: _matroska_bytes, b"RIFF": _riff_bytes}.get(head[:4], lambda _: None)(head)
    return declared is not None and declared > present


def _matroska_bytes(head: bytes) -> int | None:
    """End of the segment that follows the EBML header; None if it was written live, without a size."""
    size, start = _ebml_size(head, len(EBML_ID))
    if size is None or head[start + size : start + size + 4] != SEGMENT_ID:
        return None
    segment, begin = _ebml_size(head, start + size + len(SEGMENT_ID))
    return None if segment is None else begin + segment


def _ebml_size(head: bytes, at: int) -> tuple[int | None, int]:
    """(size, where the content begins) of an EBML element; the leading zero bits of a size count its further bytes."""
    if at >= len(head) or head[at] == 0:
        return None, at
    length = 9 - head[at].bit_length()
    value = int.from_bytes(head[at : at + length]) & ((1 << 7 * length) - 1)
    unknown = value == (1 << 7 * length) - 1
    return (None if unknown else value), at + length


def _riff_bytes(head: bytes) -> int | None:
    """End of the first RIFF chunk; 0 and all ones are left by recorders that never closed the file."""
    size = int.from_bytes(head[4:8], "little")
    return None if size in (0, 0xFFFFFFFF) else 8 + size


INDEXED_NAME = "frames/1"
TRUSTED_FORMATS = ("mov,mp4", "matroska")  # AVI has no presentation times; TS and PS may start and jump anywhere
UNTRUSTED_CODECS = ("vp8",)  # its hidden frames have packets of their own


def read_frames(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    """Fill the collector with exact frames, by the index or in order."""
    with open_video(source) as video:
        index = scan_packets(video)
        if not accept_damaged:
            _refuse_damage(source, index)
        try:
            if not index.damage:
                return _read_indexed(video, index, collector)
        except (UntrustedIndexError, av.error.FFmpegError) as error:
            if isinstance(error, MemoryError):
                raise
            # in order it may still decode; if it does not, that error is the one to tell
    return read_in_order(source, index, collector, accept_damaged=accept_damaged)


def _refuse_damage(source: Source, index: PacketIndex) -> None:
    if index.damage:
        raise MediaError(f"damaged file: {index.damage}")
    with source.open() as file:
        if ends_early(file):
            raise MediaError("damaged file: it is shorter than it says")


def _read_indexed(video: OpenVideo, index: PacketIndex, collector: FrameCollector) -> Reading:
    if not video.container.format.name.startswith(TRUSTED_FORMATS) or video.codec.name in UNTRUSTED_CODECS:
        raise UntrustedIndexError("times of this format are not reliable")
    index.check_trust()
    wanted = {index.shown[i]: i for i in collector.choose(len(index.shown), video.fps)}  # position -> frame number
    for first, last in index.segments(list(wanted)):
        for frame in _decode_segment(video, index, range(first, last + 1), wanted):
            number = wanted.get(index.position.get(frame.pts, -1))
            if number is not None and not frame.is_corrupt:
                collector.add(number, video.to_rgb(frame))
    if collector.missing():
        raise UntrustedIndexError("a frame did not come at its time")
    return Reading(num_frames=len(index.shown), fps=video.fps, decoder=INDEXED_NAME)


def _decode_segment(video: OpenVideo, index: PacketIndex, stretch: range, wanted: dict) -> Iterator[av.VideoFrame]:
    """Decode one stretch of packets; frames no other frame refers to are skipped unless wanted."""
    packets = _packets_from(video, index, stretch.start)
    for position, packet in zip(stretch, packets, strict=False):
        if index.position.get(packet.pts) != position:
            raise UntrustedIndexError("packets come in another order after a seek")
        video.codec.skip_frame = "DEFAULT" if position in wanted else "NONREF"
        yield from video.codec.decode(packet)
    yield from video.codec.decode(None)  # no more packets needed: what is held back for reordering comes out


def _packets_from(video: OpenVideo, index: PacketIndex, first: int) -> Iterator[av.Packet]:
    """Packets in decode order from position `first` on; some formats seek by decode time, some by presentation time."""
    start = min(time for time in (*index.pts[:1], *index.dts[:1]) if time is not None)
    for target in (index.pts[first], index.dts[first], start):
        if target is None:
            continue
        video.container.seek(target, stream=video.stream, backward=True)  # also empties the decoder
        packets = video.packets()
        for packet in packets:
            position = index.position.get(packet.pts, -1)
            if position > first:
                break  # landed behind it: try the next way of naming the place
            if position == first:
                yield packet
                yield from packets
                return
    raise UntrustedIndexError("seeking does not reach a keyframe")

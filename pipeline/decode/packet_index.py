"""The default reader, "frames/1": the right frames, by presentation time, at the cost of the packets between.

One pass over the packets (no decoding) gives the presentation time of every frame shown. Sorted, these are the frame
numbers. Each wanted frame is decoded from the last keyframe shown at or before it, so the leading frames of an open
group of pictures are taken from the group before, where they decode; frames are matched by time, never by counting.
Frames nobody asked for are skipped inside the decoder where no other frame needs them (1.1-1.7 times faster).

Where the packets' times cannot be trusted, the file is decoded in order from its start instead (`in_order`). Both give
the same pixels, so which one ran is provenance, not identity.
"""

from __future__ import annotations

from collections.abc import Iterator

import av

from mervcache.errors import MediaError
from pipeline.decode import in_order
from pipeline.decode.collector import FrameCollector
from pipeline.decode.container import OpenVideo, open_video
from pipeline.decode.cut_short import ends_early
from pipeline.decode.job import Reading
from pipeline.decode.packets import PacketIndex, UntrustedIndexError, scan_packets
from pipeline.decode.source import Source

NAME = "frames/1"
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
    return in_order.read_frames(source, index, collector, accept_damaged=accept_damaged)


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
    return Reading(num_frames=len(index.shown), fps=video.fps, decoder=NAME)


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

"""How many seconds a video takes, from its tables, its last packets or its header: nothing is decoded."""

from __future__ import annotations

import av
from av.error import FFmpegError

from mervcache.errors import MediaError
from pipeline.decode.container import OpenVideo, open_video, reason
from pipeline.decode.packet_index import NO_TIME, PacketIndex, index_from_tables, read_moov, scan_packets
from pipeline.decode.sampling import NO_RATE
from pipeline.decode.stills import FOLDER_FPS
from pipeline.media import FrameFolder, Source


def length_s(source: Source) -> float:
    """Seconds from the first frame to the end of the last one; `MediaError` for what has no frame rate.

    Of MP4 and MOV from the tables, of Matroska from the packets at its end, of other formats as FFmpeg declares it.
    Only where that says nothing are all packets read.
    """
    if isinstance(source.media, FrameFolder):
        return len(source.media.paths) / FOLDER_FPS
    if source.head(4) == b"GIF8":
        raise MediaError(NO_RATE)
    with source.open() as file:
        moov = read_moov(file)
    try:
        with open_video(source) as video:
            if not video.fps > 0:
                raise MediaError(NO_RATE)
            index = index_from_tables(video, moov) if moov is not None else None
            if index is not None and (seconds := _of_index(video, index)) is not None:
                return seconds
            if (seconds := _of_last_packets(video) or _declared(video)) is not None:
                return seconds
        with open_video(source) as video:  # from its start
            if (seconds := _of_index(video, scan_packets(video))) is not None:
                return seconds
    except FFmpegError as error:
        raise MediaError(f"damaged file: {reason(error)}") from error
    raise MediaError(NO_RATE)


def _of_index(video: OpenVideo, index: PacketIndex) -> float | None:
    times = video.times(index.pts[index.shown]) if NO_TIME not in index.pts else None
    return None if times is None else float(times[-1]) + 1 / video.fps


def _of_last_packets(video: OpenVideo) -> float | None:
    """Of Matroska, whose declared duration is that of the longest stream, sound included."""
    stream, duration = video.stream, video.container.duration
    if "matroska" not in video.container.format.name or not duration or stream.time_base is None:
        return None
    start = stream.start_time or 0
    video.container.seek(duration + (video.container.start_time or 0), backward=True)
    last = max((packet.pts for packet in video.packets() if packet.pts is not None), default=None)
    return None if last is None else float((last - start) * stream.time_base) + 1 / video.fps


def _declared(video: OpenVideo) -> float | None:
    stream = video.stream
    if stream.duration and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return video.container.duration / av.time_base if video.container.duration else None

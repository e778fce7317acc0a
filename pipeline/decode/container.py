"""Container: opening a video file through FFmpeg's libraries (PyAV), with the guards every reader needs.

Files are data from strangers. Only real media formats are opened: a playlist or a concat script named clip.mp4 could
otherwise make FFmpeg read other files or the network. Sizes are checked before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import BinaryIO

import av
import numpy as np
from av.stream import Disposition

from mervcache.errors import MediaError
from pipeline.decode.source import Source
from pipeline.media import LocalFile

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

"""Open a video file with guards against hostile input, and convert its frames to RGB.

All video files are opened here, whatever the decoder: known formats only, one video stream, one decoding thread, a
limit on the size of a frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import av
import av.container
import av.error
import av.filter
import numpy as np
from av.stream import Disposition

from mervcache.errors import MediaError
from pipeline.decode.display import display_filters
from pipeline.media import LocalFile, Source

MAX_PIXELS = 1 << 26  # per frame or image, 8192 x 8192: 201 MB as RGB
FORMATS = (
    *("mov", "matroska", "avi", "flv", "mpegts", "mpeg", "mpegvideo", "asf", "ogg", "rm", "ivf", "nut", "mxf", "dv"),
    *("h264", "hevc", "vvc", "m4v", "h263", "obu", "av1", "mjpeg", "wtv", "ea", "bink", "smk", "swf", "mpegtsraw"),
    *("png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "gif_pipe", "mp3", "wav", "flac", "aac"),
)  # the last line is opened to be refused with a better reason


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
            buffer = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=self.stream.time_base
            )
            nodes = [graph.add(name, arguments or None) for name, arguments in filters]
            graph.link_nodes(buffer, *nodes, graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")).configure()
            self._graphs[key] = graph
        graph.push(frame)
        return graph.pull().to_ndarray()

    def times(self, pts: Sequence[int | None] | np.ndarray) -> np.ndarray | None:
        """Seconds from the first frame at which each is shown; None where the times are missing or do not rise."""
        if not len(pts) or (not isinstance(pts, np.ndarray) and None in pts) or self.stream.time_base is None:
            return None
        shown_at = np.asarray(pts, dtype=np.int64)
        ticks = (shown_at - shown_at[0]).astype(np.float64)
        if (np.diff(ticks) <= 0).any():
            return None
        return ticks * self.stream.time_base.numerator / self.stream.time_base.denominator


@contextmanager
def open_video(source: Source, *, is_strict: bool = False) -> Iterator[OpenVideo]:
    """The best video stream of a file, decoding in one thread; closed on leaving.

    One thread per process: many processes decode at once, and skipping single packets is defined only without
    frame threads. `is_strict` makes an error of every fault that the decoder would pass over.
    """
    media = source.media
    # known formats alone: a playlist or concat script named clip.mp4 could make FFmpeg read other files or the network
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    with nullcontext(str(media.path)) if isinstance(media, LocalFile) else source.open() as file:
        # FFmpeg has a buffer of its own: one of 1 MiB below it would be filled after every seek
        place = file if isinstance(file, str) else file.raw
        try:
            container = av.open(place, "r", container_options=options, metadata_errors="ignore")
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
            stream = best if isinstance(best, av.VideoStream) and best in streams else streams[0]
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

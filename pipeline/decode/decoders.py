"""The decoders by name, and `decode_clip`, which runs one on one job.

Every decoder fills a `FrameCollector` and says what it has read. None stands in for another: they count and convert
frames differently, so a silent fallback would make a store whose rows mean different things. Stills, GIFs and folders
of frames go through Pillow under every name, as in the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from mervcache.errors import MediaError, UserError, unknown_name
from pipeline.decode import stills
from pipeline.decode.collector import FrameCollector
from pipeline.decode.job import DEFAULT_DECODER, Decoded, DecodeJob, FailedClipError, Reading
from pipeline.decode.source import Source
from pipeline.media import FrameFolder

VideoReader = Callable[..., Reading]  # (source, collector, *, accept_damaged) -> Reading
OUT_OF_MEMORY = "decoding needs more memory than a decode process may use"


def _frames_1(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    from pipeline.decode import packet_index  # PyAV loads FFmpeg's libraries: only where video is decoded

    return packet_index.read_frames(source, collector, accept_damaged=accept_damaged)


def _decord(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    from pipeline.decode import decord_backend  # optional dependency

    return decord_backend.read_frames(source, collector, accept_damaged=accept_damaged)


def _ffmpeg(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    from pipeline.decode import ffmpeg_backend  # needs the ffmpeg and ffprobe programs

    return ffmpeg_backend.read_frames(source, collector, accept_damaged=accept_damaged)


DECODERS: dict[str, VideoReader] = {DEFAULT_DECODER: _frames_1, "decord": _decord, "ffmpeg": _ffmpeg}


def decode_clip(job: DecodeJob, *, on_read: Callable[[], None] = lambda: None) -> Decoded:
    """Decode one clip in this process; `on_read` is called once every byte has been read, before it is decoded.

    Raises `FailedClipError` (a `MediaError`) for the clip's own faults, `RunStoppedError` for the machine's,
    `UserError` for an unknown or missing decoder.
    """
    started = time.perf_counter()
    reader = _reader_for(job.decoder)
    source = Source.find(job.root, job.clip.path)
    media_sha256 = None
    try:
        media_sha256 = source.sha256()
        on_read()
        collector = FrameCollector(job)
        reading = _read(source, collector, job, reader)
        frames = collector.frames()
    except MemoryError as error:  # first: PyAV's is an OSError too
        raise FailedClipError(OUT_OF_MEMORY, media_sha256) from error
    except (MediaError, OSError) as error:
        reason = _clip_fault(error, source)
        raise FailedClipError(reason, media_sha256) from error
    return Decoded(
        frames=frames,
        media_sha256=media_sha256,
        decoder=reading.decoder,
        num_frames=reading.num_frames,
        fps=reading.fps,
        seconds=time.perf_counter() - started,
    )


def _reader_for(name: str) -> VideoReader:
    if name not in DECODERS:
        raise UserError(unknown_name("decoder", name, DECODERS))
    return DECODERS[name]


def _read(source: Source, collector: FrameCollector, job: DecodeJob, reader: VideoReader) -> Reading:
    """Choose by what the media is, not by its name's extension."""
    if job.clip.kind == "image":
        return stills.read_image(source, collector)
    if isinstance(source.media, FrameFolder):
        return stills.read_folder(source, collector)
    if source.head(4) == b"GIF8":
        return stills.read_gif(source, collector)
    return reader(source, collector, accept_damaged=job.accept_damaged)


def _clip_fault(error: MediaError | OSError, source: Source) -> str:
    """The reason to record, if the clip is at fault; raise `RunStoppedError` if the machine is.

    A disk or share that fails in the middle looks like a damaged file to a decoder, so the bytes are read once more.
    """
    try:
        source.find(source.root, source.path).read_through()
    except MediaError as missing:
        return str(missing)
    except OSError as unreadable:
        raise source.explain(unreadable) from error
    if isinstance(error, MediaError):
        return str(error)
    verdict = source.explain(error)
    if isinstance(verdict, MediaError):
        return str(verdict)
    raise verdict from error

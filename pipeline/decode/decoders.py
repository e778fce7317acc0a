"""The decoders by name, and `decode_clip`, which decodes one clip with one of them.

No decoder falls back to another: they count and convert frames differently, so one store would hold rows that mean
different things. Images, GIFs and folders of frames are read by Pillow under every name (`stills.py`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache
from typing import IO

import av
import av.error
import numpy as np

from mervcache.errors import MediaError, MervCacheError, UserError, unknown_name
from pipeline.decode.container import FORMATS, check_pixels, open_video, reason
from pipeline.decode.display import display_filters, flip_of_turned
from pipeline.decode.packet_index import NO_TIME, scan_packets
from pipeline.decode.pyav import read_frames
from pipeline.decode.sampling import (
    DEFAULT_DECODER,
    OUT_OF_MEMORY,
    Decoded,
    DecodeJob,
    FailedClipError,
    FrameCollector,
    Reading,
    exception_name,
)
from pipeline.decode.stills import read_folder, read_gif, read_image
from pipeline.media import FrameFolder, LocalFile, Source, TarMember

FFMPEG_FAILED = "ffmpeg cannot decode the file"
OLDEST_FFMPEG = (5, 1)

VideoReader = Callable[..., Reading]  # (source, collector, *, accept_damaged) -> Reading


def decode_clip(
    job: DecodeJob, *, on_read: Callable[[str], bool] = lambda sha256: True, on_wait: Callable[[], None] = lambda: None
) -> Decoded:
    """Decode one clip in this process; `on_read` is called once every byte has been read, before it is decoded.

    It gets the sha256 of the media and returns whether to decode them; if not, the result has no frames.
    `on_wait` is called every few seconds while there is no room in the spool for the media.
    Raises `FailedClipError` (a `MediaError`) for the clip's own faults, `RunStoppedError` for the machine's,
    `UserError` for an unknown or missing decoder.
    """
    started = time.perf_counter()
    if job.decoder not in DECODERS:
        raise UserError(unknown_name("decoder", job.decoder, DECODERS))
    with Source.find(job.root, job.clip.path).fetched(on_wait) as source:
        return _decode(job, source, on_read, started)


def _decode(job: DecodeJob, source: Source, on_read: Callable[[str], bool], started: float) -> Decoded:
    media_sha256 = None
    try:
        media_sha256 = source.sha256()
        if not on_read(media_sha256):
            seconds = time.perf_counter() - started
            return Decoded(frames={}, media_sha256=media_sha256, decoder="", num_frames=0, fps=0.0, seconds=seconds)
        collector = FrameCollector(job)
        if job.clip.kind == "image":  # by what the media is, not by its name's extension
            reading = read_image(source, collector)
        elif isinstance(source.media, FrameFolder):
            reading = read_folder(source, collector)
        elif source.head(4) == b"GIF8":
            reading = read_gif(source, collector)
        else:
            reading = DECODERS[job.decoder](source, collector, accept_damaged=job.accept_damaged)
        frames = collector.frames()
    except MemoryError as error:  # first: PyAV's is an OSError too
        raise FailedClipError(OUT_OF_MEMORY, media_sha256) from error
    except av.error.FFmpegError as error:  # before OSError: its numbers describe the file's content, not a disk
        fault = MediaError(f"damaged file: {reason(error)}")
        raise FailedClipError(_clip_fault(fault, source), media_sha256) from error
    except (MediaError, OSError) as error:
        raise FailedClipError(_clip_fault(error, source), media_sha256) from error
    except MervCacheError:
        raise
    except Exception as error:  # the libraries' exceptions have no common base
        fault = MediaError(f"decoder failed: {exception_name(error)}")
        raise FailedClipError(_clip_fault(fault, source), media_sha256) from error
    return Decoded(
        frames=frames,
        media_sha256=media_sha256,
        decoder=reading.decoder,
        num_frames=reading.num_frames,
        fps=reading.fps,
        seconds=time.perf_counter() - started,
    )


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


def read_with_decord(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    """Read with decord, for parity with published work; tested with the maintained fork (decord2, same import).

    decord counts hidden pre-roll frames of cut clips and returns wrong frames, without an error, for HEVC and MPEG-4
    with B-frames, open groups of pictures, AVI, TS and PS; on some files it never returns.
    """
    try:
        import decord  # optional: 73 MB with its own FFmpeg
    except ImportError as error:
        raise UserError("decoder 'decord' is not installed; pip install 'merv-pipeline[decord]'") from error
    if accept_damaged:
        raise UserError("decoder 'decord' cannot accept damaged files; use --decoder frames/1")
    with open_video(source) as video:  # the guards too: a real video format, of a size that can be held
        first_frame = None
        with suppress(av.error.FFmpegError):  # what cannot be decoded is left to decord
            first_frame = next(video.container.decode(video.stream), None)
        flip = -1 if first_frame is None else flip_of_turned(display_filters(first_frame))
    if flip is None:
        raise MediaError("decord cannot show the display matrix of the file: it turns by quarters only")
    decord.logging.set_level(decord.logging.QUIET)
    decord.bridge.set_bridge("native")
    media = source.media
    try:
        # a file object is read whole
        with nullcontext(str(media.path)) if isinstance(media, LocalFile) else source.open() as file:
            reader = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)
        fps, num_frames, times = float(reader.get_avg_fps()), len(reader), None
        if collector.needs_times and num_frames:
            times = _rising(reader.get_frame_timestamp(range(num_frames))[:, 0])
        for number in collector.choose(num_frames, fps, times):
            # get_batch, as in the reference: `reader[number]` seeks anew each time and can give other frames
            frame_HWC = reader.get_batch([number]).asnumpy()[0]
            collector.add(number, frame_HWC if flip < 0 else np.flip(frame_HWC, flip))
    except (MervCacheError, MemoryError, OSError):
        raise
    except Exception as error:  # DECORDError, RuntimeError, IndexError and what else its bindings raise
        raise MediaError("decord cannot decode the file") from error
    return Reading(num_frames=num_frames, fps=fps, decoder="decord")


def _rising(times: np.ndarray) -> np.ndarray | None:
    """Seconds from the first frame; None where they do not rise."""
    return times - times[0] if (np.diff(times) > 0).all() else None


def read_with_ffmpeg(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    """Read with the installed ffmpeg program: the slowest reader, and an independent check with its own FFmpeg build.

    Two runs, each decoding the whole file: one counts the frames shown, one writes the wanted ones to a pipe as PPM.
    Rotation and colour conversion are the program's.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        raise UserError("decoder 'ffmpeg' needs the ffmpeg program on the PATH; install it, or use --decoder frames/1")
    _check_ffmpeg_version(program)
    if accept_damaged:
        raise UserError("decoder 'ffmpeg' cannot accept damaged files; use --decoder frames/1")
    with open_video(source) as video:
        fps, stream_index = video.fps, video.stream.index
        index = scan_packets(video)
        times = video.times(index.pts[index.shown].tolist()) if NO_TIME not in index.pts else None
    media = source.media
    assert isinstance(media, LocalFile | TarMember)  # frames of a folder are read as pictures, a URL is fetched first
    if isinstance(media, TarMember):
        url = f"subfile,,start,{media.offset},end,{media.offset + media.size},,:{media.tar_path}"
    else:
        url = f"file:{media.path}"
    # one decoder thread, errors that end the run, known formats only, no reading beyond the file
    guards = ["-protocol_whitelist", "file,subfile", "-format_whitelist", ",".join(FORMATS)]
    # -xerror also ends at the marks of joined transport streams, where every frame is whole
    strict = ["-err_detect", "explode", "-max_error_rate", "0"] if index.is_joined else ["-xerror"]
    command = [program, "-nostdin", "-v", "error", *strict, "-threads", "1", *guards, "-i", url]
    command += ["-map", f"0:{stream_index}", "-fps_mode", "passthrough"]

    counting = subprocess.run([*command, "-progress", "pipe:1", "-f", "null", "-"], capture_output=True, check=False)
    counts = [line.partition("=")[2] for line in counting.stdout.decode().splitlines() if line.startswith("frame=")]
    if counting.returncode or not counts or not counts[-1].isdigit():
        raise MediaError(FFMPEG_FAILED)
    num_frames = int(counts[-1])

    times = times if times is not None and len(times) == num_frames else None
    wanted = collector.choose(num_frames, fps, times if collector.needs_times else None)
    command += ["-vf", "select='" + "+".join(f"eq(n,{number})" for number in wanted) + "'"]
    command += ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            for number in wanted:
                if (frame_HWC := _read_ppm(process.stdout)) is None:
                    raise MediaError(FFMPEG_FAILED)
                collector.add(number, frame_HWC)
        finally:
            process.kill()
    return Reading(num_frames=num_frames, fps=fps, decoder="ffmpeg")


@cache
def _check_ffmpeg_version(program: str) -> None:
    """`-fps_mode` came with FFmpeg 5.1; an older program would refuse every file, and each would look damaged."""
    output = subprocess.run([program, "-version"], capture_output=True, text=True, check=False).stdout
    match = re.match(r"ffmpeg version n?(\d+)\.(\d+)", output)  # a build from the newest sources has no number
    if match and (int(match[1]), int(match[2])) < OLDEST_FFMPEG:
        raise UserError(
            f"decoder 'ffmpeg' needs FFmpeg {OLDEST_FFMPEG[0]}.{OLDEST_FFMPEG[1]} or newer, {program} is "
            f"{match[1]}.{match[2]}; install a newer one, or use --decoder frames/1"
        )


def _read_ppm(pipe: IO[bytes]) -> np.ndarray | None:
    """One binary PPM, uint8 [H, W, 3]; None at the end. Header: "P6", width, height, 255, separated by whitespace."""
    header: list[bytes] = []
    while len(header) < 4:
        line = pipe.readline()
        if not line:
            return None
        header += line.split()
    if not (header[1].isdigit() and header[2].isdigit()):
        return None
    width, height = int(header[1]), int(header[2])
    check_pixels(width, height)
    data = pipe.read(width * height * 3)
    return np.frombuffer(data, np.uint8).reshape(height, width, 3) if len(data) == width * height * 3 else None


DECODERS: dict[str, VideoReader] = {
    DEFAULT_DECODER: read_frames,
    "decord": read_with_decord,
    "ffmpeg": read_with_ffmpeg,
}

"""The decoders by name, and `decode_clip`, which runs one on one job.

Every decoder fills a `FrameCollector` and says what it has read. None stands in for another: they count and convert
frames differently, so a silent fallback would make a store whose rows mean different things. Stills, GIFs and folders
of frames go through Pillow under every name, as in the reference.

Stills and what is made of them: images, GIFs and folders of frames, all through Pillow.

As in the public reference code (princetonvisualai/merv), an image is `Image.open(path).convert("RGB")`: an EXIF
orientation is **not** applied, transparency is dropped, an animation gives its first frame. A GIF as a video is all its
frames, without a clock; a folder is its images in natural order at 3 frames per second (as for VLEP).

The reader "decord": for parity with published work, by name only.

decord counts hidden pre-roll frames of cut clips and returns wrong frames, without an error, for HEVC and MPEG-4 with
B-frames, open groups of pictures, AVI, TS and PS; on some files it never returns. The maintained fork (decord2, same
import) is what is tested. Indices, resizing and everything after are those of every other reader.

The reader "ffmpeg": the installed ffmpeg program, by name only.

Two runs, each decoding the whole file: one counts the frames shown, one writes the wanted ones to a pipe as PPM, which
carries its own size. Rotation and colour conversion are the program's. It is the slowest reader and an independent
witness: its own build of FFmpeg, in a process of its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from mervcache.errors import MediaError, UserError, unknown_name
from pipeline.decode.pyav import FORMATS, check_pixels, open_video
from pipeline.decode.sampling import DEFAULT_DECODER, Decoded, DecodeJob, FailedClipError, FrameCollector, Reading
from pipeline.media import FrameFolder, LocalFile, Source, TarMember, frame_order

STILLS_NAME = "pillow"
FOLDER_FPS = 3.0
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's others include scripts (EPS)


def read_image(source: Source, collector: FrameCollector) -> Reading:
    """One still image: N = 1, no clock."""
    if isinstance(source.media, FrameFolder):
        raise MediaError("not an image: the path is a folder")
    collector.choose(1, 0.0)
    with source.open() as file, _opened(file) as image:
        collector.add(0, _to_rgb(image))
    return Reading(num_frames=1, fps=0.0, decoder=STILLS_NAME)


def read_gif(source: Source, collector: FrameCollector) -> Reading:
    """Every frame of a GIF, composed as it is shown; frames depend on those before, so they are read in order."""
    with source.open() as file, _opened(file) as image:
        num_frames = image.n_frames
        wanted = collector.choose(num_frames, 0.0)
        for number in wanted:
            image.seek(number)
            collector.add(number, _to_rgb(image))
    return Reading(num_frames=num_frames, fps=0.0, decoder=STILLS_NAME)


def read_folder(source: Source, collector: FrameCollector) -> Reading:
    """A folder's images in natural order: frame_2 before frame_10."""
    paths = sorted(source.media.paths, key=lambda path: frame_order(path.name))
    for number in collector.choose(len(paths), FOLDER_FPS):
        with open(paths[number], "rb") as file, _opened(file) as image:
            collector.add(number, _to_rgb(image))
    return Reading(num_frames=len(paths), fps=FOLDER_FPS, decoder=STILLS_NAME)


@contextmanager
def _opened(file: BinaryIO) -> Iterator[Image.Image]:
    """An image whose size has been checked; anything Pillow cannot read becomes the clip's error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning and notes on odd files: ours is an error
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                check_pixels(*image.size)
                yield image
    except UnidentifiedImageError:
        raise MediaError("not an image in a known format") from None
    except Image.DecompressionBombError:
        raise MediaError("image is larger than Pillow's limit") from None
    except (SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, OverflowError) as error:
        raise MediaError(f"damaged image: {type(error).__name__}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise MediaError("damaged image: its data cannot be read") from error


def _to_rgb(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB"))


DECORD_NAME = "decord"


def read_with_decord(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    """Fill the collector with the frames that decord gives for the wanted indices."""
    try:
        import decord  # optional: 73 MB with its own FFmpeg
    except ImportError as error:
        raise UserError("decoder 'decord' is not installed; pip install 'merv-pipeline[decord]'") from error
    if accept_damaged:
        raise UserError("decoder 'decord' cannot accept damaged files; use --decoder frames/1")
    with open_video(source):
        pass  # the guards: a real video format, of a size that can be held
    decord.logging.set_level(decord.logging.QUIET)
    decord.bridge.set_bridge("native")
    is_local = isinstance(source.media, LocalFile)
    try:
        with nullcontext(str(source.media.path)) if is_local else source.open() as file:  # a file object is read whole
            reader = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)
        fps = float(reader.get_avg_fps())
        for number in collector.choose(len(reader), fps):
            # get_batch, as in the reference: `reader[number]` seeks anew each time and can give other frames
            collector.add(number, reader.get_batch([number]).asnumpy()[0])
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise MediaError("decord cannot decode the file") from error
    return Reading(num_frames=len(reader), fps=fps, decoder=DECORD_NAME)


FFMPEG_NAME = "ffmpeg"
FAILED = "ffmpeg cannot decode the file"
OLDEST = (5, 1)


def read_with_ffmpeg(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    """Fill the collector with the frames the program writes."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise UserError("decoder 'ffmpeg' needs the ffmpeg program on the PATH; install it, or use --decoder frames/1")
    _check_version(program)
    if accept_damaged:
        raise UserError("decoder 'ffmpeg' cannot accept damaged files; use --decoder frames/1")
    with open_video(source) as video:
        fps, stream_index = video.fps, video.stream.index
    command = [program, *_input_arguments(source), "-map", f"0:{stream_index}", "-fps_mode", "passthrough"]
    num_frames = _count_frames(command)
    wanted = collector.choose(num_frames, fps)
    for number, frame_HWC in zip(wanted, _selected_frames(command, wanted), strict=False):
        collector.add(number, frame_HWC)
    if collector.missing():
        raise MediaError(FAILED)
    return Reading(num_frames=num_frames, fps=fps, decoder=FFMPEG_NAME)


@cache
def _check_version(program: str) -> None:
    """`-fps_mode` came with FFmpeg 5.1; an older program would refuse every file, and each would look damaged."""
    told = subprocess.run([program, "-version"], capture_output=True, text=True, check=False).stdout
    found = re.match(r"ffmpeg version n?(\d+)\.(\d+)", told)  # a build from the sources' newest state has no number
    if found and (int(found[1]), int(found[2])) < OLDEST:
        raise UserError(
            f"decoder 'ffmpeg' needs FFmpeg {OLDEST[0]}.{OLDEST[1]} or newer, {program} is {found[1]}.{found[2]}; "
            "install a newer one, or use --decoder frames/1"
        )


def _input_arguments(source: Source) -> list[str]:
    """Options for one decoder thread, errors that end the run, known formats only, and no reading beyond the file."""
    media = source.media
    url = (
        f"file:{media.path}"
        if not isinstance(media, TarMember)
        else (f"subfile,,start,{media.offset},end,{media.offset + media.size},,:{media.tar_path}")
    )
    guards = ["-protocol_whitelist", "file,subfile", "-format_whitelist", ",".join(FORMATS)]
    return ["-nostdin", "-v", "error", "-xerror", "-threads", "1", *guards, "-i", url]


def _count_frames(command: list[str]) -> int:
    """Frames shown, by decoding all of them."""
    done = subprocess.run([*command, "-progress", "pipe:1", "-f", "null", "-"], capture_output=True, check=False)
    counts = [line.partition("=")[2] for line in done.stdout.decode().splitlines() if line.startswith("frame=")]
    if done.returncode or not counts:
        raise MediaError(FAILED)
    return int(counts[-1])


def _selected_frames(command: list[str], wanted: list[int]) -> Iterator[np.ndarray]:
    """RGB frames, uint8 [H, W, 3], in ascending order of their numbers."""
    chosen = "select='" + "+".join(f"eq(n,{number})" for number in wanted) + "'"
    arguments = [*command, "-vf", chosen, "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            while (frame_HWC := _read_ppm(process.stdout)) is not None:
                yield frame_HWC
        finally:
            process.kill()


def _read_ppm(pipe: BinaryIO) -> np.ndarray | None:
    """One binary PPM: "P6", width, height, 255, each on a line or beside its neighbour, then the pixels."""
    header: list[bytes] = []
    while len(header) < 4:
        line = pipe.readline()
        if not line:
            return None
        header += line.split()
    width, height = int(header[1]), int(header[2])
    check_pixels(width, height)
    data = pipe.read(width * height * 3)
    return np.frombuffer(data, np.uint8).reshape(height, width, 3) if len(data) == width * height * 3 else None


VideoReader = Callable[..., Reading]  # (source, collector, *, accept_damaged) -> Reading
OUT_OF_MEMORY = "decoding needs more memory than a decode process may use"


def _frames_1(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    from pipeline.decode import pyav  # PyAV loads FFmpeg's libraries: only where video is decoded

    return pyav.read_frames(source, collector, accept_damaged=accept_damaged)


def _decord(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    return read_with_decord(source, collector, accept_damaged=accept_damaged)


def _ffmpeg(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
    return read_with_ffmpeg(source, collector, accept_damaged=accept_damaged)


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
        return read_image(source, collector)
    if isinstance(source.media, FrameFolder):
        return read_folder(source, collector)
    if source.head(4) == b"GIF8":
        return read_gif(source, collector)
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

"""The reader "ffmpeg": the installed ffmpeg program, by name only.

Two runs, each decoding the whole file: one counts the frames shown, one writes the wanted ones to a pipe as PPM, which
carries its own size. Rotation and colour conversion are the program's. It is the slowest reader and an independent
witness: its own build of FFmpeg, in a process of its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from typing import BinaryIO

import numpy as np

from mervcache.errors import MediaError, UserError
from pipeline.decode.collector import FrameCollector
from pipeline.decode.container import FORMATS, check_pixels, open_video
from pipeline.decode.job import Reading
from pipeline.decode.source import Source
from pipeline.media import TarMember

NAME = "ffmpeg"
FAILED = "ffmpeg cannot decode the file"
OLDEST = (5, 1)


def read_frames(source: Source, collector: FrameCollector, *, accept_damaged: bool) -> Reading:
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
    return Reading(num_frames=num_frames, fps=fps, decoder=NAME)


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

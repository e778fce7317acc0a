"""Display matrices: every decoder shows what the ffmpeg program shows."""

from __future__ import annotations

import math
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mervcache.errors import MediaError
from pipeline.decode.decoders import decode_clip
from pipeline.views import ResizeRule, View

VIEW = View(rule=ResizeRule(size=48), num_frames=8)
FRAMES = 12
SEEN = np.linspace(0, FRAMES - 1, 32, dtype=int)[::4]
QUARTERS = {  # the first two rows of the matrix, without translation
    "as stored": (1, 0, 0, 1),
    "90": (0, 1, -1, 0),
    "180": (-1, 0, 0, -1),
    "270": (0, -1, 1, 0),
    "mirrored across": (-1, 0, 0, 1),
    "mirrored down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed the other way": (0, -1, -1, 0),
}


def turned(degrees: float, *, mirror: bool = False) -> tuple[float, float, float, float]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return (-cos, sin, sin, cos) if mirror else (cos, sin, -sin, cos)


OTHERS = {
    "scaled": (2, 0, 0, 0.5),
    "without an angle": (0, 0, 0, 0),
    "sheared down": (1, 0, 0.3, 1),
    "sheared across": (1, 0.3, 0, 1),
    "mirrored and sheared": (-1, 0, 0.3, 1),
    **{
        f"{degrees} degrees": turned(degrees)
        for degrees in (0.6, 1.6, 10, 45, 89, 89.6, 91, 135, 180.4, 200, 269.4, 300)
    },
    **{f"{degrees} degrees, mirrored": turned(degrees, mirror=True) for degrees in (10, 100)},
}
NEAR_A_QUARTER = ("scaled", "without an angle", "sheared down", "mirrored and sheared")
NEAR_A_QUARTER += ("0.6 degrees", "89.6 degrees", "180.4 degrees")


@pytest.fixture(scope="module")
def ffmpeg() -> str:
    program = shutil.which("ffmpeg")
    if program is None:
        pytest.skip("expected frames are those of the ffmpeg program, which is not installed")
    return program


@pytest.fixture(scope="module")
def film(shared_studio):
    def make(name: str, matrix: tuple, pixels: str = "yuv420p") -> Path:
        plain = shared_studio.folder / f"{pixels}.mp4"
        if not plain.exists():
            source = "testsrc2=size=192x128:rate=25"  # colours and shapes that no turn maps to themselves
            making = f"ffmpeg -v error -f lavfi -i {source} -frames:v {FRAMES} -c:v libx264 -pix_fmt {pixels}"
            subprocess.run([*making.split(), str(plain)], check=True)
        a, b, c, d = (round(value * 65536) for value in matrix)
        data = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        return shared_studio.patched(plain, f"{pixels} {name}.mp4", b"tkhd", 40, data)

    return make


def shown(ffmpeg: str, path: Path) -> np.ndarray:
    """The view's frames, from the program's own output."""
    writing = "-fps_mode passthrough -f image2pipe -c:v ppm -pix_fmt rgb24 -"
    command = [ffmpeg, "-v", "error", "-i", str(path), *writing.split()]
    done = subprocess.run(command, capture_output=True, check=True)
    frames, data = [], done.stdout
    while data:
        _, size, _, rest = data.split(b"\n", 3)
        width, height = map(int, size.split())
        frames.append(np.frombuffer(rest[: width * height * 3], np.uint8).reshape(height, width, 3))
        data = rest[width * height * 3 :]
    assert len(frames) == FRAMES
    return np.stack([np.asarray(Image.fromarray(frames[i]).resize((48, 48), Image.Resampling.BICUBIC)) for i in SEEN])


def decoded(studio, path: Path, decoder: str) -> np.ndarray:
    return decode_clip(studio.job(path, views=(VIEW,), decoder=decoder)).frames[VIEW]


@pytest.mark.parametrize("name", QUARTERS)
@pytest.mark.parametrize("decoder", ["frames/1", "decord", "ffmpeg"])
def test_turns_and_mirrors_are_shown_as_by_ffmpeg(name, decoder, film, ffmpeg, shared_studio) -> None:
    path = film(name, QUARTERS[name])
    assert np.array_equal(decoded(shared_studio, path, decoder), shown(ffmpeg, path))


@pytest.mark.parametrize("name", QUARTERS)
def test_ten_bit_video_is_turned_before_its_colours_are_converted(name, film, ffmpeg, shared_studio) -> None:
    path = film(name, QUARTERS[name], "yuv420p10le")
    assert np.array_equal(decoded(shared_studio, path, "frames/1"), shown(ffmpeg, path))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("decoder", ["frames/1", "ffmpeg"])
def test_any_other_matrix_is_shown_as_by_ffmpeg(name, decoder, film, ffmpeg, shared_studio) -> None:
    path = film(name, OTHERS[name])
    assert np.array_equal(decoded(shared_studio, path, decoder), shown(ffmpeg, path))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_decord_shows_it_too_near_a_quarter_turn_and_refuses_it_elsewhere(name, film, ffmpeg, shared_studio) -> None:
    path = film(name, OTHERS[name])
    if name in NEAR_A_QUARTER:
        assert np.array_equal(decoded(shared_studio, path, "decord"), shown(ffmpeg, path))
    else:
        with pytest.raises(MediaError, match="decord cannot show the display matrix"):
            decoded(shared_studio, path, "decord")


def test_the_eight_turns_differ_from_each_other(film, shared_studio) -> None:
    frames = [decoded(shared_studio, film(name, QUARTERS[name]), "frames/1") for name in QUARTERS]
    assert len({array.tobytes() for array in frames}) == 8

"""Render the reference clips and write them to pipeline/reference_clips.tar.xz.

The archive is what ships: stores name its files by digest. Pictures are whole-number arithmetic and the containers are
written here (raw I420 frames in an AVI, a PPM), so every machine renders the same bytes. The clips show moving shapes,
a text that counts, and noise, to which every resize filter is sensitive.
"""

from __future__ import annotations

import io
import lzma
import struct
import tarfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import click
import numpy as np

WIDTH, HEIGHT = 320, 240  # larger than an encoder's input, and not square: a crop and a shrinking filter have work
NUM_FRAMES, FPS = 36, 15  # more than the 32 that are sampled, so that choosing is not taking all
DRIFT = 4  # pixels per frame
_FONT = {  # 5 x 7 pixels, a row in five bits
    "M": (17, 27, 21, 21, 17, 17, 17),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "R": (30, 17, 17, 30, 20, 18, 17),
    "V": (17, 17, 17, 17, 17, 10, 4),
    "0": (14, 17, 19, 21, 25, 17, 14),
    "1": (4, 12, 4, 4, 4, 4, 14),
    "2": (14, 17, 1, 2, 4, 8, 31),
    "3": (31, 2, 4, 2, 1, 17, 14),
    "4": (2, 6, 10, 18, 31, 2, 2),
    "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14),
    "7": (31, 1, 2, 4, 8, 8, 8),
    "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12),
}


def scene(number: int) -> np.ndarray:
    """Frame `number` of a disc and a square that cross over a gradient, under a text that counts: uint8 [H, W, 3]."""
    y, x = np.ogrid[0:HEIGHT, 0:WIDTH]
    picture = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    picture[..., 0], picture[..., 1], picture[..., 2] = x * 3 // 5, y * 4 // 5, (x + y + 4 * number) % 256
    picture[(x - 40 - 6 * number) ** 2 + (y - 90) ** 2 <= 38**2] = (235, 60, 40)
    picture[(abs(x - 280 + 6 * number) <= 30) & (abs(y - 150) <= 30)] = (30, 70, 225)
    for place, letter in enumerate(f"MERV {number:02d}"):
        _write(picture, letter, left=20 + 42 * place, top=190)
    return picture


def noise(number: int) -> np.ndarray:
    """Frame `number` of a coloured texture of whole-number noise that drifts to the left: uint8 [H, W, 3]."""
    return _texture()[:, DRIFT * number : DRIFT * number + WIDTH]


@lru_cache(1)
def _texture() -> np.ndarray:
    """Every 3 x 3 pixels of one colour, by a hash of their place modulo 2**32."""
    width = WIDTH + DRIFT * NUM_FRAMES
    y, x, channel = np.ogrid[0 : HEIGHT // 3, 0 : width // 3 + 1, 0:3]
    places = (x * 374761393 + y * 668265263 + channel * 2246822519) % 2**32
    mixed = (places ^ places >> 13) * 1274126177 % 2**32
    return (mixed >> 24).astype(np.uint8).repeat(3, axis=0).repeat(3, axis=1)[:, :width]


def still() -> np.ndarray:
    """The scene on the left and the noise on the right: uint8 [H, W, 3]."""
    return np.concatenate([scene(22)[:, : WIDTH // 2], noise(22)[:, : WIDTH // 2]], axis=1)


def _write(picture: np.ndarray, letter: str, *, left: int, top: int, scale: int = 5) -> None:
    for row, bits in enumerate(_FONT.get(letter, ())):
        for column in range(5):
            if bits >> (4 - column) & 1:
                y, x = top + row * scale, left + column * scale
                picture[y : y + scale, x : x + scale] = (250, 250, 240)


def files() -> dict[str, bytes]:
    """The three media files by name."""
    return {
        "scene.avi": avi((scene(number) for number in range(NUM_FRAMES)), width=WIDTH, height=HEIGHT, fps=FPS),
        "noise.avi": avi((noise(number) for number in range(NUM_FRAMES)), width=WIDTH, height=HEIGHT, fps=FPS),
        "still.ppm": ppm(still()),
    }


def ppm(picture_HWC: np.ndarray) -> bytes:
    """A binary PPM of uint8 [H, W, 3]."""
    height, width = picture_HWC.shape[:2]
    return f"P6\n{width} {height}\n255\n".encode() + picture_HWC.tobytes()


def avi(pictures_HWC: Iterable[np.ndarray], *, width: int, height: int, fps: int) -> bytes:
    """An AVI of raw I420 frames with an index (AVI RIFF File Reference, Microsoft)."""
    frames = [i420(picture) for picture in pictures_HWC]
    size = width * height * 3 // 2
    main = struct.pack("<14I", 1_000_000 // fps, size * fps, 0, 0x10, len(frames), 0, 1, size, width, height, *[0] * 4)
    stream = b"vidsI420" + struct.pack(
        "<IHHIIIIIIII4H", 0, 0, 0, 0, 1, fps, 0, len(frames), size, 0, 0, 0, 0, width, height
    )
    picture = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 12, b"I420", size, 0, 0, 0, 0)
    header = _list(b"hdrl", _chunk(b"avih", main), _list(b"strl", _chunk(b"strh", stream), _chunk(b"strf", picture)))
    index = b"".join(
        struct.pack("<4sIII", b"00db", 0x10, 4 + number * (size + 8), size) for number in range(len(frames))
    )
    movie = _list(b"movi", *(_chunk(b"00db", frame) for frame in frames))
    return _chunk(b"RIFF", b"AVI " + header + movie + _chunk(b"idx1", index))


def i420(picture_HWC: np.ndarray) -> bytes:
    """uint8 RGB of even sides -> planes Y, U, V in limited range, ITU-R BT.601 in whole numbers, U and V halved."""
    red, green, blue = (picture_HWC[..., channel].astype(np.int32) for channel in range(3))
    luma = (66 * red + 129 * green + 25 * blue + 128 >> 8) + 16
    blueness = (-38 * red - 74 * green + 112 * blue + 128 >> 8) + 128
    redness = (112 * red - 94 * green - 18 * blue + 128 >> 8) + 128
    return b"".join(plane.astype(np.uint8).tobytes() for plane in (luma, _halved(blueness), _halved(redness)))


def _halved(plane: np.ndarray) -> np.ndarray:
    """Mean of each 2 x 2 pixels, rounded."""
    return (plane[::2, ::2] + plane[1::2, ::2] + plane[::2, 1::2] + plane[1::2, 1::2] + 2) >> 2


def _list(name: bytes, *chunks: bytes) -> bytes:
    return _chunk(b"LIST", name + b"".join(chunks))


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


@click.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).resolve().parents[1] / "pipeline" / "reference_clips.tar.xz",
    help="Archive to write.",
)
def main(out: Path) -> None:
    """Render the reference clips into an archive."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files().items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    out.write_bytes(lzma.compress(archive.getvalue(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main()

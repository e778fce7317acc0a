"""Media files written by hand: raw pictures in the plainest containers that decoders read.

No encoder and no library takes part, so that the same pictures are the same bytes on every machine.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np


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

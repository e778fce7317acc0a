"""The display matrix of a video: which filters show its frames as the ffmpeg program does.

A track's 3 x 3 matrix turns and mirrors its frames: phones write 90, 180 and 270 degrees, front cameras mirror. The
rules are those of `configure_input_video_filter` in FFmpeg's fftools, tested against the program: the four turns, the
four mirrored ones, and for any other angle the `rotate` filter, which keeps the frame's size and fills corners with
black. Scale and translation are ignored.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, cast

import av
from av.sidedata.sidedata import Type

MATRIX = struct.Struct("=9i")  # 16.16 fixed point, row by row, native byte order
NEAR = 1.0  # degrees around a quarter turn that count as one
Filters = tuple[tuple[str, str], ...]  # name and arguments, in order

UNTURNED: Filters = ()


def display_filters(frame: av.VideoFrame) -> Filters:
    """The filters that show the frame; none where it is shown as it is stored."""
    side_data = cast("Mapping[Any, Any]", frame.side_data)  # its stub knows no keys but text
    data = side_data.get(Type.DISPLAYMATRIX) if len(side_data) else None
    return UNTURNED if data is None else matrix_filters(MATRIX.unpack(bytes(data)[: MATRIX.size]))


def matrix_filters(matrix: tuple[int, ...]) -> Filters:
    """The filters of a display matrix, 9 numbers row by row."""
    theta = _degrees(matrix)
    if abs(theta - 90) < NEAR:
        return (("transpose", "cclock_flip" if matrix[3] > 0 else "clock"),)
    if abs(theta - 180) < NEAR:
        mirrored = (matrix[0] < 0, "hflip"), (matrix[4] < 0, "vflip")
        return tuple((name, "") for is_mirrored, name in mirrored if is_mirrored)
    if abs(theta - 270) < NEAR:
        return (("transpose", "clock_flip" if matrix[3] < 0 else "cclock"),)
    if abs(theta) > NEAR:
        return (("rotate", f"{theta:f}*PI/180"),)
    if abs(theta) < NEAR and matrix[4] < 0:
        return (("vflip", ""),)
    return UNTURNED


def _degrees(matrix: tuple[int, ...]) -> float:
    """Clockwise angle, whole degrees in 0 to 360; NaN for a matrix without one."""
    x_scale, y_scale = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not x_scale or not y_scale:
        return math.nan
    exact = math.degrees(math.atan2(matrix[1] / y_scale, matrix[0] / x_scale))
    theta = math.copysign(math.floor(abs(exact) + 0.5), exact)  # C's round
    return theta - 360 * math.floor(theta / 360 + 0.9 / 360)


def flip_of_turned(filters: Filters) -> int | None:
    """For a reader that turns by quarters but never mirrors (decord): the axis to flip afterwards, -1 for none.

    None where no flip gives the picture that the filters show.
    """
    return {
        UNTURNED: -1,
        (("transpose", "clock"),): -1,
        (("transpose", "cclock"),): -1,
        (("hflip", ""), ("vflip", "")): -1,
        (("vflip", ""),): 0,  # the reader shows the frame as stored
        (("hflip", ""),): 0,  # the reader shows a half turn
        (("transpose", "cclock_flip"),): 1,  # the reader shows a turn clockwise
        (("transpose", "clock_flip"),): 1,  # the reader shows a turn anticlockwise
    }.get(filters)

"""Resize one native RGB frame to one small square frame, as each encoder's own preprocessing does it.

There are two families: Pillow's filters, which average over what they shrink, and torch's `interpolate`
(align_corners=False, no antialias), which reads four pixels whatever the scale. The second is written in numpy, because
importing torch would make every decode process 200 MB larger and a second slower to replace; it reads 4 x S x S pixels,
however large the frame.

H W height and width of the frame, S side of the small frame, C = 3 channels RGB, 0 to 255. Small frames are uint8; the
second family can also give its float32 results unrounded.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from PIL import Image

from mervcache.errors import UserError
from pipeline.views import ResizeRule

STRIP_ROWS = 32  # interpolated at a time: arrays so small that their memory stays with the process
PILLOW_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class NativeFrame:
    """A frame of native size, uint8 [H, W, 3], with what resizing it by several rules has in common."""

    def __init__(self, frame_HWC: np.ndarray) -> None:
        self.frame_HWC = frame_HWC

    @cached_property
    def image(self) -> Image.Image:
        """The frame as Pillow holds it, 4 bytes per pixel: a copy, made once for all rules with antialias."""
        return Image.fromarray(np.ascontiguousarray(self.frame_HWC))


def resize(frame: NativeFrame, rule: ResizeRule) -> np.ndarray:
    """[S, S, 3] in the rule's dtype.

    - squash: the whole frame, aspect ratio ignored: torchvision's `Resize((S, S))`
    - centre-crop: short side to S, centre S x S, without making the part that is cut off. With antialias torchvision's
      `Resize(S)` and `CenterCrop(S)` on a PIL image; without, LanguageBind's video transform

    With `crop_pct` below 1, sides are floor(S / crop_pct) before the centre S x S is cut, as in timm's data config.
    """
    height, width = frame.frame_HWC.shape[:2]
    size = rule.size
    if rule.fit not in ("squash", "centre-crop"):
        raise UserError(f"no resize with fit={rule.fit!r}; use squash or centre-crop")
    side = math.floor(size / rule.crop_pct)
    scaled_height, scaled_width = scaled_size(height, width, side) if rule.fit == "centre-crop" else (side, side)
    top, left = crop_corner(scaled_height, scaled_width, size)
    if not rule.antialias:
        rows, columns = _taps(height, scaled_height, top, size), _taps(width, scaled_width, left, size)
        return _interpolate(frame.frame_HWC, rows, columns, rule)
    box = None  # in pixels of the frame; None is the whole of it
    if (scaled_height, scaled_width) != (size, size) or rule.fit == "centre-crop":
        y_scale, x_scale = height / scaled_height, width / scaled_width
        box = (left * x_scale, top * y_scale, (left + size) * x_scale, (top + size) * y_scale)
    return np.asarray(frame.image.resize((size, size), PILLOW_FILTERS[rule.filter], box=box))


def scaled_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the short side at `size` (pytorchvideo's ShortSideScale)."""
    if width < height:
        return math.floor(height / width * size), size
    return size, math.floor(width / height * size)


def crop_corner(height: int, width: int, size: int) -> tuple[int, int]:
    """Top left corner of the centre crop (torchvision's CenterCropVideo; halves round to even)."""
    return round((height - size) / 2.0), round((width - size) / 2.0)


def _taps(length: int, scaled_length: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For `count` output positions from `first`: the two source positions and the weight of the second.

    Source position of output i: max(0, (i + 0.5) * length / scaled_length - 0.5), as in torch's interpolate.
    """
    position = np.maximum((np.arange(first, first + count) + 0.5) * (length / scaled_length) - 0.5, 0.0)
    low = np.minimum(position.astype(np.int64), length - 1)
    return low, np.minimum(low + 1, length - 1), (position - low).astype(np.float32)


def _interpolate(frame_HWC: np.ndarray, rows: tuple, columns: tuple, rule: ResizeRule) -> np.ndarray:
    """Bilinear reading at rows x columns; uint8 is rounded, half a grey level from the float result at most."""
    if rule.filter != "bilinear":
        raise UserError(f"without antialias only filter='bilinear' is known, got {rule.filter!r}")
    (top, bottom, down), (left, right, along) = rows, columns
    along, down = np.repeat(along, 3)[None], down[:, None]  # columns and channels as one axis, long enough for SIMD
    small_SSC = np.empty((len(top), len(left), 3), dtype=rule.dtype)
    for first in range(0, len(top), STRIP_ROWS):
        strip = slice(first, first + STRIP_ROWS)
        upper, lower = (_along_rows(frame_HWC[positions[strip]], left, right, along) for positions in (top, bottom))
        upper *= 1 - down[strip]
        upper += lower * down[strip]
        if rule.dtype == "uint8":
            np.rint(upper, out=upper).clip(0, 255, out=upper)
        small_SSC[strip] = upper.reshape(-1, len(left), 3)
    return small_SSC


def _along_rows(rows_RWC: np.ndarray, left: np.ndarray, right: np.ndarray, along: np.ndarray) -> np.ndarray:
    """float32 [R, S * C]: rows mixed of their columns at `left` and `right`."""
    low, high = (rows_RWC.take(columns, axis=1).reshape(len(rows_RWC), -1) for columns in (left, right))
    mixed = low * (1 - along)
    mixed += high * along
    return mixed

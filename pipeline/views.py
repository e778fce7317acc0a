"""Views: which frames of a clip an encoder sees, and how each is resized.

Decode processes make every distinct view once, so encoders with the same rule share the work. Plain values only:
encoder specs and `--help` import this module.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mervcache.errors import UserError

BASE_FRAMES = 32  # sampled per clip; an encoder with n frames takes every (32 // n)-th (princetonvisualai/merv)


@dataclass(frozen=True, kw_only=True)
class ResizeRule:
    """How one uint8 RGB frame [H, W, 3] becomes [size, size, 3]."""

    size: int = 224  # pixels per side
    filter: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = True  # True: Pillow's filters; False: torch's interpolate, align_corners=False
    fit: Literal["squash", "centre-crop"] = "squash"  # squash ignores the aspect ratio

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class View:
    """Frames of one clip for one encoder: uint8 [num_frames, size, size, 3]."""

    rule: ResizeRule
    num_frames: int

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise UserError(f"a view needs at least one frame, got num_frames={self.num_frames}")


def distinct_views(views: Iterable[View]) -> tuple[View, ...]:
    """Each view once, in order of first use."""
    return tuple(dict.fromkeys(views))

"""Views: which frames of a clip an encoder sees, and how each is resized.

Decode processes make every distinct view once, so encoders with the same rule share the work. Plain values only:
encoder specs and `--help` import this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from featurestore.windows import RATE_RULE
from mervcache.errors import UserError

BASE_FRAMES = 32  # sampled per clip; an encoder with n frames takes every (32 // n)-th (princetonvisualai/merv)


@dataclass(frozen=True, kw_only=True)
class FrameRule:
    """How a clip's frames are chosen; its text is the `frame_rule` of an identity.

    | text | frames |
    |---|---|
    | `linspace-32/2` | 32 evenly spaced indices, every 2nd taken: 16 frames of a model with several encoders |
    | `linspace-16` | 16 evenly spaced indices: a released model with one encoder of 16 frames; also `linspace-8` |
    | `+steps/2` added | every 2nd of the encoder's time steps is kept: ViViT's 8-step form, `linspace-32/1+steps/2` |
    | `+times` added | spans in seconds of variable-rate video are cut by presentation time, not by the average rate |
    | `rate-1x16` | 16 frames at 1 per second from the clip's start: a window of a video; also `rate-1/2x8` |
    """

    samples: int = BASE_FRAMES  # evenly spaced indices; with a rate, times
    every: int = 1  # of these, every n-th is seen
    every_step: int = 1  # of the encoder's time steps, every n-th is kept
    by_times: bool = False
    rate: Fraction | None = None  # frames per second from the clip's start, by presentation time; None: evenly spaced

    _TEXT = re.compile(r"linspace-([1-9]\d{0,3})(?:/([1-9]\d{0,3}))?(?:\+steps/([1-9]\d{0,3}))?(\+times)?")
    _RATE_TEXT = re.compile(rf"{RATE_RULE.pattern}(?:\+steps/([1-9]\d{{0,3}}))?")

    def __post_init__(self) -> None:
        if min(self.samples, self.every, self.every_step) < 1 or self.samples % self.every:
            raise UserError(f"a frame rule takes every n-th of a multiple of n frames, got {self}")
        if self.rate is not None and (self.rate <= 0 or self.every > 1 or self.by_times):
            raise UserError(f"a frame rule by rate takes every frame at a rate above 0, got {self}")

    @classmethod
    def parse(cls, text: str) -> FrameRule:
        """The rule of a `text`; `UserError` for what is none."""
        if (match := cls._RATE_TEXT.fullmatch(text)) is not None:
            rate, samples, every_step = Fraction(match[1]), int(match[2]), int(match[3] or 1)
            return cls(samples=samples, every_step=every_step, rate=rate)
        match = cls._TEXT.fullmatch(text)
        if match is None:
            raise UserError(
                f"unknown frame rule {text!r}; known: linspace-N (N evenly spaced frames) and linspace-N/K (every K-th"
                " of them), either with +steps/K (every K-th time step) and +times (spans by presentation time); and"
                " rate-RxN (N frames at R per second), the rule of windows"
            )
        samples, every, every_step = (int(match[group] or 1) for group in (1, 2, 3))
        return cls(samples=samples, every=every, every_step=every_step, by_times=match[4] is not None)

    def at_rate(self, rate: Fraction) -> FrameRule:
        """The same number of frames and of time steps, at `rate` frames per second from the clip's start."""
        return replace(self, samples=self.num_frames, every=1, by_times=False, rate=rate)

    def __str__(self) -> str:
        if self.rate is not None:
            return f"rate-{self.rate}x{self.samples}" + (f"+steps/{self.every_step}" if self.every_step > 1 else "")
        text = f"linspace-{self.samples}"
        if self.every > 1 or self.samples == BASE_FRAMES:  # the form that identities of format 1 hold
            text += f"/{self.every}"
        text += f"+steps/{self.every_step}" if self.every_step > 1 else ""
        return text + ("+times" if self.by_times else "")

    @property
    def num_frames(self) -> int:
        """Frames that the encoder sees."""
        return self.samples // self.every


def every_nth(num_frames: int) -> FrameRule:
    """The rule of an encoder in a model with several: `num_frames` of the 32 frames that all encoders share."""
    if num_frames < 1 or BASE_FRAMES % num_frames:
        raise UserError(f"an encoder's frames must divide the {BASE_FRAMES} sampled frames, got {num_frames}")
    return FrameRule(every=BASE_FRAMES // num_frames)


@dataclass(frozen=True, kw_only=True)
class ResizeRule:
    """How one uint8 RGB frame [H, W, 3] becomes [size, size, 3]."""

    size: int = 224  # pixels per side
    filter: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = True  # True: Pillow's filters; False: torch's interpolate, align_corners=False
    fit: Literal["squash", "centre-crop"] = "squash"  # squash ignores the aspect ratio
    dtype: Literal["uint8", "float32"] = "uint8"  # of the small frame; float32 is not rounded, without antialias only
    exif: Literal["ignore", "apply"] = "ignore"  # whether a picture is turned by its EXIF orientation
    crop_pct: float = 1.0  # share of the resized side that the centre crop keeps: side = floor(size / crop_pct)

    def __post_init__(self) -> None:
        if self.dtype not in ("uint8", "float32"):
            raise UserError(f"small frames are uint8 or float32, got {self.dtype!r}")
        if self.dtype == "float32" and self.antialias:
            raise UserError("with antialias frames are resized by Pillow, whose result is uint8, as in the reference")
        if self.exif not in ("ignore", "apply"):
            raise UserError(f"EXIF orientation is a choice of ignore and apply, got {self.exif!r}")
        if not 0.1 <= self.crop_pct <= 1.0:
            raise UserError(f"crop_pct is a share from 0.1 to 1, got {self.crop_pct!r}")

    def to_dict(self) -> dict[str, Any]:
        """The rule as identities hold it: fields that came later are left out where they change nothing."""
        record = asdict(self)
        for name, unchanged in (("dtype", "uint8"), ("exif", "ignore"), ("crop_pct", 1.0)):
            if record[name] == unchanged:
                del record[name]
        return record


@dataclass(frozen=True, kw_only=True)
class View:
    """Frames of one clip for one encoder: [num_frames, size, size, 3] in the rule's dtype."""

    rule: ResizeRule
    num_frames: int
    frame_rule: str = ""  # how they are chosen; "": evenly, spans of variable-rate video by presentation time

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise UserError(f"a view needs at least one frame, got num_frames={self.num_frames}")
        if not self.frame_rule:
            default = FrameRule(every=every_nth(self.num_frames).every, by_times=True)
            object.__setattr__(self, "frame_rule", str(default))
        if (seen := self.frames.num_frames) != self.num_frames:
            raise UserError(f"frame rule {self.frame_rule} gives {seen} frames, the view holds {self.num_frames}")

    @property
    def frames(self) -> FrameRule:
        """The parsed frame rule."""
        return FrameRule.parse(self.frame_rule)


def distinct_views(views: Iterable[View]) -> tuple[View, ...]:
    """Each view once, in order of first use."""
    return tuple(dict.fromkeys(views))

"""What is asked of a decode process and what it gives back.

Plain values, light to import: the driver's side holds them, the child's side gets them as JSON. A job names the media
by root and relative path; no open file and no frame of native size ever crosses the pipe.

Collector: native frames come in one at a time, the small frames of every view go out.

A reader asks `choose` which frame indices are wanted and calls `add` for each, in any order; a frame wanted twice is
decoded and resized once. A native frame is dropped as soon as it is resized, so one native frame is the peak.

Which frames of a clip are sampled: the reference's expression, literally.

The public reference code (princetonvisualai/merv) computes, for N frames at `fps`,

    np.linspace(start * fps, min(N - 1, end * fps - 1), 32, dtype=int)        start = 0, end = N / fps by default

and an encoder with n frames takes every (32 // n)-th of these. It is kept to the letter, floating point included:
N / fps * fps - 1 can fall just below N - 1, and then the last index is N - 2. That happens for about 3 % of (N, fps),
so `linspace(0, N - 1)` is not the same rule. numpy's integer linspace rounds down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from featurestore.clips import Clip
from mervcache.errors import MediaError, UserError
from pipeline.decode.resize import resize
from pipeline.views import BASE_FRAMES, ResizeRule, View

DEFAULT_DECODER = "frames/1"


@dataclass(frozen=True, kw_only=True)
class DecodeJob:
    """One clip, and the views wanted of it."""

    root: str  # the dataset's root folder
    clip: Clip
    views: tuple[View, ...]  # distinct; their num_frames divide BASE_FRAMES
    decoder: str = DEFAULT_DECODER  # name in `decoders.DECODERS`
    accept_damaged: bool = False  # put the nearest frame in the place of one that cannot be decoded

    def __post_init__(self) -> None:
        if not self.views or len(set(self.views)) != len(self.views):
            raise UserError(f"a decode job needs distinct views, got {len(self.views)} for {self.clip.clip_id}")
        for view in self.views:
            if BASE_FRAMES % view.num_frames:
                raise UserError(f"a view's frames must divide the {BASE_FRAMES} sampled frames, got {view.num_frames}")

    def to_record(self) -> dict[str, Any]:
        """JSON-able form; inverse of `from_record`."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> DecodeJob:
        views = tuple(View(rule=ResizeRule(**v["rule"]), num_frames=v["num_frames"]) for v in record["views"])
        return cls(**{**record, "clip": Clip(**record["clip"]), "views": views})


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The small frames of one clip."""

    frames: dict[View, np.ndarray] = field(repr=False)
    """uint8 [view.num_frames, S, S, 3] RGB for a video; [1, S, S, 3] for a still, which the encoder repeats."""
    media_sha256: str  # of the media's bytes: see `digests.media_sha256`
    decoder: str  # what made the pixels, for the receipt: no versions, the same on every machine
    num_frames: int  # N of the whole media as the reader counts; 1 for a still
    fps: float  # average frames per second; 0.0 where the media has no clock (stills, GIFs)
    seconds: float  # wall time inside the process, all of it


class FailedClipError(MediaError):
    """A clip that cannot be decoded, with the digest of the bytes that failed where they could be read."""

    def __init__(self, reason: str, media_sha256: str | None = None) -> None:
        super().__init__(reason)
        self.media_sha256 = media_sha256


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a reader says about the media it has read."""

    num_frames: int  # N, in presentation order, what is shown only
    fps: float  # average; 0.0 without a clock
    decoder: str  # for the receipt


def frame_indices(clip: Clip, num_frames: int, fps: float) -> np.ndarray:
    """int64 [BASE_FRAMES]: indices into the media's frames in presentation order, never out of range.

    fps 0.0 means that the media has no clock (a GIF): the whole of it is sampled, and a span is an error.
    """
    if num_frames < 1:
        raise MediaError("video holds no frames")
    first, last = _bounds(clip, num_frames, fps)
    if first > num_frames - 1:
        raise MediaError("span begins beyond the end of the video")
    indices = np.linspace(first, last, BASE_FRAMES, dtype=int)
    if indices.min() < 0:
        raise MediaError("span is shorter than one frame")
    return indices


def every_nth(num_frames: int) -> slice:
    """The part of the sampled frames that an encoder with `num_frames` frames sees: `[:: BASE_FRAMES // n]`."""
    if num_frames < 1 or BASE_FRAMES % num_frames:
        raise UserError(f"an encoder's frames must divide the {BASE_FRAMES} sampled frames, got {num_frames}")
    return slice(None, None, BASE_FRAMES // num_frames)


def _bounds(clip: Clip, num_frames: int, fps: float) -> tuple[float, float]:
    """First and last position, in frames, as the reference has them."""
    if clip.end_frame is not None:
        return 0, min(num_frames - 1, clip.end_frame)
    has_span = clip.start_s is not None or clip.end_s is not None
    if not fps > 0:
        if has_span:
            raise MediaError("span in seconds of media that has no frame rate")
        return 0, num_frames - 1
    start = 0 if clip.start_s is None else clip.start_s
    end = num_frames / fps if clip.end_s is None else clip.end_s
    return start * fps, min(num_frames - 1, end * fps - 1)


class FrameCollector:
    """The views of one job, being filled."""

    def __init__(self, job: DecodeJob) -> None:
        self._job = job
        self._frames: dict[View, np.ndarray] = {}
        self._slots: dict[int, dict[View, list[int]]] = {}  # frame index -> view -> positions in the view
        self._missing: set[int] = set()

    def choose(self, num_frames: int, fps: float) -> list[int]:
        """Frame indices wanted of media with `num_frames` frames: distinct, ascending.

        Called again, with a better count, it starts anew.
        """
        job = self._job
        if job.clip.kind == "image":
            return self._expect({view: np.zeros(1, dtype=int) for view in job.views})
        indices = frame_indices(job.clip, num_frames, fps)
        return self._expect({view: indices[every_nth(view.num_frames)] for view in job.views})

    def add(self, index: int, frame_HWC: np.ndarray) -> None:
        """Bring one native RGB frame, uint8 [H, W, 3], to every view that wants it."""
        small: dict[ResizeRule, np.ndarray] = {}
        for view, positions in self._slots[index].items():
            if view.rule not in small:
                small[view.rule] = resize(frame_HWC, view.rule)
            self._frames[view][positions] = small[view.rule]
        self._missing.discard(index)

    def missing(self) -> list[int]:
        """Chosen indices that no frame came for, ascending."""
        return sorted(self._missing)

    def frames(self) -> dict[View, np.ndarray]:
        """The filled views; every chosen index must have come."""
        assert not self._missing, f"reader returned without frames {self.missing()[:5]}"
        return self._frames

    def _expect(self, indices: dict[View, np.ndarray]) -> list[int]:
        self._slots = {}
        for view, wanted in indices.items():
            shape = (len(wanted), view.rule.size, view.rule.size, 3)
            self._frames[view] = np.zeros(shape, dtype=np.uint8)
            for position, index in enumerate(wanted.tolist()):
                self._slots.setdefault(index, {}).setdefault(view, []).append(position)
        self._missing = set(self._slots)
        return sorted(self._slots)

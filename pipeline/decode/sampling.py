"""The decode job, which frames of its clip are sampled, and the collector that resizes them.

Plain values, light to import: the driver builds jobs and sends them to decode processes as JSON. A job names its media
by root and relative path; no open file and no frame of native size crosses the pipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from featurestore.clips import Clip
from mervcache.errors import MediaError, UserError
from pipeline.decode.resize import resize
from pipeline.media import MediaRoot, Root
from pipeline.views import BASE_FRAMES, ResizeRule, View

DEFAULT_DECODER = "frames/1"
OUT_OF_MEMORY = "decoding needs more memory than a decode process may use"


@dataclass(frozen=True, kw_only=True)
class DecodeJob:
    """One clip, and the views wanted of it."""

    root: Root  # the dataset's root folder
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
        root = MediaRoot(**record["root"]) if isinstance(record["root"], dict) else record["root"]
        return cls(**{**record, "root": root, "clip": Clip(**record["clip"]), "views": views})


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The small frames of one clip."""

    frames: dict[View, np.ndarray] = field(repr=False)
    """uint8 [view.num_frames, S, S, 3] RGB for a video; [1, S, S, 3] for a still, which the encoder repeats."""
    media_sha256: str  # of the media's bytes: see `media.Source.sha256`
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
    """What a reader reports about the media it has read."""

    num_frames: int  # N, in presentation order, what is shown only
    fps: float  # average; 0.0 without a clock
    decoder: str  # for the receipt


def frame_indices(clip: Clip, num_frames: int, fps: float) -> np.ndarray:
    """int64 [BASE_FRAMES]: indices into the media's frames in presentation order, never out of range.

    The reference code (princetonvisualai/merv) computes, for N frames at `fps`,

        np.linspace(start * fps, min(N - 1, end * fps - 1), 32, dtype=int)        start = 0, end = N / fps by default

    and an encoder with n frames takes every (32 // n)-th of these. It is kept literally, floating point included:
    N / fps * fps - 1 can fall just below N - 1, and then the last index is N - 2. That happens for about 3 % of
    (N, fps), so `linspace(0, N - 1)` is not the same rule. numpy's integer linspace rounds down.

    fps 0.0 means that the media has no clock (a GIF): the whole of it is sampled, and a span is an error.
    """
    if num_frames < 1:
        raise MediaError("video holds no frames")
    if clip.end_frame is not None:
        first, last = 0, min(num_frames - 1, clip.end_frame)
    elif not fps > 0:
        if clip.start_s is not None or clip.end_s is not None:
            raise MediaError("span in seconds of media that has no frame rate")
        first, last = 0, num_frames - 1
    else:
        start = 0 if clip.start_s is None else clip.start_s
        end = num_frames / fps if clip.end_s is None else clip.end_s
        first, last = start * fps, min(num_frames - 1, end * fps - 1)
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


class FrameCollector:
    """Resizes native frames, one at a time, into the arrays of a job's views.

    A reader calls `choose` for the frame indices that are wanted and `add` for each of them, in any order. A frame
    wanted twice is decoded and resized once, and a native frame is dropped as soon as it is resized, so one native
    frame is the peak.
    """

    def __init__(self, job: DecodeJob) -> None:
        self._job = job
        self._frames: dict[View, np.ndarray] = {}
        self._slots: dict[int, dict[View, list[int]]] = {}  # frame index -> view -> positions in the view
        self._missing: set[int] = set()

    def choose(self, num_frames: int, fps: float) -> list[int]:
        """Frame indices wanted of media with `num_frames` frames: distinct, ascending.

        A second call, with a better count, starts over.
        """
        if self._job.clip.kind == "image":
            wanted = {view: np.zeros(1, dtype=int) for view in self._job.views}
        else:
            indices = frame_indices(self._job.clip, num_frames, fps)
            wanted = {view: indices[every_nth(view.num_frames)] for view in self._job.views}
        self._slots = {}
        for view, indices in wanted.items():
            self._frames[view] = np.zeros((len(indices), view.rule.size, view.rule.size, 3), dtype=np.uint8)
            for position, index in enumerate(indices.tolist()):
                self._slots.setdefault(index, {}).setdefault(view, []).append(position)
        self._missing = set(self._slots)
        return sorted(self._slots)

    def add(self, index: int, frame_HWC: np.ndarray) -> None:
        """Bring one native RGB frame, uint8 [H, W, 3], to every view that wants it."""
        small: dict[ResizeRule, np.ndarray] = {}
        for view, positions in self._slots[index].items():
            if view.rule not in small:
                small[view.rule] = resize(frame_HWC, view.rule)
            self._frames[view][positions] = small[view.rule]
        self._missing.discard(index)

    def missing(self) -> list[int]:
        """Chosen indices that no frame was added for, ascending."""
        return sorted(self._missing)

    def frames(self) -> dict[View, np.ndarray]:
        """The filled views; every chosen index must have been added."""
        assert not self._missing, f"reader returned without frames {self.missing()[:5]}"
        return self._frames

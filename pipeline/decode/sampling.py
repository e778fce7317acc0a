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
from pipeline.decode.resize import NativeFrame, resize
from pipeline.media import Root, root_from_record
from pipeline.views import FrameRule, ResizeRule, View

DEFAULT_DECODER = "frames/1"
DAMAGED = "+damaged:"  # in the decoder of a receipt: frames of damaged media were substituted
ROUNDING = 1e-6  # of a frame: what floating point may take from the reference's expression
CUT_ELSEWHERE = 2.0  # frames between the ends by average rate and by time: rounding explains less
UNEVEN = 0.25  # of the mean interval: a frame this far from an even spacing makes a video variable-rate
VARIABLE_RATE = (
    "span in seconds of video whose frames do not come at its average rate; "
    "a frame rule with +times cuts it by presentation time"
)
TICK_S = 6e-4  # Matroska rounds times to milliseconds: a frame shown so little after a time counts as shown at it
NO_RATE = "frames by rate of media that has no frame rate"
OUT_OF_MEMORY = "decoding needs more memory than a decode process may use"


@dataclass(frozen=True, kw_only=True)
class DecodeJob:
    """One clip, and the views wanted of it."""

    root: Root  # the dataset's root folder
    clip: Clip
    views: tuple[View, ...]  # distinct
    decoder: str = DEFAULT_DECODER  # name in `decoders.DECODERS`
    accept_damaged: bool = False  # put the nearest frame in the place of one that cannot be decoded

    def __post_init__(self) -> None:
        if not self.views or len(set(self.views)) != len(self.views):
            raise UserError(f"a decode job needs distinct views, got {len(self.views)} for {self.clip.clip_id}")

    def to_record(self) -> dict[str, Any]:
        """JSON-able form; inverse of `from_record`."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> DecodeJob:
        views = tuple(View(**{**view, "rule": ResizeRule(**view["rule"])}) for view in record["views"])
        return cls(
            **{**record, "root": root_from_record(record["root"]), "clip": Clip(**record["clip"]), "views": views}
        )


@dataclass(frozen=True, kw_only=True)
class LengthJob:
    """One video whose length is wanted; nothing of it is decoded."""

    root: Root
    clip: Clip

    def to_record(self) -> dict[str, Any]:
        """JSON-able form; inverse of `from_record`."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LengthJob:
        return cls(root=root_from_record(record["root"]), clip=Clip(**record["clip"]))


AnyJob = DecodeJob | LengthJob


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The small frames of one clip."""

    frames: dict[View, np.ndarray] = field(repr=False)
    """[view.num_frames, S, S, 3] RGB, 0 to 255, in the dtype of the view's rule; [1, S, S, 3] for a still, which the
    encoder repeats. Empty if the clip was not decoded because its cells are known."""
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


def exception_name(error: BaseException) -> str:
    """An exception's type in a reason: "ValueError", or with its module: "struct.error"."""
    kind = type(error)
    return kind.__name__ if kind.__name__[0].isupper() else f"{kind.__module__}.{kind.__name__}"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a reader reports about the media it has read."""

    num_frames: int  # N, in presentation order, what is shown only
    fps: float  # average; 0.0 without a clock
    decoder: str  # for the receipt


def has_substitutes(decoder: str | None) -> bool:
    """Whether a receipt's decoder records frames of damaged media that their neighbours stand in for."""
    return DAMAGED in (decoder or "")


def frame_indices(
    clip: Clip, num_frames: int, fps: float, rule: FrameRule = FrameRule(), times: np.ndarray | None = None
) -> np.ndarray:
    """int64 [rule.num_frames]: indices into the media's frames in presentation order, never out of range.

    The reference code (princetonvisualai/merv) computes, for N frames at `fps`,

        np.linspace(start * fps, min(N - 1, end * fps - 1), 32, dtype=int)        start = 0, end = N / fps by default

    and an encoder with n frames takes every (32 // n)-th of these; 32 is the largest number of frames of the model's
    encoders, so a model with one encoder of 16 frames has 16 in its place (`rule.samples`). It is kept literally,
    floating point included: N / fps * fps - 1 can fall just below N - 1, and then the last index is N - 2. That happens
    for about 3 % of (N, fps), so `linspace(0, N - 1)` is not the same rule. numpy's integer linspace rounds down.
    Two spans that the reference cannot read have the one frame that they show: a video of a single frame whose end
    falls below its index 0 by rounding, and a span that begins while the last frame is on screen.

    `times` are the seconds from the first frame at which each is shown, where the reader knows them. Seconds times the
    average rate name other frames than those of the span where the rate varies: such a span is refused, or cut by
    `times`, by the rule.

    fps 0.0 means that the media has no clock (a GIF): the whole of it is sampled, and a span is an error.

    A rule by rate has its own definition: `_indices_at_rate`.
    """
    if num_frames < 1:
        raise MediaError("video holds no frames")
    if rule.rate is not None:
        return _indices_at_rate(clip, num_frames, fps, rule, times)
    is_span = clip.start_s is not None or clip.end_s is not None
    if clip.end_frame is not None:
        first, last = 0, min(num_frames - 1, clip.end_frame)
    elif is_span and times is not None:
        first, last = _span_by_times(clip, num_frames, fps, rule, times)
    elif not fps > 0:
        if is_span:
            raise MediaError("span in seconds of media that has no frame rate")
        first, last = 0, num_frames - 1
    else:
        first, last = _span_by_rate(clip, num_frames, fps)
    if first >= num_frames:
        raise MediaError("span begins beyond the end of the video")
    if first > num_frames - 1:
        return np.full(rule.num_frames, num_frames - 1)
    if -ROUNDING < last < 0:
        last = 0
    indices = np.linspace(first, last, rule.samples, dtype=int)
    if indices.min() < 0:
        raise MediaError("span is shorter than one frame")
    return indices[:: rule.every]


def _indices_at_rate(clip: Clip, num_frames: int, fps: float, rule: FrameRule, times: np.ndarray | None) -> np.ndarray:
    """The frame on screen at start + j / rate seconds, j = 0, 1, ...; the last one of the clip is repeated at its end.

    Without the frames' times they come at the average rate. A clip that ends sooner than its frames (the last window of
    a video) is not stretched: a time step stands for the same number of seconds in every window.
    """
    assert rule.rate is not None
    if clip.end_frame is not None:
        raise MediaError("frames by rate of a clip that ends at a frame's number")
    if not fps > 0:
        raise MediaError(NO_RATE)
    if times is None:
        times = np.arange(num_frames) / fps
    first, last = _ends_by_times(clip, num_frames, fps, times)
    if first >= num_frames:
        raise MediaError("span begins beyond the end of the video")
    start = 0.0 if clip.start_s is None else clip.start_s
    wanted_s = np.array([start + float(j / rule.rate) for j in range(rule.samples)])
    indices = np.searchsorted(times, wanted_s + TICK_S, side="right") - 1
    return np.minimum(indices, max(last, int(indices[0])))


def _span_by_rate(clip: Clip, num_frames: int, fps: float) -> tuple[float, float]:
    """First and last position of a span, in frames, by the reference's expression."""
    start = 0 if clip.start_s is None else clip.start_s
    end = num_frames / fps if clip.end_s is None else clip.end_s
    return start * fps, min(num_frames - 1, end * fps - 1)


def _span_by_times(clip: Clip, num_frames: int, fps: float, rule: FrameRule, times: np.ndarray) -> tuple[float, float]:
    """First and last position of a span: by the reference's expression where frames are evenly spaced, else by time."""
    first, last = _ends_by_times(clip, num_frames, fps, times)
    if fps > 0:
        rated = _span_by_rate(clip, num_frames, fps)
        distance = max(abs(rated[0] - first), abs(rated[1] - last)) if first < num_frames else 0.0
        if not rule.by_times:
            if distance >= CUT_ELSEWHERE:
                raise MediaError(VARIABLE_RATE)
            return rated
        if distance < CUT_ELSEWHERE and not _is_uneven(times):
            return rated
    elif not rule.by_times:
        raise MediaError("span in seconds of media that has no frame rate")
    return first, last


def _ends_by_times(clip: Clip, num_frames: int, fps: float, times: np.ndarray) -> tuple[int, int]:
    """Indices of the first and the last frame whose time is in [start, end); of the frame on screen if there is none.

    The first is `num_frames` where the span begins after the last frame has gone.
    """
    start = 0.0 if clip.start_s is None else clip.start_s
    length = float(times[-1]) + (1 / fps if fps > 0 else float(times[-1]) / max(1, num_frames - 1))
    if start >= max(length, num_frames / fps if fps > 0 else 0.0):
        return num_frames, num_frames
    first = int(np.searchsorted(times, start, side="left"))
    last = num_frames - 1 if clip.end_s is None else int(np.searchsorted(times, clip.end_s, side="left")) - 1
    return (first, last) if first <= last else (last, last)


def _is_uneven(times: np.ndarray) -> bool:
    """Whether frames are not evenly spaced, by more than rounding to a container's ticks explains."""
    if len(times) < 3:
        return False
    even = np.linspace(times[0], times[-1], len(times))
    return bool(np.abs(times - even).max() > UNEVEN * (even[1] - even[0]))


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

    @property
    def applies_exif(self) -> bool:
        """Whether any view has pictures turned by their EXIF orientation."""
        return any(view.rule.exif == "apply" for view in self._job.views)

    @property
    def needs_times(self) -> bool:
        """Whether `choose` depends on when each frame is shown: for spans in seconds, and for frames by rate."""
        clip = self._job.clip
        is_span = clip.start_s is not None or clip.end_s is not None
        is_by_rate = any(view.frames.rate is not None for view in self._job.views)
        return clip.kind == "video" and (is_span or is_by_rate) and clip.end_frame is None

    def choose(self, num_frames: int, fps: float, times: np.ndarray | None = None) -> list[int]:
        """Frame indices wanted of media with `num_frames` frames: distinct, ascending.

        `times` are the seconds at which each frame is shown, if they are needed and known. A second call, with a better
        count, starts over.
        """
        self._slots = {}
        for view in self._job.views:
            if self._job.clip.kind == "image":
                indices = np.zeros(1, dtype=int)
            else:
                indices = frame_indices(self._job.clip, num_frames, fps, view.frames, times)
            self._frames[view] = np.zeros((len(indices), view.rule.size, view.rule.size, 3), dtype=view.rule.dtype)
            for position, index in enumerate(indices.tolist()):
                self._slots.setdefault(index, {}).setdefault(view, []).append(position)
        self._missing = set(self._slots)
        return sorted(self._slots)

    def add(self, index: int, frame_HWC: np.ndarray, *, upright_HWC: np.ndarray | None = None) -> None:
        """Bring one native RGB frame, uint8 [H, W, 3], to every view that wants it.

        `upright_HWC` is the frame turned by its EXIF orientation, for the views that apply it; None: not turned.
        """
        frame = NativeFrame(frame_HWC)
        upright = frame if upright_HWC is None else NativeFrame(upright_HWC)
        small: dict[ResizeRule, np.ndarray] = {}
        for view, positions in self._slots[index].items():
            if view.rule not in small:
                small[view.rule] = resize(upright if view.rule.exif == "apply" else frame, view.rule)
            self._frames[view][positions] = small[view.rule]
        self._missing.discard(index)

    def missing(self) -> list[int]:
        """Chosen indices that no frame was added for, ascending."""
        return sorted(self._missing)

    def frames(self) -> dict[View, np.ndarray]:
        """The filled views; every chosen index must have been added."""
        assert not self._missing, f"reader returned without frames {self.missing()[:5]}"
        return self._frames

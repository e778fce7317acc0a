"""What is asked of a decode process and what it gives back.

Plain values, light to import: the driver's side holds them, the child's side gets them as JSON. A job names the media
by root and relative path; no open file and no frame of native size ever crosses the pipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from featurestore.clips import Clip
from mervcache.errors import MediaError, UserError
from pipeline.views import BASE_FRAMES, ResizeRule, View

if TYPE_CHECKING:
    import numpy as np

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

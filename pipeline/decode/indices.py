"""Which frames of a clip are sampled: the reference's expression, literally.

The public reference code (princetonvisualai/merv) computes, for N frames at `fps`,

    np.linspace(start * fps, min(N - 1, end * fps - 1), 32, dtype=int)        start = 0, end = N / fps by default

and an encoder with n frames takes every (32 // n)-th of these. It is kept to the letter, floating point included:
N / fps * fps - 1 can fall just below N - 1, and then the last index is N - 2. That happens for about 3 % of (N, fps),
so `linspace(0, N - 1)` is not the same rule. numpy's integer linspace rounds down.
"""

from __future__ import annotations

import numpy as np

from featurestore.clips import Clip
from mervcache.errors import MediaError, UserError
from pipeline.views import BASE_FRAMES


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

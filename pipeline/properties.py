"""Properties of clips that can be seen without an encoder: motion, edges, length. Small frames, defined below.

T frames, S pixels per side.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.clips import Clip
from pipeline.media import Root
from pipeline.remote_shards import RemoteRoot, is_reachable, remote_root
from pipeline.views import BASE_FRAMES

SIDE = 224  # pixels per side
STEEP = 8.0  # levels of 255 per pixel, at least, of an edge
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
DEFINITIONS = {
    "motion": f"mean absolute difference of luma (0 to 255) between consecutive ones of the {BASE_FRAMES} frames that"
    f" are spread over the clip, at {SIDE} x {SIDE} pixels; videos only",
    "edges": f"share of pixels, mean over these frames, where the gradient of luma by 3 x 3 Sobel filters divided by 8"
    f" is at least {STEEP:g} levels per pixel: text and fine detail have many",
    "length_s": "seconds, by the span or the media's frame count and rate; videos with a clock only",
}


@dataclass(frozen=True, kw_only=True)
class ClipProperties:
    """What `DEFINITIONS` says; None where a clip has no such property."""

    motion: float | None
    edges: float
    length_s: float | None


def properties_of(luma_TSS: NDArray[np.float32], clip: Clip, num_frames: int, fps: float) -> ClipProperties:
    """Properties of a clip with these frames, of media with `num_frames` frames at `fps` (0.0: without a clock)."""
    is_video = clip.kind == "video"
    return ClipProperties(
        motion=motion(luma_TSS) if is_video else None,
        edges=edge_density(luma_TSS),
        length_s=length_s(clip, num_frames, fps) if is_video else None,
    )


def motion(luma_TSS: NDArray[np.float32]) -> float:
    """Mean absolute difference of consecutive frames."""
    return float(np.abs(np.diff(luma_TSS, axis=0)).mean(dtype=np.float64))


def edge_density(luma_TSS: NDArray[np.float32]) -> float:
    """Share of inner pixels with a Sobel gradient of at least `STEEP` levels per pixel."""
    smooth = luma_TSS[:, :-2] + 2 * luma_TSS[:, 1:-1] + luma_TSS[:, 2:]  # over rows
    across = (smooth[:, :, 2:] - smooth[:, :, :-2]) / 8
    smooth = luma_TSS[:, :, :-2] + 2 * luma_TSS[:, :, 1:-1] + luma_TSS[:, :, 2:]  # over columns
    down = (smooth[:, 2:] - smooth[:, :-2]) / 8
    return float((np.hypot(across, down) >= STEEP).mean())


def length_s(clip: Clip, num_frames: int, fps: float) -> float | None:
    """Seconds of the clip within its media; None without a clock."""
    if not fps > 0:
        return None
    media_s = num_frames / fps
    if clip.end_frame is not None:
        return min(media_s, (clip.end_frame + 1) / fps)
    end_s = media_s if clip.end_s is None else min(media_s, clip.end_s)
    return max(0.0, end_s - (clip.start_s or 0.0))


def clip_of(row: Mapping[str, Any]) -> Clip:
    """The clip in a row of `FeatureStore.clips`."""
    fields = ("dataset", "path", "kind", "start_s", "end_s", "end_frame")
    return Clip(**{name: row[name] for name in fields})


def root_of(row: Mapping[str, Any], roots: Mapping[str, Root]) -> Root | None:
    """The folder of a clip's media by dataset, "" being all others; None where it is unknown or gone."""
    root = roots.get(row["dataset"], roots.get(""))
    if root is None or (remote := remote_root(root)) is not None:
        return root if root is not None and is_reachable(remote.url) else None
    assert not isinstance(root, RemoteRoot)
    return root if Path(os.fspath(root)).is_dir() else None

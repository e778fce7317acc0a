"""Collector: native frames come in one at a time, the small frames of every view go out.

A reader asks `choose` which frame indices are wanted and calls `add` for each, in any order; a frame wanted twice is
decoded and resized once. A native frame is dropped as soon as it is resized, so one native frame is the peak.
"""

from __future__ import annotations

import numpy as np

from pipeline.decode.indices import every_nth, frame_indices
from pipeline.decode.job import DecodeJob
from pipeline.decode.resize import resize
from pipeline.views import ResizeRule, View


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

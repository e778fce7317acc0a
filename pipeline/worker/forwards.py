"""Which encoders of a run share a forward, and which of them pays for it in a prediction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import replace

from pipeline.config import EncoderSettings
from pipeline.worker.reports import ProbeRecord


def same_forward(settings: Sequence[EncoderSettings], *, compiled: bool = False) -> list[list[EncoderSettings]]:
    """Settings that one network and one forward serve: they differ in grid and, unless it is compiled, in layer."""
    groups: list[list[EncoderSettings]] = []
    for each in settings:
        shared = replace(each, grid=None, label="", layer=each.layer if compiled else None)
        for group in groups:
            if replace(group[0], grid=None, label="", layer=group[0].layer if compiled else None) == shared:
                group.append(each)
                break
        else:
            groups.append([each])
    return groups


class SharedForwards:
    """Divides forwards among the encoders that share them: a clip's forward is the first encoder's that computes it."""

    def __init__(self, groups: Iterable[Sequence[str]]) -> None:
        self._first = {key: group[0] for group in groups for key in group}
        self._clips: dict[str, set[str]] = {}  # first encoder of a group -> clips whose forward is counted

    def add(self, encoder: str, clips: Set[str]) -> int:
        """How many of the clips that an encoder computes need a forward that no encoder added earlier runs anyway."""
        counted = self._clips.setdefault(self._first[encoder], set())
        before = len(counted)
        counted |= clips
        return len(counted) - before

    def seconds(self, record: ProbeRecord, encoder: str, *, forwards: int, clips: int) -> float:
        """Seconds for `forwards` forwards and an encoder's own part (pooling, copy) in `clips` clips, by a probed one.

        The probe counts a shared forward to the first encoder of its group.
        """
        first = self._first[encoder]
        own_s = 0.0 if encoder == first else record.encoders[encoder].seconds
        return forwards * record.encoders[first].seconds + clips * own_s

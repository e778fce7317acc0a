"""Windows: a long video as a sequence of clips of equal length, each with tokens of its own.

A window is an ordinary clip with a span. Which spans are a video's windows follows from its id and from the length of a
window, which the encoder's frame rule holds, so a store has no table of windows and readers need none.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction

from featurestore.clip_names import clip_of_id
from featurestore.clips import Clip
from mervcache.errors import UserError

RATE_RULE = re.compile(r"rate-([1-9]\d{0,17}(?:/[1-9]\d{0,17})?)x([1-9]\d{0,3})")  # frames per second, frames
SHORTEST_S = 1e-3  # containers round times to milliseconds: what is left of a video after its last window may be none


def window_length(frame_rule: str) -> Fraction | None:
    """Seconds of a window of tokens made by a frame rule; None for a rule of whole clips.

    >>> window_length("rate-1x16"), window_length("rate-1/2x8"), window_length("linspace-32/2")
    (Fraction(16, 1), Fraction(16, 1), None)
    """
    match = RATE_RULE.match(frame_rule)
    return None if match is None else int(match[2]) / Fraction(match[1])


def window_of(clip: Clip, length: Fraction, number: int) -> Clip:
    """Window `number`, from 0, of a clip: [start + number * length, start + (number + 1) * length) in seconds.

    It ends where the clip ends, if the clip has an end; a window of a clip to the end of its file may go beyond it.
    """
    start = Fraction(clip.start_s or 0.0)
    end_s = float(start + (number + 1) * length)
    end_s = end_s if clip.end_s is None else min(end_s, clip.end_s)
    return replace(clip, start_s=float(start + number * length), end_s=end_s)


def count_windows(clip: Clip, length: Fraction, media_s: float) -> int:
    """Windows of a clip of media that takes `media_s` seconds, at least one."""
    end_s = media_s if clip.end_s is None else min(clip.end_s, media_s)
    return max(1, math.ceil((end_s - (clip.start_s or 0.0) - SHORTEST_S) / float(length)))


def spread_windows(windows: Sequence[str], limit: int | None) -> list[str]:
    """At most `limit` of a video's windows, spread evenly over it: the middle one of each of `limit` equal parts.

    >>> spread_windows(["a", "b", "c", "d", "e"], 2)
    ['b', 'd']
    """
    if limit is not None and limit < 1:
        raise UserError(f"a limit of windows is at least 1, got {limit}")
    if limit is None or len(windows) <= limit:
        return list(windows)
    return [windows[(2 * part + 1) * len(windows) // (2 * limit)] for part in range(limit)]


class WindowIndex:
    """The windows of videos among many clips, for windows of one length."""

    def __init__(self, clip_ids: Iterable[str], length: Fraction) -> None:
        self.length = length
        self._spans: dict[str, set[str]] = defaultdict(set)  # id without its span -> ids with one
        for clip_id in clip_ids:
            media, mark, _ = clip_id.partition("#t=")
            if mark:
                self._spans[media].add(clip_id)

    def windows(self, clip_id: str) -> dict[int, str]:
        """Number -> clip id of a video's windows that are among the clips, in their order; {} where there is none.

        `clip_id` is the id of the video, or of a span of it: the clip that would have been encoded as a whole.
        """
        spans = self._spans.get(clip_id.partition("#")[0], set())
        if not spans or "#end_frame=" in clip_id:
            return {}
        clip = clip_of_id(clip_id, "video")
        start_s = clip.start_s or 0.0
        last = max(clip_of_id(span, "video").start_s or 0.0 for span in spans)
        numbers = range(int((last - start_s) / float(self.length) + 0.5) + 1) if last >= start_s else range(0)
        found: dict[int, str] = {}
        for number in numbers:
            if clip.end_s is not None and float(Fraction(start_s) + number * self.length) >= clip.end_s:
                break
            window_id = window_of(clip, self.length, number).clip_id
            if window_id in spans:
                found[number] = window_id
        return found


class WindowIndexes:
    """An index of a store's clips for each length of its windows, made on first use."""

    def __init__(self, clip_ids: Callable[[], Iterable[str]]) -> None:
        self._clip_ids = clip_ids
        self._made: dict[Fraction, WindowIndex] = {}

    def of(self, encoder: str, frame_rule: str) -> WindowIndex:
        """The index for an encoder's windows; UserError where its tokens are of whole clips."""
        length = window_length(frame_rule)
        if length is None:
            raise UserError(f"{encoder} has tokens of whole clips, not of windows: they are extracted with --fps 1")
        if length not in self._made:
            self._made[length] = WindowIndex(self._clip_ids(), length)
        return self._made[length]


def videos_in_windows(named: Iterable[str | None], clip_ids: Collection[str]) -> dict[str, set[str]]:
    """Ids that are no clips themselves, as conversations name videos, -> the clips that are spans within them."""
    videos = {name for name in named if name is not None and name not in clip_ids}
    if not videos:
        return {}
    spans: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    media = {video.partition("#")[0] for video in videos}
    for clip_id in clip_ids:
        of_media, mark, _ = clip_id.partition("#t=")
        if mark and of_media in media:
            spans[of_media].append((*_span(clip_id), clip_id))
    found: dict[str, set[str]] = {}
    for video in videos:
        first, last = _span(video)
        inside = {each for start, end, each in spans[video.partition("#")[0]] if first <= start and end <= last}
        if inside:
            found[video] = inside
    return found


def _span(clip_id: str) -> tuple[float, float]:
    clip = clip_of_id(clip_id, "video")
    return clip.start_s or 0.0, math.inf if clip.end_s is None else clip.end_s

"""Which windows of a long video a sample is shown, and where their rows are in a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from featurestore.windows import WindowIndex, spread_windows, window_length
from mervcache.errors import UserError


class ShownWindows:
    """The windows of each video that a run reads: at most `limit`, spread evenly over it."""

    def __init__(self, clip_ids: Iterable[str], frame_rules: Iterable[str], limit: int | None) -> None:
        """`frame_rules` are those of the encoders' tokens; UserError where their windows differ in length."""
        lengths = {window_length(rule) for rule in frame_rules}
        if len(lengths) > 1:
            spans = sorted("whole clips" if length is None else f"windows of {float(length):g} s" for length in lengths)
            raise UserError(
                f"the encoders have tokens of {' and '.join(spans)}: name encoders of one kind with --encoders, as the"
                " store's keys have them"
            )
        self.length = next(iter(lengths), None)  # seconds; None: the tokens are of whole clips
        self._index = None if self.length is None else WindowIndex(clip_ids, self.length)
        self._limit = limit
        self._known: dict[str, tuple[str, ...]] = {}

    @property
    def exist(self) -> bool:
        """Whether the tokens are of windows."""
        return self._index is not None

    def of(self, clip_id: str) -> tuple[str, ...]:
        """The windows of a video, with or without tokens; of anything else itself."""
        if self._index is None:
            return (clip_id,)
        if clip_id not in self._known:
            windows = list(self._index.windows(clip_id).values())
            self._known[clip_id] = tuple(spread_windows(windows, self._limit)) or (clip_id,)
        return self._known[clip_id]


@dataclass(frozen=True)
class Rows:
    """Rows of several clips in a batch's tokens, one clip after the other; a video in windows has several."""

    counts: tuple[int, ...]  # of each clip

    def of(self, places: Sequence[int]) -> tuple[list[int], list[int]]:
        """First row and number of rows of the clips at these places; -1 and 0 for place -1, no clip."""
        firsts = [sum(self.counts[:place]) for place in range(len(self.counts))]
        return (
            [-1 if place < 0 else firsts[place] for place in places],
            [0 if place < 0 else self.counts[place] for place in places],
        )

    def taken(self, places: Sequence[int]) -> list[int]:
        """Every row of the clips at these places, in their order."""
        return [first + row for first, count in zip(*self.of(places), strict=True) for row in range(count)]

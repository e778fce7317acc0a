"""The same cell in several stores: which source's tokens stand for it.

Comes in: sources of cells, the first ones first. Goes out: for every clip of one encoder, where its cell is taken from.
A cell is the same where media (by sha256), span and identity are, whatever path a store knows the media by. So a clip
is also served by tokens that another source holds under another name, and is not served by tokens of other media that
another source holds under its own. A committed cell goes before a failed one, an earlier source before a later one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from featurestore.clips import Clip
from featurestore.share.cells import Cell, CellSource

Footage = tuple[str, str, float | None, float | None, int | None]  # kind, sha256 of the media, span


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where a clip's cell is taken from."""

    source: CellSource
    rank: int  # of the source among the sources, 0 first
    clip_id: str  # as the source knows it
    cell: Cell


Chosen = dict[str, Choice]  # by clip id of the new store


class CellChooser:
    """Chooses among sources, one group after the other, and counts."""

    def __init__(self, sources: Sequence[CellSource], clips: Mapping[str, Clip], removed: Collection[str] = ()) -> None:
        self._sources, self._clips, self._removed = sources, clips, removed  # `removed`: taken back by tombstones
        self.shared = 0  # cells that a later source holds as well
        self.differing = 0  # of these, cells whose bits differ: other devices
        self.renamed = 0  # cells taken from the same media under another name
        self.other_media = 0  # cells left aside: other media under the name of a clip
        # Receipts know the media; where there is one source only, nothing is compared and they need not be read.
        self._footage = [_footage(source) if len(sources) > 1 else {} for source in sources]
        self._clip_footage: dict[str, Footage] = {}
        for known in reversed(self._footage):
            self._clip_footage |= known  # the first source that knows it says what a clip is

    def choose(self, name: str) -> Chosen:
        """Choose for each clip the first source that committed its cell, else the first where it failed."""
        chosen: Chosen = {}
        by_footage: dict[Footage, Choice] = {}
        for rank, source in enumerate(self._sources):
            for clip_id, cell in source.cells(name).items() if name in source.groups() else ():
                choice = Choice(source=source, rank=rank, clip_id=clip_id, cell=cell)
                footage = self._footage[rank].get(clip_id) if cell.is_ok else None
                if footage and clip_id not in self._removed:
                    by_footage.setdefault(footage, choice)
                if clip_id not in self._clips:
                    continue
                if footage and footage != self._clip_footage[clip_id]:
                    self.other_media += 1
                else:
                    self._compare(chosen, clip_id, choice)
        self._take_renamed(chosen, by_footage)
        return chosen

    def _compare(self, chosen: Chosen, clip_id: str, choice: Choice) -> None:
        before = chosen.get(clip_id)
        if before is not None and before.cell.is_ok and choice.cell.is_ok:
            self.shared += 1
            self.differing += before.cell.digest != choice.cell.digest
        elif before is None or choice.cell.is_ok:
            chosen[clip_id] = choice

    def _take_renamed(self, chosen: Chosen, by_footage: Mapping[Footage, Choice]) -> None:
        """Clips that have no cell of their own, or a later source's, take that of the same media."""
        for clip_id in self._clips:
            footage = self._clip_footage.get(clip_id)
            twin = by_footage.get(footage) if footage else None
            if twin is not None and twin.clip_id != clip_id and _is_better(twin, chosen.get(clip_id)):
                self.renamed += 1
                chosen[clip_id] = twin


def _is_better(twin: Choice, own: Choice | None) -> bool:
    return own is None or not own.cell.is_ok or twin.rank < own.rank


def _footage(source: CellSource) -> dict[str, Footage]:
    """What the clips of a source show, where a receipt knows it."""
    media = source.media()
    return {
        clip.clip_id: (clip.kind, media[clip.clip_id], clip.start_s, clip.end_s, clip.end_frame)
        for clip in source.clips()
        if clip.clip_id in media
    }

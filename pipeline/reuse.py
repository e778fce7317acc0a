"""`--reuse`: copy cells that another store holds under the same identity instead of computing them.

The driver proposes clips of the same id, else of the same file name and span. The worker hashes the media that it would
decode and takes a cell only if the other store's was made of exactly these bytes; without `accept_damaged` also only if
no frames were substituted.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from featurestore.clips import Clip
from featurestore.identity import FeatureIdentity
from featurestore.transfer.merge import StoreCells, copy_cell
from mervcache.errors import MediaError
from pipeline.decode.sampling import has_substitutes
from pipeline.media import Root

if TYPE_CHECKING:
    from featurestore.group_writer import BlockWriter
    from pipeline.plan import PlannedBlock


@dataclass(frozen=True, kw_only=True)
class ReuseTask:
    """What a worker may copy into one block; small and picklable."""

    store: str
    snapshot: str
    cells: Mapping[str, Mapping[int, str]]  # encoder -> row here -> clip id there


class OtherStore:
    """The store that is copied from, in the driver."""

    def __init__(self, place: str) -> None:
        self._source = StoreCells(place)
        self._clips = {clip.clip_id: clip for clip in self._source.clips()}
        counted = Counter(map(_file_and_span, self._clips.values()))
        self._by_file = {key: name for name, clip in self._clips.items() if counted[key := _file_and_span(clip)] == 1}
        self._committed: dict[tuple[str, str], set[str]] = {}  # (kind, group) -> clips with tokens

    def proposals(self, identity: FeatureIdentity, clips: Iterable[Clip]) -> dict[str, str]:
        """Clip id here -> clip id there, of the clips that have committed tokens of this identity there."""
        found: dict[str, str] = {}
        for clip in clips:
            twin = clip.clip_id if clip.clip_id in self._clips else self._by_file.get(_file_and_span(clip))
            if twin is not None and twin in self._committed_clips(clip.kind, identity.group_name):
                found[clip.clip_id] = twin
        return found

    def task(self, block: PlannedBlock, identities: Mapping[str, FeatureIdentity]) -> ReuseTask | None:
        """What of a block may be copied; None if nothing."""
        cells: dict[str, dict[int, str]] = {}
        for encoder, rows in block.wanted.items():
            wanted = {row: clip for row, clip in block.rows if row in rows}
            twins = self.proposals(identities[encoder], wanted.values())
            if twins:
                cells[encoder] = {row: twins[clip.clip_id] for row, clip in wanted.items() if clip.clip_id in twins}
        place = self._source.provenance()
        return ReuseTask(store=place["store"], snapshot=place["snapshot"], cells=cells) if cells else None

    def _committed_clips(self, kind: str, group: str) -> set[str]:
        if (kind, group) not in self._committed:
            name = f"{kind}/{group}"
            cells = self._source.cells(name) if name in self._source.groups() else {}
            self._committed[kind, group] = {clip_id for clip_id, cell in cells.items() if cell.is_ok}
        return self._committed[kind, group]


def _file_and_span(clip: Clip) -> tuple:
    return (posixpath.basename(clip.path), clip.kind, clip.start_s, clip.end_s, clip.end_frame)


def copy_cells(
    task: ReuseTask,
    root: Root,
    clips: Mapping[int, Clip],
    kind: str,
    writers: Mapping[str, BlockWriter],
    groups: Mapping,
    *,
    accept_damaged: bool,
) -> dict[str, frozenset[int]]:
    """Copy what was made of the same bytes; returns the rows that need no computing, by encoder.

    Cells of damaged media, with substituted frames, are taken only where such frames are accepted.
    """
    from pipeline.media import Source

    source = _source(task.store, task.snapshot)
    copied: dict[str, frozenset[int]] = {}
    for encoder, cells in task.cells.items():
        name, writer, done = f"{kind}/{groups[encoder]}", writers[encoder], set()
        for row, clip_id in cells.items():
            try:
                digest = Source.find(root, clips[row].path).sha256()
            except (MediaError, OSError):
                continue  # decoding reports what is wrong with it
            loaded = source.load(name, clip_id, writer.specs)
            is_allowed = accept_damaged or not has_substitutes(loaded.outcome.decoder)
            if is_allowed and loaded.outcome.media_sha256 == digest:
                copy_cell(writer, row, loaded)
                done.add(row)
        copied[encoder] = frozenset(done)
    return copied


@lru_cache(2)
def _source(store: str, snapshot: str) -> StoreCells:
    return StoreCells(store, snapshot=snapshot)

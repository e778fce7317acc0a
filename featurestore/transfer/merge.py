"""Union and subset: cells of stores laid into a new one, nothing computed anew.

Of cells that several sources hold, the first source's wins; `same_cells.py` says which cells are the same. Encoded rows
are copied as they are where codecs agree, and every row is checked against its receipt's digest on the way. Clips that
were tried by the same encoders are given rows together: a block is committed whole or not at all, so a clip that an
encoder never saw must stay work to do, in a block of its own kind. Reasons of failure, conversations and journals come
along. Killed in the middle and run again, it goes on where it was: rows are given out in the same order.

Cells of a store: what one encoder made of one clip, with its outcome, ready to be laid into another store.

A cell is named by (encoder identity, clip id), whatever store it lies in. `StoreCells` reads them from a store at its
newest snapshot; `exported.py` reads the same from exported files.

The same cell in several stores: which source's tokens stand for it.

Comes in: sources of cells, the first ones first. Goes out: for every clip of one encoder, where its cell is taken from.
A cell is the same where media (by sha256), span and identity are, whatever path a store knows the media by. So a clip
is also served by tokens that another source holds under another name, and is not served by tokens of other media that
another source holds under its own. A committed cell goes before a failed one, an earlier source before a later one.

Selections: which encoders, datasets, clips, kinds and splits of a store are meant.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from featurestore.clips import KINDS, Clip, Sample
from featurestore.layout import block_of, journal_key, slot_of, tombstone_key
from featurestore.locate import Place, check_is_another
from featurestore.objects.base import put_if_absent
from featurestore.objects.open import in_parallel, open_objects
from featurestore.reader import ShardCache, decode_row, encode_row, encoder_keys
from featurestore.records import Receipt, RowOutcome, Tombstone, journal_bytes, read_receipt, row_digest
from featurestore.reference_clips import ReferenceClips, put_reference_clips, read_reference_clips
from featurestore.schemas import table_to_clips
from featurestore.snapshots import column, load_snapshot, read_snapshot_table
from featurestore.store import FeatureStore
from featurestore.writer import BlockWriter, GroupWriter, StoreWriter
from featurestore.zarr_metadata import ArraySpec, GroupRecord, read_arrays
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import StoreDamagedError, UserError, unknown_name
from mervcache.files import record_digest

MAX_RECEIPTS = 512  # kept at hand


@dataclass(frozen=True, kw_only=True)
class CellGroup(GroupRecord):
    """One encoder of one kind, as its cells' source has it."""

    codec: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is known of a clip and encoder without opening a shard."""

    is_ok: bool
    digest: str | None  # of the stored row, where ok


@dataclass(frozen=True, kw_only=True)
class LoadedCell:
    """A cell with its outcome and, where ok, its encoded chunks by array."""

    outcome: RowOutcome
    chunks: Mapping[str, bytes]


class CellSource(Protocol):
    """Where cells come from."""

    name: str
    block_rows: Mapping[str, int]
    parallel_reads: int

    def clips(self) -> list[Clip]: ...

    def groups(self) -> dict[str, CellGroup]: ...  # by "kind/group"

    def cells(self, name: str) -> dict[str, Cell]: ...  # by clip id: what was committed or failed

    def load(self, name: str, clip_id: str, specs: Mapping[str, ArraySpec]) -> LoadedCell: ...  # checked by digest

    def media(self) -> dict[str, str]: ...  # sha256 of the media by clip id, of clips that have tokens

    def canaries(self, name: str) -> ReferenceClips | None: ...  # of a group, checked by their digest

    def samples(self) -> dict[str, list[Sample]]: ...

    def journal(self) -> Iterable[tuple[str, dict[str, Any]]]: ...

    def provenance(self) -> dict[str, Any]: ...

    def tombstones(self) -> Iterable[Tombstone]: ...  # removals that hold wherever its clips go


class StoreCells:
    """The cells of a store at its newest snapshot, or the one named."""

    def __init__(self, place: Place, *, snapshot: str | None = None) -> None:
        self._store = FeatureStore.open(place, snapshot=snapshot, cache=False)
        self.name = self._store.path
        self._objects = open_objects(place)
        self._record = load_snapshot(self._objects, self._store.snapshot)
        self.block_rows = self._record.block_rows
        self.parallel_reads = self._objects.parallel_reads
        self._shards = ShardCache(self._objects)
        self._rows: dict[str, dict[str, tuple[int, bool]]] = {}  # "kind/group" -> clip id -> row, is it ok
        self._specs: dict[str, dict[str, ArraySpec]] = {}
        self._receipt = lru_cache(MAX_RECEIPTS)(self._read_receipt)
        self._kinds = {clip.clip_id: clip.kind for clip in self.clips()}

    def tombstones(self) -> list[Tombstone]:
        return list(self._store.tombstones.values())

    def clips(self) -> list[Clip]:
        names = ("dataset", "path", "kind", "start_s", "end_s", "end_frame")
        return [Clip(**record) for record in self._store.clips.select(names).to_pylist()]

    def groups(self) -> dict[str, CellGroup]:
        return {
            name: CellGroup(
                identity=summary.identity,
                weights=summary.weights,
                batch_shape=summary.batch_shape,
                codec=self._stored_specs(name)["tokens"].codec,
            )
            for name, summary in self._record.groups.items()
        }

    def cells(self, name: str) -> dict[str, Cell]:
        kind, group = name.split("/")
        columns = [column(group, suffix) for suffix in ("row", "digest", "failed_row")]
        table = read_snapshot_table(self._objects, self._record, ["clip_id", *columns])
        found: dict[str, Cell] = {}
        rows: dict[str, tuple[int, bool]] = {}
        for clip_id, row, digest, failed in zip(*(table[c].to_pylist() for c in table.column_names), strict=True):
            if self._kinds.get(clip_id) == kind and max(row, failed) >= 0:
                found[clip_id] = Cell(is_ok=row >= 0, digest=digest)
                rows[clip_id] = (row, True) if row >= 0 else (failed, False)
        self._rows[name] = rows
        return found

    def load(self, name: str, clip_id: str, specs: Mapping[str, ArraySpec]) -> LoadedCell:
        kind, group = name.split("/")
        if name not in self._rows:
            self.cells(name)
        row, is_ok = self._rows[name][clip_id]
        size = self.block_rows[kind]
        block, slot = block_of(row, size), slot_of(row, size)
        outcome = self._receipt(kind, group, block).outcome(row)
        if (outcome.state == "ok") != is_ok:
            raise StoreDamagedError(f"{self.name}: the receipt of {clip_id} and the snapshot differ; verify that store")
        chunks: dict[str, bytes] = {}
        stored: dict[str, np.ndarray] = {}
        for array, spec in self._stored_specs(name).items() if is_ok else ():
            shard = self._shards.get(kind, group, spec, block)
            chunk, items = shard.chunk(slot), shard.decode(slot)
            if chunk is None or items is None:
                raise StoreDamagedError(f"{self.name}: {clip_id} is missing in its shard; verify that store")
            stored[array] = items
            same = specs[array].codec == spec.codec
            chunks[array] = chunk.tobytes() if same else encode_row(specs[array], items)
        check_cell(self.name, clip_id, outcome, stored)
        return LoadedCell(outcome=outcome, chunks=chunks)

    def media(self) -> dict[str, str]:
        """Read from receipts; one encoder's are enough where it has all clips."""
        found: dict[str, str] = {}
        for name in self._record.groups:
            kind, group = name.split("/")
            size, wanted = self.block_rows[kind], defaultdict(list)
            self.cells(name)
            for clip_id, (row, is_ok) in self._rows[name].items():
                if is_ok and clip_id not in found:
                    wanted[block_of(row, size)].append((row, clip_id))
            read = partial(self._receipt, kind, group)
            for receipt in in_parallel(read, sorted(wanted), self.parallel_reads):
                for row, clip_id in wanted[receipt.block]:
                    if sha256 := receipt.outcome(row).media_sha256:
                        found[clip_id] = sha256
        return found

    def canaries(self, name: str) -> ReferenceClips | None:
        if name not in self._record.canaries:
            return None
        return read_reference_clips(self._objects, name.split("/")[0], self._record.groups[name].identity)

    def samples(self) -> dict[str, list[Sample]]:
        return {name: self._store.samples(name) for name in self._store.sample_names}

    def journal(self) -> Iterable[tuple[str, dict[str, Any]]]:
        return self._store.journal()

    def provenance(self) -> dict[str, Any]:
        return {"store": self.name, "snapshot": self._store.snapshot}

    def _stored_specs(self, name: str) -> dict[str, ArraySpec]:
        if name not in self._specs:
            kind = name.split("/")[0]
            identity = self._record.groups[name].identity
            self._specs[name] = read_arrays(self._objects, kind, identity, self.block_rows[kind])
        return self._specs[name]

    def _read_receipt(self, kind: str, group: str, block: int) -> Receipt:
        return read_receipt(self._objects, kind, group, block, self.block_rows[kind])


def check_cell(source: str, clip_id: str, outcome: RowOutcome, stored: Mapping[str, np.ndarray]) -> None:
    """Refuse tokens that are not the ones that were committed."""
    if outcome.state == "ok" and row_digest(stored) != outcome.digest:
        raise StoreDamagedError(f"{source}: the tokens of {clip_id} differ from their digest; verify it, then repair")


def decoded_cell(cell: LoadedCell, specs: Mapping[str, ArraySpec]) -> dict[str, np.ndarray]:
    """Stored items of an ok cell, by array."""
    stored: dict[str, np.ndarray] = {}
    for name, spec in specs.items():
        stored[name] = np.empty(spec.row_shape, dtype=spec.dtype)
        decode_row(spec, np.frombuffer(cell.chunks[name], dtype=np.uint8), stored[name])
    return stored


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


@dataclass(frozen=True, kw_only=True)
class Selection:
    """None means all of them."""

    encoders: tuple[str, ...] | None = None  # keys as `FeatureStore.encoders` has them; a bare name: every identity
    datasets: tuple[str, ...] | None = None
    clips: frozenset[str] | None = None  # clip ids
    kind: str | None = None
    split: str | None = None  # "train" or "heldout": conversations of this split, and the clips that they speak of
    spoken_of: frozenset[str] | None = None  # clip ids of the split, once conversations were seen: `with_samples`

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise UserError(unknown_name("kind", self.kind, KINDS))

    @property
    def takes_all_clips(self) -> bool:
        return self.datasets is None and self.clips is None and self.kind is None

    @property
    def is_whole(self) -> bool:
        return self.encoders is None and self.takes_all_clips and self.split is None

    def with_samples(self, samples: Iterable[Sample]) -> Selection:
        """This selection, knowing which clips the conversations of its split speak of."""
        if self.split is None:
            return self
        splits: dict[str, set[str]] = {}
        for sample in samples:
            splits.setdefault(sample.split, set()).update([sample.clip_id] if sample.clip_id else [])
        if self.split not in splits:
            raise UserError(unknown_name("split", self.split, sorted(splits)))
        return replace(self, spoken_of=frozenset(splits[self.split]))

    def takes_sample(self, sample: Sample, clips: Container[str]) -> bool:
        """Conversations about `clips`, the clips taken; those about none where nothing else narrows the clips."""
        is_of_split = self.split in (None, sample.split)
        return is_of_split and (sample.clip_id in clips if sample.clip_id else self.takes_all_clips)

    def takes(self, clip: Clip) -> bool:
        return (
            (self.datasets is None or clip.dataset in self.datasets)
            and (self.clips is None or clip.clip_id in self.clips)
            and (self.kind is None or clip.kind == self.kind)
            and (self.spoken_of is None or clip.clip_id in self.spoken_of)
        )

    def groups(self, keys: dict[str, str]) -> list[str]:
        """Group names of the encoders meant; `keys` is encoder key -> group name."""
        if self.encoders is None:
            return list(keys.values())
        found: dict[str, str] = {}
        for asked in self.encoders:
            mine = {key: group for key, group in keys.items() if asked in (key, key.split("@")[0])}
            if not mine:
                raise UserError(unknown_name("encoder", asked, keys))
            found |= mine
        return list(found.values())

    def check(self, clips: Iterable[Clip]) -> None:
        """Refuse names that no clip has: a typing mistake would otherwise give an empty store."""
        clips = list(clips)
        if self.datasets is not None:
            known = sorted({clip.dataset for clip in clips})
            for name in self.datasets:
                if name not in known:
                    raise UserError(unknown_name("dataset", name, known))
        if self.clips is not None:
            absent = sorted(self.clips - {clip.clip_id for clip in clips})
            if absent:
                raise UserError(f"{len(absent)} of the {len(self.clips)} clips are not there, one is {absent[0]!r}")


def read_clip_list(path: str | Path) -> frozenset[str]:
    """Clip ids, one a line; empty lines are skipped."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise UserError(f"the list of clips {path} cannot be read: {error.strerror}") from error
    if not any(lines):
        raise UserError(f"the list of clips {path} is empty: give one clip id a line, as `store.clips` has them")
    return frozenset(line.strip() for line in lines if line.strip())


@dataclass(kw_only=True)
class Combined:
    """What was laid out."""

    store: str
    sources: list[str]
    snapshot: str = ""
    clips: int = 0
    removed: int = 0  # clips that tombstones of the sources keep out, whatever store still has them
    cells: int = 0  # committed and failed ones that the sources have, each once
    copied: int = 0  # in this run
    blocks: int = 0  # in this run
    shared: int = 0  # cells that several sources hold
    differing: int = 0  # of these, cells whose bits differ (other devices): the first source's stand
    renamed: int = 0  # cells taken from the same media, which a source has under another name
    other_media: int = 0  # cells left aside: a later source has other media under the name of a clip
    samples: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Content:
    """What goes into the new store, chosen among the sources; nothing is written for it."""

    stones: list[Tombstone]  # removals that the sources know of
    removed: frozenset[str]  # clip ids that they name
    clips: Mapping[str, Clip]  # by id
    groups: Mapping[str, CellGroup]  # by "kind/group"
    chosen: Mapping[str, Chosen]  # by "kind/group", of those that have cells
    chooser: CellChooser  # what it counted


def combine(
    sources: Sequence[CellSource],
    out: Place,
    *,
    selection: Selection | None = None,
    progress: ProgressLine = SILENT,
) -> Combined:
    """Lay the selected cells of the sources into `out`, a new store or one that an interrupted run left."""
    for source in sources:
        check_is_another(source.name, out)
    asked = selection or Selection()
    selection = asked.with_samples(
        sample for source in sources for each in source.samples().values() for sample in each
    )
    content = _choose(sources, selection)
    done = _summary(sources, out, content)
    writer = StoreWriter.open_or_create(out, block_rows=dict(sources[0].block_rows))
    _give_out_rows(writer, content, out)
    progress.start(done.cells)
    for name, chosen in content.chosen.items():
        _fill_group(writer, name, content.groups[name], chosen, done, progress)
        _take_reference_clips(writer, name, sources)
    done.samples = _samples(writer, sources, content.clips, selection)
    _journal(writer, sources, asked)
    done.snapshot = writer.publish_snapshot()
    return done


def _choose(sources: Sequence[CellSource], selection: Selection) -> _Content:
    stones = [stone for source in sources for stone in source.tombstones()]
    removed = frozenset(clip for stone in stones for clip in stone.clips)
    listed = _clips(sources, selection)
    clips = {clip_id: clip for clip_id, clip in listed.items() if clip_id not in removed}
    groups = _groups(sources, selection)
    chooser = CellChooser(sources, clips, removed)
    chosen = {name: cells for name in groups if (cells := chooser.choose(name))}
    return _Content(stones=stones, removed=removed, clips=clips, groups=groups, chosen=chosen, chooser=chooser)


def _summary(sources: Sequence[CellSource], out: Place, content: _Content) -> Combined:
    return Combined(
        store=str(out),
        sources=[source.name for source in sources],
        clips=len(content.clips),
        removed=len(content.removed),
        cells=sum(map(len, content.chosen.values())),
        shared=content.chooser.shared,
        differing=content.chooser.differing,
        renamed=content.chooser.renamed,
        other_media=content.chooser.other_media,
    )


def _give_out_rows(writer: StoreWriter, content: _Content, out: Place) -> None:
    """Rows for the clips, those that were tried alike together; removals first, so that none is shown."""
    for stone in content.stones:  # what one source took back is in none of the others' cells either
        put_if_absent(writer.objects, tombstone_key(stone.id), stone.to_bytes())
    _refuse_other_clips(writer, content.clips, out)
    for together in _tried_alike(content.clips, content.chosen):
        writer.add_clips(together)


def _clips(sources: Sequence[CellSource], selection: Selection) -> dict[str, Clip]:
    listed: dict[str, Clip] = {}
    for source in sources:
        for clip in source.clips():
            listed.setdefault(clip.clip_id, clip)
    selection.check(listed.values())
    return {clip_id: clip for clip_id, clip in listed.items() if selection.takes(clip)}


def _groups(sources: Sequence[CellSource], selection: Selection) -> dict[str, CellGroup]:
    found: dict[str, CellGroup] = {}
    for source in sources:
        for name, group in source.groups().items():
            found.setdefault(name, group)
    wanted = set(selection.groups(encoder_keys(found)))
    kinds = (selection.kind,) if selection.kind else ("video", "image")
    return {
        name: group
        for name, group in sorted(found.items())
        if name.split("/")[1] in wanted and name.split("/")[0] in kinds
    }


def _tried_alike(clips: Mapping[str, Clip], chosen: Mapping[str, Chosen]) -> list[list[Clip]]:
    """Clips by the encoders that tried them, in the order in which such clips first appear."""
    alike: dict[tuple[str, ...], list[Clip]] = {}
    for clip_id, clip in clips.items():
        tried = tuple(name for name, cells in chosen.items() if clip_id in cells)
        alike.setdefault(tried, []).append(clip)
    return list(alike.values())


def _refuse_other_clips(writer: StoreWriter, clips: Mapping[str, Clip], out: Place) -> None:
    other = set(writer.clips()["clip_id"].to_pylist()) - set(clips)
    if other:
        raise UserError(
            f"{out} holds {len(other)} clips that this would not put there, one is {min(other)!r}: give a new path"
        )


def _fill_group(
    writer: StoreWriter,
    name: str,
    group: CellGroup,
    chosen: Chosen,
    done: Combined,
    progress: ProgressLine,
) -> None:
    kind = name.split("/")[0]
    rows: dict[int, list[tuple[int, Clip]]] = {}
    for row, clip in table_to_clips(writer.clips()):
        if clip.kind == kind and clip.clip_id in chosen:
            rows.setdefault(block_of(row, writer.block_rows[kind]), []).append((row, clip))
    target = _open_group(writer, kind, group)
    missing = set(target.missing_blocks())
    for block, planned in sorted(rows.items()):
        if block in missing:
            _fill_block(target, target.begin(block, [row for row, _ in planned]), name, planned, chosen)
            done.blocks += 1
            done.copied += len(planned)
        progress.advance(len(planned))


def _take_reference_clips(writer: StoreWriter, name: str, sources: Sequence[CellSource]) -> None:
    """Copy the canaries of the first source that has some."""
    for source in sources:
        if name in source.groups() and (canaries := source.canaries(name)):
            put_reference_clips(writer.objects, canaries)
            return


def _open_group(writer: StoreWriter, kind: str, group: CellGroup) -> GroupWriter:
    if group.identity.group_name in writer.encoder_groups(kind):
        target = writer.open_group(kind, group.identity.group_name)
        target.grow()
        return target
    return writer.ensure_group(
        kind,
        group.identity,
        batch_shape=group.batch_shape,
        weights_label=group.weights,
        codec=group.codec,
        new_identity=True,
    )


def _fill_block(
    target: GroupWriter, block: BlockWriter, name: str, planned: list[tuple[int, Clip]], chosen: Chosen
) -> None:
    def load(clip: Clip) -> LoadedCell:
        choice = chosen[clip.clip_id]
        return choice.source.load(name, choice.clip_id, target.specs)

    width = max(chosen[clip.clip_id].source.parallel_reads for _, clip in planned)
    loaded = in_parallel(load, [clip for _, clip in planned], width)
    for (row, _), cell in zip(planned, loaded, strict=True):
        copy_cell(block, row, cell)
    receipt = block.commit()
    for (row, clip), cell in zip(planned, loaded, strict=True):
        found = receipt.outcome(row)
        if (found.state, found.digest) != (cell.outcome.state, cell.outcome.digest):
            raise StoreDamagedError(f"the new store holds other tokens of {clip.clip_id}; remove it and run again")


def copy_cell(block: BlockWriter, row: int, cell: LoadedCell) -> None:
    """A cell of another store into a row of a block in the making."""
    outcome = cell.outcome
    if outcome.state == "ok":
        block.add_chunks(row, cell.chunks, media_sha256=outcome.media_sha256, decoder=outcome.decoder)
    else:
        block.fail(
            row,
            outcome.reason or "",
            media_sha256=outcome.media_sha256,
            decoder=outcome.decoder,
            scope=outcome.scope or "clip",
        )


def _samples(
    writer: StoreWriter, sources: Sequence[CellSource], clips: Mapping[str, Clip], selection: Selection
) -> dict[str, int]:
    """Conversations of the clips taken, and those without a clip where all clips are; the first source's wins."""
    merged: dict[str, dict[tuple[str, str | None], Sample]] = {}
    for source in sources:
        for name, samples in source.samples().items():
            mine = merged.setdefault(name, {})
            for sample in samples:
                if selection.takes_sample(sample, clips):
                    mine.setdefault((sample.sample_id, sample.clip_id), sample)
    for name, samples in merged.items():
        if samples:
            writer.add_samples(name, samples.values())
    return {name: len(samples) for name, samples in merged.items() if samples}


def _journal(writer: StoreWriter, sources: Sequence[CellSource], selection: Selection) -> None:
    """The sources' journals under their names, and one of this: no times in it, so that a second run adds nothing."""
    told: dict[str, Any] = {
        "combined from": [source.provenance() for source in sources],
        "selection": {
            name: sorted(value) if isinstance(value, frozenset) else value
            for name, value in asdict(selection).items()
            if value is not None or name not in ("split", "spoken_of")  # younger than the first such journals
        },
    }
    named = [(name, record) for source in sources for name, record in source.journal()]
    for name, record in [*named, (f"combine-{_short_digest(told)}", told)]:
        data = journal_bytes(record)
        key = journal_key(name)
        if not put_if_absent(writer.objects, key, data) and writer.objects.get(key) != data:
            put_if_absent(writer.objects, journal_key(f"{name[:190]}-{_short_digest(record)}"), data)


def _short_digest(record: Any) -> str:
    return record_digest(record)[:12]

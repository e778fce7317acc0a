"""Union and subset: cells of stores copied into a new one; nothing is computed.

A cell is what one encoder made of one clip, with its outcome. Of a cell that several sources hold, the first source's
is taken; it is the same where media (by sha256), span and identity are, whatever path a store knows the media by. Clips
tried by the same encoders get rows together, so that what an encoder never saw is a missing block and stays work to do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa

from featurestore.clips import KINDS, Clip, Sample
from featurestore.group_writer import BlockWriter
from featurestore.layout import block_of, journal_key, slot_of, tombstone_key
from featurestore.locate import Place, check_is_another
from featurestore.objects.base import put_if_absent
from featurestore.objects.open import in_parallel, open_objects
from featurestore.records import Receipt, RowOutcome, Tombstone, journal_bytes, read_receipt, row_digest
from featurestore.reference_clips import ReferenceClips, put_reference_clips, read_reference_clips
from featurestore.schemas import CLIP_SCHEMA, table_to_clips
from featurestore.shards import ShardCache, decode_row, encode_row
from featurestore.snapshots import ClipIndex, SnapshotTable, column, load_snapshot, read_snapshot_table
from featurestore.store import FeatureStore
from featurestore.transfer.selection import Selection, windowed_videos
from featurestore.writer import StoreWriter
from featurestore.zarr_metadata import ArraySpec, GroupRecord, read_arrays
from mervcache.console import SILENT, ProgressLine
from mervcache.errors import StoreDamagedError, UserError
from mervcache.files import record_digest
from mervcache.text import redact_all

MAX_RECEIPTS = 512  # kept in memory


@dataclass(frozen=True, kw_only=True)
class CellGroup(GroupRecord):
    """One encoder of one kind in a source of cells."""

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
    """Where cells come from: `StoreCells`, or `ExportCells` of exported files."""

    name: str
    block_rows: Mapping[str, int]
    parallel_reads: int

    def clips(self) -> list[Clip]: ...

    def groups(self) -> dict[str, CellGroup]: ...  # by "kind/group"

    def cells(self, name: str) -> dict[str, Cell]: ...  # of a "kind/group", by clip id: committed or failed

    def load(self, name: str, clip_id: str, specs: Mapping[str, ArraySpec]) -> LoadedCell: ...  # checked by digest

    def media(self) -> dict[str, str]: ...  # clip id -> sha256 of the media, of clips that have tokens

    def reference_clips(self, name: str) -> ReferenceClips | None: ...  # of a group, checked by their digest

    def samples(self) -> dict[str, list[Sample]]: ...

    def journal(self) -> Iterable[tuple[str, dict[str, Any]]]: ...

    def provenance(self) -> dict[str, Any]: ...

    def tombstones(self) -> Iterable[Tombstone]: ...


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
        kinds = read_snapshot_table(self._objects, self._record, ["kind"])["kind"]
        self._is_video = kinds.to_numpy(zero_copy_only=False) == "video"
        parts = ClipIndex(self._objects, self.block_rows).refresh().tables[: len(self._record.parts)]
        self._allocated = SnapshotTable.extend(None, pa.concat_tables(parts or [CLIP_SCHEMA.empty_table()]))

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
        self._check_rows(kind, [table[name].to_numpy() for name in (columns[0], columns[2])])
        cells: dict[str, Cell] = {}
        rows: dict[str, tuple[int, bool]] = {}
        for clip_id, row, digest, failed in zip(*(table[c].to_pylist() for c in table.column_names), strict=True):
            if self._kinds.get(clip_id) == kind and max(row, failed) >= 0:
                cells[clip_id] = Cell(is_ok=row >= 0, digest=digest)
                rows[clip_id] = (row, True) if row >= 0 else (failed, False)
        self._rows[name] = rows
        return cells

    def _check_rows(self, kind: str, columns: Iterable[np.ndarray]) -> None:
        """Refuse a snapshot that gives a clip the rows of another one: digests hold for those as well."""
        for rows in columns:
            lines, is_kind = np.arange(len(rows)), self._is_video == (kind == "video")
            if (is_kind & (rows >= 0) & (self._allocated.lines(kind, rows) != lines)).any():
                raise StoreDamagedError(
                    f"{self.name}: the snapshot gives clips the rows of others; run `merv-pipeline verify --full`"
                )

    def load(self, name: str, clip_id: str, specs: Mapping[str, ArraySpec]) -> LoadedCell:
        """The cell, its chunks as they are stored where the codecs agree, else encoded as in `specs`."""
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
        media: dict[str, str] = {}
        for name in self._record.groups:
            kind, group = name.split("/")
            wanted: dict[int, list[tuple[int, str]]] = defaultdict(list)  # block -> rows and clip ids
            self.cells(name)
            for clip_id, (row, is_ok) in self._rows[name].items():
                if is_ok and clip_id not in media:
                    wanted[block_of(row, self.block_rows[kind])].append((row, clip_id))
            read = partial(self._receipt, kind, group)
            for receipt in in_parallel(read, sorted(wanted), self.parallel_reads):
                for row, clip_id in wanted[receipt.block]:
                    if sha256 := receipt.outcome(row).media_sha256:
                        media[clip_id] = sha256
        return media

    def reference_clips(self, name: str) -> ReferenceClips | None:
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
            kind, identity = name.split("/")[0], self._record.groups[name].identity
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


def copy_cell(block: BlockWriter, row: int, cell: LoadedCell) -> None:
    """Put a cell of another store into a row of a block in progress."""
    outcome = cell.outcome
    origin = {"media_sha256": outcome.media_sha256, "decoder": outcome.decoder}
    if outcome.state == "ok":
        block.add_chunks(row, cell.chunks, **origin)
    else:
        block.fail(row, outcome.reason or "", scope=outcome.scope or "clip", **origin)


Footage = tuple[str, str, float | None, float | None, int | None]  # kind, sha256 of the media, span


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where a clip's cell is taken from."""

    source: CellSource
    rank: int  # of the source among the sources, 0 first
    clip_id: str  # in the source
    cell: Cell


Chosen = dict[str, Choice]  # by clip id of the new store


class CellChooser:
    """Chooses among sources, one group after another, and counts.

    A committed cell is preferred to a failed one, an earlier source to a later one. A clip may take the tokens of the
    same media under another name, and takes none of other media under its own.
    """

    def __init__(self, sources: Sequence[CellSource], clips: Mapping[str, Clip], removed: Collection[str] = ()) -> None:
        self._sources, self._clips, self._removed = sources, clips, removed  # `removed`: ids that tombstones name
        self.shared = 0  # cells that a later source holds as well
        self.differing = 0  # of these, cells whose bits differ: other devices
        self.renamed = 0  # cells taken from the same media under another name
        self.other_media = 0  # cells left out: other media under the name of a clip
        self._footage: list[dict[str, Footage]] = []  # by source: clip id -> what it shows, where a receipt has it
        for source in sources:
            media = source.media() if len(sources) > 1 else {}  # of one source, nothing is compared
            footage = {
                clip.clip_id: (clip.kind, media[clip.clip_id], clip.start_s, clip.end_s, clip.end_frame)
                for clip in source.clips()
                if clip.clip_id in media
            }
            self._footage.append(footage)
        self._clip_footage: dict[str, Footage] = {}  # the first source that has it decides
        for footage in reversed(self._footage):
            self._clip_footage |= footage

    def choose(self, name: str) -> Chosen:
        """For each clip the first source that committed its cell, else the first where it failed."""
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
                before = chosen.get(clip_id)
                if footage and footage != self._clip_footage[clip_id]:
                    self.other_media += 1
                elif before is not None and before.cell.is_ok and cell.is_ok:
                    self.shared += 1
                    self.differing += before.cell.digest != cell.digest
                elif before is None or cell.is_ok:
                    chosen[clip_id] = choice
        for clip_id in self._clips:
            twin = by_footage.get(self._clip_footage[clip_id]) if clip_id in self._clip_footage else None
            if twin is None or twin.clip_id == clip_id:
                continue
            own = chosen.get(clip_id)
            if own is None or not own.cell.is_ok or twin.rank < own.rank:
                self.renamed += 1
                chosen[clip_id] = twin
        return chosen


@dataclass(kw_only=True)
class Combined:
    """What was copied."""

    store: str
    sources: list[str]
    snapshot: str = ""
    clips: int = 0
    removed: int = 0  # clips that tombstones of the sources keep out, whatever store still has them
    cells: int = 0  # committed and failed ones of the sources, each once
    copied: int = 0  # in this run
    blocks: int = 0  # in this run
    shared: int = 0  # cells that several sources hold
    differing: int = 0  # of these, cells whose bits differ (other devices): the first source's are taken
    renamed: int = 0  # cells taken from the same media, which a source has under another name
    other_media: int = 0  # cells left out: a later source has other media under the name of a clip
    samples: dict[str, int] = field(default_factory=dict)


def combine(
    sources: Sequence[CellSource],
    out: Place,
    *,
    selection: Selection | None = None,
    progress: ProgressLine = SILENT,
) -> Combined:
    """Copy the selected cells of the sources into `out`, a new store or one that an interrupted run left."""
    for source in sources:
        check_is_another(source.name, out)
    requested = selection or Selection()
    videos = windowed_videos(sources)
    samples = (sample for source in sources for named in source.samples().values() for sample in named)
    selection = requested.with_samples(samples, videos)
    tombstones = [tombstone for source in sources for tombstone in source.tombstones()]
    removed = frozenset(clip for tombstone in tombstones for clip in tombstone.clips)
    clips = _selected_clips(sources, selection, removed)
    groups = _selected_groups(sources, selection)
    chooser = CellChooser(sources, clips, removed)
    chosen = {name: cells for name in groups if (cells := chooser.choose(name))}
    done = Combined(
        store=str(out),
        sources=[source.name for source in sources],
        clips=len(clips),
        removed=len(removed),
        cells=sum(map(len, chosen.values())),
        shared=chooser.shared,
        differing=chooser.differing,
        renamed=chooser.renamed,
        other_media=chooser.other_media,
    )
    writer = StoreWriter.open_or_create(out, block_rows=dict(sources[0].block_rows))
    for tombstone in tombstones:  # first: what one source removed is taken from none of the others
        put_if_absent(writer.objects, tombstone_key(tombstone.id), tombstone.to_bytes())
    _allocate_rows(writer, clips, chosen, out)
    progress.start(done.cells)
    for name, cells in chosen.items():
        _fill_group(writer, name, groups[name], cells, done, progress)
        for source in sources:
            if name in source.groups() and (reference_clips := source.reference_clips(name)):
                put_reference_clips(writer.objects, reference_clips)
                break
    taken = clips.keys() | {video for video, windows in videos.items() if windows & clips.keys()}
    done.samples = _copy_samples(writer, sources, taken, selection)
    _write_journal(writer, sources, requested)
    done.snapshot = writer.publish_snapshot()
    return done


def _selected_clips(sources: Sequence[CellSource], selection: Selection, removed: Container[str]) -> dict[str, Clip]:
    listed: dict[str, Clip] = {}
    for source in sources:
        for clip in source.clips():
            listed.setdefault(clip.clip_id, clip)
    selection.check(listed.values())
    return {clip_id: clip for clip_id, clip in listed.items() if selection.takes(clip) and clip_id not in removed}


def _selected_groups(sources: Sequence[CellSource], selection: Selection) -> dict[str, CellGroup]:
    groups: dict[str, CellGroup] = {}
    for source in sources:
        for name, group in source.groups().items():
            groups.setdefault(name, group)
    selected = selection.groups(group.identity for group in groups.values())
    kinds = (selection.kind,) if selection.kind else KINDS
    kind_and_group = {name: tuple(name.split("/")) for name in groups}
    return {
        name: groups[name]
        for name, (kind, group) in sorted(kind_and_group.items())
        if group in selected and kind in kinds
    }


def _allocate_rows(writer: StoreWriter, clips: Mapping[str, Clip], chosen: Mapping[str, Chosen], out: Place) -> None:
    """Rows for the clips, those tried by the same encoders together, in the order in which such clips first appear."""
    other = set(writer.clips()["clip_id"].to_pylist()) - set(clips)
    if other:
        raise UserError(
            f"{out} holds {len(other)} clips that are not selected here, one is {min(other)!r}: give a new path"
        )
    tried_alike: dict[tuple[str, ...], list[Clip]] = {}
    for clip_id, clip in clips.items():
        tried = tuple(name for name, cells in chosen.items() if clip_id in cells)
        tried_alike.setdefault(tried, []).append(clip)
    for together in tried_alike.values():
        writer.add_clips(together)


def _fill_group(
    writer: StoreWriter, name: str, group: CellGroup, chosen: Chosen, done: Combined, progress: ProgressLine
) -> None:
    """Copy the chosen cells of a group into its missing blocks, and compare the receipts with the sources'."""
    kind = name.split("/")[0]
    rows: dict[int, list[tuple[int, Clip]]] = defaultdict(list)  # block -> its rows
    for row, clip in table_to_clips(writer.clips()):
        if clip.kind == kind and clip.clip_id in chosen:
            rows[block_of(row, writer.block_rows[kind])].append((row, clip))
    if group.identity.group_name in writer.encoder_groups(kind):
        target = writer.open_group(kind, group.identity.group_name)
        target.grow()
    else:
        target = writer.ensure_group(
            kind,
            group.identity,
            batch_shape=group.batch_shape,
            weights_label=group.weights,
            codec=group.codec,
            new_identity=True,
        )
    missing = set(target.missing_blocks())

    def load(planned: tuple[int, Clip]) -> LoadedCell:
        choice = chosen[planned[1].clip_id]
        return choice.source.load(name, choice.clip_id, target.specs)

    for block, planned in sorted(rows.items()):
        if block in missing:
            width = max(chosen[clip.clip_id].source.parallel_reads for _, clip in planned)
            cells = in_parallel(load, planned, width)
            block_writer = target.begin(block, [row for row, _ in planned])
            for (row, _), cell in zip(planned, cells, strict=True):
                copy_cell(block_writer, row, cell)
            receipt = block_writer.commit()
            for (row, clip), cell in zip(planned, cells, strict=True):
                outcome = receipt.outcome(row)
                if (outcome.state, outcome.digest) != (cell.outcome.state, cell.outcome.digest):
                    raise StoreDamagedError(
                        f"the new store holds other tokens of {clip.clip_id}; remove it and run again"
                    )
            done.blocks += 1
            done.copied += len(planned)
        progress.advance(len(planned))


def _copy_samples(
    writer: StoreWriter, sources: Sequence[CellSource], clips: Container[str], selection: Selection
) -> dict[str, int]:
    """Conversations that the selection takes, the first source's where several have one; returns counts by name."""
    merged: dict[str, dict[tuple[str, str | None], Sample]] = defaultdict(dict)
    for source in sources:
        for name, samples in source.samples().items():
            for sample in samples:
                if selection.takes_sample(sample, clips):
                    merged[name].setdefault((sample.sample_id, sample.clip_id), sample)
    for name, samples in merged.items():
        writer.add_samples(name, samples.values())
    return {name: len(samples) for name, samples in merged.items()}


def _write_journal(writer: StoreWriter, sources: Sequence[CellSource], selection: Selection) -> None:
    """The sources' journals under their names, and one of this: without times, so that a second run adds nothing."""
    combined: dict[str, Any] = {
        "combined from": [source.provenance() for source in sources],
        "selection": {
            name: sorted(cast("frozenset[str]", value)) if isinstance(value, frozenset) else value
            for name, value in asdict(selection).items()
            if value is not None or name not in ("split", "spoken_of")  # absent in the first such journals
        },
    }
    records = [entry for source in sources for entry in source.journal()]
    for name, record in [*records, (f"combine-{record_digest(combined)[:12]}", combined)]:
        data, key = journal_bytes(redact_all(record)), journal_key(name)
        if not put_if_absent(writer.objects, key, data) and writer.objects.get(key) != data:
            put_if_absent(writer.objects, journal_key(f"{name[:190]}-{record_digest(record)[:12]}"), data)

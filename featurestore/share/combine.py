"""Union and subset: cells of stores laid into a new one, nothing computed anew.

Of cells that several sources hold, the first source's wins; `same_cells.py` says which cells are the same. Encoded rows
are copied as they are where codecs agree, and every row is checked against its receipt's digest on the way. Clips that
were tried by the same encoders are given rows together: a block is committed whole or not at all, so a clip that an
encoder never saw must stay work to do, in a block of its own kind. Reasons of failure, conversations and journals come
along. Killed in the middle and run again, it goes on where it was: rows are given out in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from featurestore.blocks import BlockWriter
from featurestore.canaries import put_canaries
from featurestore.clips import Clip
from featurestore.columns import table_to_clips
from featurestore.digests import record_digest
from featurestore.errors import StoreDamagedError, UserError
from featurestore.find import Place, check_is_another
from featurestore.groups import GroupWriter
from featurestore.journal import journal_bytes
from featurestore.layout import block_of, journal_key, tombstone_key
from featurestore.lookup import encoder_keys
from featurestore.places.by_url import in_parallel
from featurestore.places.objects import put_if_absent
from featurestore.progress import SILENT, Progress
from featurestore.samples import Sample
from featurestore.share.cells import CellGroup, CellSource, LoadedCell
from featurestore.share.same_cells import CellChooser, Chosen
from featurestore.share.selection import Selection
from featurestore.tombstones import Tombstone
from featurestore.writer import StoreWriter


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
    progress: Progress = SILENT,
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
        _take_canaries(writer, name, sources)
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
    progress: Progress,
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


def _take_canaries(writer: StoreWriter, name: str, sources: Sequence[CellSource]) -> None:
    """Copy the canaries of the first source that has some."""
    for source in sources:
        if name in source.groups() and (canaries := source.canaries(name)):
            put_canaries(writer.objects, canaries)
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
        lay_cell(block, row, cell)
    receipt = block.commit()
    for (row, clip), cell in zip(planned, loaded, strict=True):
        found = receipt.outcome(row)
        if (found.state, found.digest) != (cell.outcome.state, cell.outcome.digest):
            raise StoreDamagedError(f"the new store holds other tokens of {clip.clip_id}; remove it and run again")


def lay_cell(block: BlockWriter, row: int, cell: LoadedCell) -> None:
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

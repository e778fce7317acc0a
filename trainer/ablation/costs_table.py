"""What the runs of a table cost: visual tokens, parameters, FLOPs, step time, bytes read, effective ranks.

A row is a setting and a subset of encoders. Seeds share all figures but the step time and the rank behind a projector,
which are means over seeds. What cannot be had, because a store or an LLM is elsewhere, is left out with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from featurestore.locate import is_url
from mervcache.console import ProgressLine
from mervcache.errors import MervCacheError
from trainer.ablation.costs import StepReading, StepTime, run_step_time, step_reading
from trainer.ablation.document import Cell, Column, NotComputed, Row, Section
from trainer.ablation.flops import NOT_COUNTED, Cost, mean_text_tokens, run_cost
from trainer.ablation.importance import SETTING
from trainer.ablation.panel import seeds_text
from trainer.ablation.rank import EncoderRanks, SweepRanks, ranks_of_runs
from trainer.ablation.results import RETRAINED, VISUAL_SETTING, Member, Results, Setting, Subset, subset_name
from trainer.ablation.sweep import NESTED, ONE_SHOT, run_folder
from trainer.config import CONFIG_FILE, RECORD_FILE
from trainer.runs.run_record import RunRecord
from trainer.runs.stage_folders import last_stage

COSTED = (RETRAINED, ONE_SHOT, NESTED)  # a masked encoder is computed all the same, so post-hoc runs have no row
NO_TEXT = "no metrics say how long a text is; give --text-tokens"

Place = tuple[str, Setting, Subset]  # block, setting and subset of a row
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class RowCosts:
    """Figures of one row, or why there are none."""

    seeds: tuple[int, ...]
    visual_tokens: int | NotComputed
    cost: Cost | NotComputed
    step: StepTime | NotComputed
    reading: StepReading | NotComputed | None  # None: text only, which reads no tokens
    ranks: Mapping[str, tuple[EncoderRanks, ...]] = field(default_factory=dict)  # encoder -> of every seed


@dataclass(frozen=True, kw_only=True)
class SweepCosts:
    """Costs of all rows."""

    rows: Mapping[Place, RowCosts]
    text_tokens: int | None  # of the sample whose FLOPs are counted
    ranks: SweepRanks | None  # None: not measured

    def sections(self, block: str) -> list[Section]:
        """The tables of one block."""
        rows = {place: row for place, row in self.rows.items() if place[0] == block}
        found = [self._costs(block, rows)]
        if self.ranks is not None:
            found.append(self._ranks(block, rows))
        return [section for section in found if section.rows]

    def visual_tokens(self, block: str) -> dict[tuple[Setting, Subset], int]:
        """Visual tokens of every row of a block that has them."""
        return {
            (setting, subset): row.visual_tokens
            for (of, setting, subset), row in self.rows.items()
            if of == block and isinstance(row.visual_tokens, int)
        }

    def _costs(self, block: str, rows: Mapping[Place, RowCosts]) -> Section:
        columns = (
            SETTING,
            Column(name="encoders"),
            Column(name="seeds"),
            Column(name="visual tokens", unit="count"),
            *(Column(name=name, unit="size") for name in ("parameters", "MACs", "FLOPs")),
            Column(name="step", unit="seconds"),
            Column(name="waits for tokens", unit="share"),
            *(Column(name=name, unit="bytes") for name in ("read per step", "stored bytes per step")),
        )
        notes = (
            f"MACs and FLOPs: one forward of a sample with {self.text_tokens or 'an unknown number of'} text tokens"
            f" besides the visual ones, by torch's counter. Encoders ran once, when the store was made. {NOT_COUNTED}",
            "Step: the mean of the run's own metrics, without what precedes the second line of its log, on the machine"
            " and under the load that it was trained with. Read per step: arrays of its clips, uncompressed; stored"
            " bytes are their chunks, compressed.",
        )
        return Section(
            title="Costs",
            block=block,
            columns=columns,
            rows=tuple(_cost_row(place, row) for place, row in rows.items()),
            notes=notes,
        )

    def _ranks(self, block: str, rows: Mapping[Place, RowCosts]) -> Section:
        columns = (
            SETTING,
            Column(name="encoders"),
            Column(name="encoder"),
            Column(name="seeds"),
            Column(name="effective rank entering", unit="decimal"),
            Column(name="effective rank leaving", unit="decimal"),
            *(Column(name=f"channels {side}", unit="count") for side in ("entering", "leaving")),
            *(Column(name=f"tokens {side}", unit="count") for side in ("entering", "leaving")),
        )
        found: list[Row] = []
        for (_, setting, subset), row in rows.items():
            for encoder, ranks in row.ranks.items():
                enters, leaves = ranks[0].enters, [each.leaves for each in ranks if each.leaves is not None]
                found.append(
                    (
                        str(setting),
                        subset_name(subset),
                        encoder,
                        seeds_text(row.seeds),
                        enters.rank,
                        sum(each.rank for each in leaves) / len(leaves),
                        enters.width,
                        leaves[0].width,
                        enters.tokens,
                        leaves[0].tokens,
                    )
                )
        assert self.ranks is not None
        notes = (*self.ranks.notes, *(f"Not measured: {run}: {why}." for run, why in self.ranks.missing.items()))
        return Section(title="Effective rank", block=block, columns=columns, rows=tuple(found), notes=notes)


def _cost_row(place: Place, row: RowCosts) -> Row:
    _, setting, subset = place
    counted, measured = row.cost, row.reading
    is_counted = isinstance(counted, Cost)
    cost: list[Cell] = [counted.parameters, counted.macs, counted.flops] if is_counted else [counted] * 3
    step = [row.step] * 2 if isinstance(row.step, NotComputed) else [row.step.seconds, row.step.wait_share]
    is_read = isinstance(measured, StepReading)
    reading: list[Cell] = [measured.array_bytes, measured.stored_bytes] if is_read else [measured] * 2
    return (str(setting), subset_name(subset), seeds_text(row.seeds), row.visual_tokens, *cost, *step, *reading)


def folders_of(results: Results) -> dict[str, Path]:
    """The folders of a sweep's runs that have begun, by name."""
    found = {name: last_stage(run_folder(results.folder, name)) for name in results.record["runs"]}
    return {name: path for name, path in found.items() if all((path / f).is_file() for f in (CONFIG_FILE, RECORD_FILE))}


def measure_costs(
    results: Results,
    folders: Mapping[str, Path],
    *,
    store: str | None = None,
    text_tokens: int | None = None,
    with_ranks: bool = False,
) -> SweepCosts:
    """Costs of every row that has answers; `store` is where the runs' store is now, if it has moved.

    Ranks read a sample of clips and the checkpoint of every run: minutes a run at full size.
    """
    groups: dict[Place, list[Member]] = {}
    for member in results.answers:
        is_whole = member.block != ONE_SHOT or member.subset == results.encoders
        if member.block in COSTED and is_whole and member.run in folders:
            setting = member.setting if member.subset else member.setting.without(*VISUAL_SETTING)
            groups.setdefault((member.block, setting, member.subset), []).append(member)
    text_tokens = text_tokens or mean_text_tokens(folders.values())
    if store is None and (recorded := str(results.record.get("store") or "")):
        store = recorded if is_url(recorded) or Path(recorded).exists() else None
    ranks = None
    if with_ranks:
        ranked = {member.run: folders[member.run] for members in groups.values() for member in members if member.subset}
        ranks = ranks_of_runs(ranked, store)
    rows: dict[Place, RowCosts] = {}
    with ProgressLine("costs", total=len(groups), unit="rows") as progress:
        for place, members in groups.items():
            rows[place] = _measure(members, folders, store, text_tokens, ranks)
            progress.advance()
    return SweepCosts(rows=rows, text_tokens=text_tokens, ranks=ranks)


def _measure(
    members: Sequence[Member],
    folders: Mapping[str, Path],
    store: str | None,
    text_tokens: int | None,
    ranks: SweepRanks | None,
) -> RowCosts:
    """Figures of the runs of one row, which differ in their seed."""
    members = sorted(members, key=lambda member: member.seed)
    first = members[0]
    folder = folders[first.run]
    tokens = first.setting.get("tokens_per_frame") if first.block == NESTED else None
    cost: Cost | NotComputed = NotComputed(NO_TEXT)
    if text_tokens is not None:
        cost = _or_reason(lambda: run_cost(folder, text_tokens, tokens_per_frame=tokens))
    visual = _or_reason(lambda: RunRecord.read(folder).num_visual_tokens)
    if isinstance(cost, Cost) or tokens is not None:
        visual = cost if isinstance(cost, NotComputed) else cost.visual_tokens
    found = ranks.by_run if ranks and first.block != NESTED else {}
    by_seed = [found[member.run] for member in members if member.run in found]
    return RowCosts(
        seeds=tuple(member.seed for member in members),
        visual_tokens=visual,
        cost=cost,
        step=_mean_step([_or_reason(lambda run=m.run: run_step_time(folders[run])) for m in members]),
        reading=_or_reason(lambda: step_reading(folder, store)) if first.subset else None,
        ranks={each.encoder: tuple(row[i] for row in by_seed) for i, each in enumerate(by_seed[0])} if by_seed else {},
    )


def _mean_step(steps: Sequence[StepTime | NotComputed]) -> StepTime | NotComputed:
    measured = [step for step in steps if isinstance(step, StepTime)]
    if not measured:
        return steps[0]
    seconds = sum(step.seconds for step in measured)
    return StepTime(
        seconds=seconds / len(measured),
        wait_share=sum(step.seconds * step.wait_share for step in measured) / seconds,
        steps=sum(step.steps for step in measured),
        warmup=sum(step.warmup for step in measured),
    )


def _or_reason(measure: Callable[[], Value]) -> Value | NotComputed:
    try:
        return measure()
    except MervCacheError as error:
        return NotComputed(str(error))

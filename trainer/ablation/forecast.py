"""What a sweep will take on this machine, before it is begun: steps, memory, hours, and whether the store pays.

The time of a step is measured, by some real steps of the smallest and of the largest subset of encoders at every
setting; subsets between them are interpolated in the number of encoders. Nothing is written.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from featurestore import FeatureStore
from mervcache.console import format_bytes
from mervcache.errors import UserError
from trainer.ablation.costs import (
    BreakEven,
    ExtractionCost,
    Rates,
    Workload,
    break_even,
    extraction_cost,
    live_seconds_per_clip,
    run_step_time,
)
from trainer.ablation.execute import PinnedSweep, outcome_of, shared_llm
from trainer.ablation.live_time import names_in
from trainer.ablation.sweep import SweepRun
from trainer.config import read_config
from trainer.loop.memory import memory_by_part
from trainer.loop.plan import Plan, make_plan
from trainer.loop.train import time_steps
from trainer.model.llm import LoadedLLM
from trainer.runs.run_record import RunRecord
from trainer.runs.stage_folders import last_stage
from trainer.sources import opened

WARMUP_STEPS, TIMED_STEPS = 1, 3  # of each measurement
Setting = tuple[str, str, str, int | None]  # method, fusion, projector, tokens per frame; that of text only is empty


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One subset at one setting, over all stages of its run."""

    run: str
    encoders: int
    steps: int
    seconds: float  # of the whole run
    reads: bool  # reading takes longer than computing, in some stage
    steps_per_epoch: float  # of the last stage
    clips_per_step: float
    memory_bytes: dict[str, Any]  # of the stage that takes most
    batch_size: int  # of the last stage


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The prediction."""

    runs: int  # that train
    finished: int  # of all runs of the sweep: nothing is left to do for them
    measured: tuple[Measured, ...]
    seconds: float  # of the training that is left, one run after another
    largest: Measured  # by memory
    break_even: BreakEven | None  # None: see `no_break_even`
    live_source: str = ""  # where the rate of live encoding comes from
    no_break_even: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "break_even": self.break_even and self.break_even.to_dict()}

    def describe(self) -> list[str]:
        """Sentences with the numbers."""
        memory = self.largest.memory_bytes
        parts = ", ".join(f"{name} {format_bytes(memory[name])}" for name in memory if name not in NO_PART)
        lines = [
            f"largest run: {self.largest.run}, {format_bytes(memory['total'])} a process ({parts})",
            f"predicted: {self.seconds / 3600:.2g} hours of training for {self.runs} runs one after another, by"
            f" {TIMED_STEPS} steps each of {len(self.measured)} of them, after {WARMUP_STEPS} that is not counted;"
            " between the numbers of encoders that were measured it is interpolated. Loading, scoring and checkpoints"
            " are not in it",
        ]
        if self.finished:
            lines.append(f"{self.finished} runs are finished and not counted")
        if self.break_even is None:
            return [*lines, f"break-even: not known: {self.no_break_even}"]
        return [
            *lines,
            f"{self.break_even.describe()}; live encoding is taken from {self.live_source}, and before each step, not"
            " beside it",
        ]


NO_PART = ("total", "activations_formula")


def forecast(sweep: PinnedSweep, *, live: Path | None = None) -> Forecast:
    """Measure and predict; `live` is a run end to end whose steps give the price of live encoding."""
    pending = [run for run in sweep.runs if outcome_of(sweep, run).status != "finished"]
    trained = [run for run in sweep.runs if run.is_trained]
    if not trained:
        raise UserError("no run of this sweep is trained, so there is nothing to predict")
    llm = shared_llm(sweep)
    groups: dict[Setting, list[SweepRun]] = {}
    for run in trained:
        groups.setdefault(setting_of(run), []).append(run)
    measured: dict[Setting, tuple[Measured, ...]] = {}
    for setting, runs in groups.items():
        by_size = sorted(runs, key=lambda run: len(run.encoders))
        ends = by_size[:1] if len(by_size[0].encoders) == len(by_size[-1].encoders) else [by_size[0], by_size[-1]]
        measured[setting] = tuple(measure(sweep, run, llm) for run in ends)
    flat = tuple(one for found in measured.values() for one in found)
    found, reason, source = None, "", ""
    try:
        found, source = _break_even(sweep, [run for run in trained if run.encoders], measured, live)
    except UserError as error:
        reason = str(error)
    return Forecast(
        runs=sum(run.is_trained for run in pending),
        finished=len(sweep.runs) - len(pending),
        measured=flat,
        seconds=sum(seconds_of(run, measured[setting_of(run)]) for run in pending if run.is_trained),
        largest=max(flat, key=lambda one: one.memory_bytes["total"]),
        break_even=found,
        live_source=source,
        no_break_even=reason,
    )


def setting_of(run: SweepRun) -> Setting:
    """What decides a run's step time besides its encoders."""
    return (run.method, run.fusion, run.projector, run.tokens_per_frame)


def seconds_of(run: SweepRun, measured: Sequence[Measured]) -> float:
    """Seconds of a whole run, on the line through what was measured with fewer and with more encoders."""
    first, last = measured[0], measured[-1]
    if first.encoders == last.encoders:
        return first.seconds
    return first.seconds + (last.seconds - first.seconds) * (len(run.encoders) - first.encoders) / (
        last.encoders - first.encoders
    )


def measure(sweep: PinnedSweep, run: SweepRun, llm: LoadedLLM | None) -> Measured:
    """Take the first steps of every stage of a run."""
    seconds, steps, reads, memory = 0.0, 0, False, {"total": 0}
    with opened(sweep.store) as open_tokens:
        for stage in run.stages:
            samples, source = open_tokens(stage.config, None)
            plan = make_plan(replace(stage.config, init=None), samples, source, store=sweep.store, llm=llm)
            memory = max(memory, _memory(plan), key=lambda parts: parts["total"])
            try:
                timed = time_steps(plan, source, steps_to_time(plan))
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{run.name} does not fit into the memory of this device: it takes about"
                    f" {format_bytes(memory['total'])}; set a smaller micro_batch_size"
                ) from error
            timed = timed[WARMUP_STEPS:] or timed
            reading, computing = (mean(times) for times in zip(*timed, strict=True))
            seconds += plan.batches.num_steps * max(reading, computing)
            steps, reads = steps + plan.batches.num_steps, reads or reading > computing
            order, shown = plan.batches.order, [sample.clip_id is not None for sample in plan.data.samples]
            batch_size = plan.config.batch_size
            steps_per_epoch = order.num_per_epoch / batch_size
            one_epoch = range(min(plan.batches.num_steps, max(1, int(steps_per_epoch))))
            clips = mean(sum(shown[index] for index in order.batch(step)) for step in one_epoch)
            del plan
            gc.collect()  # accelerate ties a model to itself
    return Measured(
        run=run.name,
        encoders=len(run.encoders),
        steps=steps,
        seconds=seconds,
        reads=reads,
        steps_per_epoch=steps_per_epoch,
        clips_per_step=clips,
        memory_bytes=memory,
        batch_size=batch_size,
    )


def steps_to_time(plan: Plan) -> list[int]:
    """The first steps, the warm-up included; of nested grids, which are equally likely, then one step for each."""
    first = list(range(min(WARMUP_STEPS + TIMED_STEPS, plan.batches.num_steps)))
    by_grid = {plan.batches.tokens_per_frame(step): step for step in reversed(range(plan.batches.num_steps))}
    return first if None in by_grid else [*first[:WARMUP_STEPS], *by_grid.values()]


def _memory(plan: Plan) -> dict[str, Any]:
    longest = max(len(plan.batches.rendered(index).input_ids) for index in range(len(plan.data.samples)))
    return memory_by_part(plan.built, plan.record.shapes, longest)


def _break_even(
    sweep: PinnedSweep, runs: Sequence[SweepRun], measured: Mapping[Setting, Sequence[Measured]], live: Path | None
) -> tuple[BreakEven, str]:
    """The store against all runs end to end, and where the rate of live encoding comes from.

    Runs differ in encoders, so the rates are means over the runs: break-even is linear in them.
    """
    if not runs:
        raise UserError("no run of this sweep reads tokens")
    journal = FeatureStore.open(sweep.store, snapshot=sweep.pins["snapshot"]).runs()
    extraction = extraction_cost(journal, encoders=names_in(sweep.encoders))
    source, scale = "a worker's time in the store's extraction", 1.0
    if live is not None:
        source, scale = f"the steps of {live}", _live_scale(sweep, runs, measured, live, journal)
    first = measured[setting_of(runs[0])][0]
    step_s = mean(seconds_of(run, measured[setting_of(run)]) / first.steps for run in runs)
    rates = Rates(
        extract_s_per_clip=extraction.seconds_per_clip,
        step_s=step_s,
        live_s_per_clip=mean(scale * _worker_seconds(journal, run.encoders).worker_s_per_clip for run in runs),
    )
    work = Workload(
        clips=extraction.clips,
        steps_per_epoch=first.steps_per_epoch,
        clips_per_step=first.clips_per_step,
        runs=len(runs),
        epochs=first.steps / first.steps_per_epoch,
    )
    return break_even(rates, work), source


def _live_scale(
    sweep: PinnedSweep,
    runs: Sequence[SweepRun],
    measured: Mapping[Setting, Sequence[Measured]],
    live: Path,
    journal: Sequence[Mapping[str, Any]],
) -> float:
    """Measured seconds of live encoding over those that the journal gives for the same encoders."""
    record = RunRecord.read(last_stage(live))
    if record.live is None:
        raise UserError(f"{live} was trained from a store too; give a run that merv-train made with --end-to-end")
    same = [run for run in runs if set(run.encoders) == set(record.encoder_order)]
    if not same:
        raise UserError(f"no run of this sweep has the encoders of {live}, {', '.join(record.encoder_order)}")
    found = measured[setting_of(same[0])]
    batch_size = read_config(last_stage(live)).batch_size
    if batch_size != found[0].batch_size:
        raise UserError(
            f"{live} has batch_size {batch_size}, this sweep {found[0].batch_size}: their steps do not compare"
        )
    end_to_end = run_step_time(live)
    cached = replace(end_to_end, seconds=seconds_of(same[0], found) / found[0].steps)
    seconds = live_seconds_per_clip(cached, end_to_end, found[0].clips_per_step)
    return seconds / _worker_seconds(journal, same[0].encoders).worker_s_per_clip


def _worker_seconds(journal: Sequence[Mapping[str, Any]], encoders: Sequence[str]) -> ExtractionCost:
    return extraction_cost(journal, encoders=names_in(encoders))

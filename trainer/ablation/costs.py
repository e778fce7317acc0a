"""What a run and its store cost on this machine, and from how many runs on the store has paid for itself.

Times are measured: steps from a run's metrics, extraction from the store's journal. `break_even` is arithmetic on
such rates and reads nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from featurestore import FeatureStore
from featurestore.identity import FeatureIdentity
from featurestore.storage_dtypes import SIDECAR_DTYPE, prefix_dtype, storage_dtype
from mervcache.console import format_duration, plural
from mervcache.errors import UserError
from trainer.config import TrainConfig, read_config
from trainer.data.batches import order_digest, select, streams
from trainer.data.order import Order
from trainer.model.projectors import parts_of
from trainer.runs.run_record import RunRecord, read_metrics
from trainer.runs.stage_folders import METRICS_FILE, last_stage
from trainer.sources import open_store

_ENCODE = "encode:"  # begins the name of an encoder's stage in the journal
_SPEED = ("samples_per_s", "wait_share")  # of the steps between two lines of the log: all of their rows have the same


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds per optimizer step, validation and checkpoints aside."""

    seconds: float  # the mean
    wait_share: float  # of that time, the loop waited for tokens
    steps: int  # that were measured
    warmup: int  # steps before them that were not


@dataclass(frozen=True, kw_only=True)
class StepReading:
    """What a run reads from its store per step, on average; a clip that a forward has twice is read once."""

    clips: float  # samples with a clip
    distinct_clips: float
    array_bytes: float  # of those clips' arrays, uncompressed, as the store's dtype holds them
    stored_bytes: float  # of their chunks, compressed: what is transferred
    steps_per_epoch: float


@dataclass(frozen=True, kw_only=True)
class ExtractionCost:
    """What a store's extractions took, by its journal."""

    seconds: float  # elapsed, of all runs that computed anything
    clips: int  # that were computed, or failed
    seconds_per_clip: float
    worker_s_per_clip: float  # of one worker, to wait for decoding and to encode: what live encoding would take
    runs: int
    notes: tuple[str, ...] = ()  # what the journal does not say


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured times on one machine."""

    extract_s_per_clip: float  # elapsed, of all encoders together
    step_s: float  # a training step from the store
    live_s_per_clip: float  # decoding and encoding a clip while training


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be trained; `runs` x `epochs` passes over the same samples."""

    clips: int  # to extract
    steps_per_epoch: float
    clips_per_step: float  # decoded and encoded by each step end to end
    runs: int = 1
    epochs: float = 1.0


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Training from a store, its extraction included, against end to end."""

    extraction_s: float
    cached_pass_s: float  # an epoch of a run
    live_pass_s: float
    passes: float | None  # runs x epochs at which both have taken as long; None: never
    planned_passes: float
    cached_s: float  # of the planned passes, with the extraction
    live_s: float

    @property
    def pays(self) -> bool:
        """Whether the planned passes are enough."""
        return self.passes is not None and self.planned_passes >= self.passes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "pays": self.pays}

    def describe(self) -> str:
        """One sentence, with the numbers that decide."""
        planned = f"{self.planned_passes:g} runs x epochs"
        passes = f"an epoch takes {format_duration(self.cached_pass_s)} from the store, and end to end"
        if self.passes is None:
            return (
                f"the store never pays: {passes} {format_duration(self.live_pass_s)}, no more; its extraction of"
                f" {format_duration(self.extraction_s)} is not won back in time"
            )
        verdict = "has paid for itself" if self.pays else "has not paid for itself"
        return (
            f"the store pays from {ceil(self.passes):,} runs x epochs on ({self.passes:.2f}): extraction takes"
            f" {format_duration(self.extraction_s)}, {passes} {format_duration(self.live_pass_s)}; after {planned} it"
            f" {verdict}: {format_duration(self.cached_s)} against {format_duration(self.live_s)}"
        )


def break_even(rates: Rates, work: Workload, *, overlapped: bool = False) -> BreakEven:
    """When extraction / (seconds of a pass end to end - of one from the store) passes have been trained.

    A step end to end takes its encoding and then the step from the store; `overlapped`, on devices of their own, it
    takes the longer of both.
    """
    encode_s = work.clips_per_step * rates.live_s_per_clip
    live_step_s = max(rates.step_s, encode_s) if overlapped else rates.step_s + encode_s
    extraction_s = work.clips * rates.extract_s_per_clip
    cached_pass_s, live_pass_s = work.steps_per_epoch * rates.step_s, work.steps_per_epoch * live_step_s
    saved, passes = live_pass_s - cached_pass_s, work.runs * work.epochs
    return BreakEven(
        extraction_s=extraction_s,
        cached_pass_s=cached_pass_s,
        live_pass_s=live_pass_s,
        passes=extraction_s / saved if saved > 0 else None,
        planned_passes=passes,
        cached_s=extraction_s + passes * cached_pass_s,
        live_s=passes * live_pass_s,
    )


def step_time(rows: Sequence[Mapping[str, Any]]) -> StepTime:
    """The mean step of a run's metrics; the first stretch between two log lines is left out where there are others.

    It holds what happens once: loading kernels, first reads. UserError for metrics without speeds.
    """
    if not rows or any(name not in row for row in rows for name in (*_SPEED, "samples")):
        raise UserError("no step times: the metrics hold no steps with samples_per_s; train some steps first")
    stretches = [list(group) for _, group in groupby(rows, key=lambda row: [row[name] for name in _SPEED])]
    counted = [row for stretch in stretches[1:] or stretches for row in stretch]
    seconds = [row["samples"] / row["samples_per_s"] for row in counted]
    waited = sum(s * row["wait_share"] for s, row in zip(seconds, counted, strict=True))
    return StepTime(
        seconds=sum(seconds) / len(seconds),
        wait_share=waited / sum(seconds),
        steps=len(counted),
        warmup=len(rows) - len(counted),
    )


def run_step_time(run: Path) -> StepTime:
    """`step_time` of a run, or of the last stage of a staged one."""
    folder = last_stage(Path(run))
    if not (folder / METRICS_FILE).is_file():
        raise UserError(f"{folder} has no {METRICS_FILE}: it is no run that trained here")
    try:
        return step_time(read_metrics(folder))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def clip_bytes(identity: FeatureIdentity, kind: str, parts: Iterable[str] = ("tokens",)) -> int:
    """Bytes of one clip's arrays as they are read, uncompressed; a still holds one period of the time axis."""
    time, height, width = identity.grid_of(kind)
    stored, parts, total = storage_dtype(identity.storage_dtype), set(parts), 0
    if "tokens" in parts:
        total += time * height * width * identity.width * stored.item_bytes
        total += 2 * identity.width * np.dtype(SIDECAR_DTYPE).itemsize * stored.is_affine
    if "prefix" in parts:
        prefix = storage_dtype(prefix_dtype(identity.storage_dtype))
        total += time * identity.prefix_tokens * identity.width * prefix.item_bytes
    return total


def step_reading(run: Path, store: str | None = None) -> StepReading:
    """What the steps of a run read, by its own order of samples; UserError for a run that reads no store."""
    folder = last_stage(Path(run))
    config, record = read_config(folder), RunRecord.read(folder)
    path = store or record.store
    if config.mode == "text-only":
        raise UserError(f"{run} is text-only and reads no tokens")
    if not path:
        raise UserError(f"{run} was trained end to end; give a store with the same clips and encoders with --store")
    opened = FeatureStore.open(path)
    samples, source = open_store(path, config, snapshot=record.snapshot)
    data = select(samples, source, config)
    if data.digest != record.data_digest:
        raise UserError(f"{path} holds other samples or tokens than {run} was trained on, so its steps are not known")
    batch_order = Order(
        streams(data.samples, config),
        batch_size=config.batch_size,
        seed=config.seed,
        digest=order_digest(data.samples),
    )
    keys = {identity.id: key for key, identity in opened.encoders.items()}
    identities = [opened.encoders[keys[shape.identity]] for shape in record.shapes.values() if shape.identity in keys]
    if len(identities) < len(record.shapes):
        raise UserError(f"{path} does not hold the tokens that {run} was trained on; give its own store with --store")
    clips = [() if s.clip_id is None else source.windows(s.clip_id) for s in data.samples]
    return _reading(config, batch_order, clips, opened, identities, record.num_steps)


def _reading(
    config: TrainConfig,
    batch_order: Order,
    clip_ids: Sequence[Sequence[str]],  # of each sample: the windows of its video, its clip, or none
    store: FeatureStore,
    identities: Sequence[FeatureIdentity],
    num_steps: int,
) -> StepReading:
    kinds = dict(zip(store.clips["clip_id"].to_pylist(), store.clips["kind"].to_pylist(), strict=True))
    parts = parts_of(config.projector)
    array_bytes = {
        kind: sum(clip_bytes(identity, kind, parts) for identity in identities) for kind in set(kinds.values())
    }
    stored_bytes = {
        kind: sum(_stored_per_clip(store, identity, kind) for identity in identities) for kind in array_bytes
    }
    clips = distinct = arrays = stored = 0.0
    for step in range(num_steps):
        read = [clip for index in batch_order.batch(step) for clip in clip_ids[index]]
        clips, distinct = clips + len(read), distinct + len(set(read))
        arrays += sum(array_bytes[kinds[clip]] for clip in read)
        stored += sum(stored_bytes[kinds[clip]] for clip in read)
    return StepReading(
        clips=clips / num_steps,
        distinct_clips=distinct / num_steps,
        array_bytes=arrays / num_steps,
        stored_bytes=stored / num_steps,
        steps_per_epoch=batch_order.num_per_epoch / config.batch_size,
    )


def _stored_per_clip(store: FeatureStore, identity: FeatureIdentity, kind: str) -> float:
    num_bytes, num_clips = store.stored_bytes(identity, kind)
    return num_bytes / num_clips if num_clips else 0.0


def extraction_cost(
    runs: Sequence[Mapping[str, Any]], *, encoders: Collection[str] | None = None, host: str | None = None
) -> ExtractionCost:
    """What a store's recorded runs took; UserError where none computed anything, as in a store that was merged.

    Encoders that were added later count with the others: the seconds of all runs over the clips of the encoder that
    has most. Live encoding is that of `encoders`, or of all. `host` is this machine's name, and rates of another one
    are noted.
    """
    busy = [run for run in runs if run["summary"]["clips"]]
    made: dict[str, dict[str, float]] = {}  # kind -> encoder -> clips
    for run in busy:
        for name, work in run["summary"].get("made", {}).items():
            kind, _, encoder = name.partition("/")
            of_kind = made.setdefault(kind, {})
            of_kind[encoder] = of_kind.get(encoder, 0) + work["clips"]
    clips = int(sum(max(of_kind.values()) for of_kind in made.values()))
    if not clips:
        raise UserError(
            "the store's journal records no extraction, so its price is not known; give the seconds per clip of the one"
            " that made it"
        )
    seconds = sum(run["summary"]["elapsed_s"] for run in busy)
    worker = sum(_worker_seconds(run["summary"]["stage_s"], encoders) for run in busy)
    notes = []
    if reused := sum(run["summary"].get("reused", 0) for run in busy):
        notes.append(f"{plural(reused, '(clip, encoder) pair')} copied from another store: computing them is not in it")
    if elsewhere := sorted({run["host"] for run in busy} - {host or socket.gethostname()}):
        notes.append(f"extracted on {', '.join(elsewhere)}, another machine than this one")
    return ExtractionCost(
        seconds=seconds,
        clips=clips,
        seconds_per_clip=seconds / clips,
        worker_s_per_clip=worker / clips,
        runs=len(busy),
        notes=tuple(notes),
    )


def _worker_seconds(stages: Mapping[str, float], encoders: Collection[str] | None) -> float:
    """A worker's time without what live encoding has not: writing, and other encoders."""
    left = {"write wait", "commit"}
    if encoders is not None:
        left |= {name for name in stages if name.startswith(_ENCODE) and name.removeprefix(_ENCODE) not in encoders}
    return stages.get("total", 0.0) - sum(stages.get(name, 0.0) for name in left)


def live_seconds_per_clip(cached: StepTime, live: StepTime, clips_per_step: float) -> float:
    """What decoding and encoding add to each clip of a step, by a run end to end and the same run from a store."""
    return max(0.0, live.seconds - cached.seconds) / clips_per_step


@dataclass(frozen=True, kw_only=True)
class RunCosts:
    """The measured costs of a run, and what follows from them."""

    step: StepTime
    reading: StepReading
    extraction: ExtractionCost
    live_s_per_clip: float
    live_source: str  # where that rate comes from
    break_even: BreakEven

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "break_even": self.break_even.to_dict()}


def run_costs(
    run: Path,
    store: str | None = None,
    *,
    runs: int = 1,
    live: Path | None = None,
    overlapped: bool = False,
) -> RunCosts:
    """Costs of a run and its store; `live` is the same run end to end, without it the journal gives that rate."""
    step, reading = run_step_time(run), step_reading(run, store)
    folder = last_stage(Path(run))
    record = RunRecord.read(folder)
    opened = FeatureStore.open(store or record.store)
    names = {encoder.partition("@")[0] for encoder in record.shapes}  # without the grid or id of one stored twice
    extraction = extraction_cost(opened.runs(), encoders=names)
    live_s = extraction.worker_s_per_clip
    source = "a worker's time in the store's extraction, for the encoders of this run"
    if live is not None:
        if RunRecord.read(last_stage(Path(live))).live is None:
            raise UserError(f"{live} was trained from a store too; give a run that merv-train made with --end-to-end")
        live_s = live_seconds_per_clip(step, run_step_time(live), reading.clips)
        source, overlapped = f"steps of {live} less those of {run}", False  # what overlaps is in the measurement
    work = Workload(
        clips=extraction.clips,
        steps_per_epoch=reading.steps_per_epoch,
        clips_per_step=reading.clips,
        runs=runs,
        epochs=record.num_steps / reading.steps_per_epoch,
    )
    rates = Rates(extract_s_per_clip=extraction.seconds_per_clip, step_s=step.seconds, live_s_per_clip=live_s)
    return RunCosts(
        step=step,
        reading=reading,
        extraction=extraction,
        live_s_per_clip=live_s,
        live_source=source,
        break_even=break_even(rates, work, overlapped=overlapped),
    )

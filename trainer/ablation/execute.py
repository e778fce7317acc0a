"""Train and score the runs of a sweep, one after another in this process.

A run that is done is not touched again; one that was killed goes on from its newest checkpoint; one that failed is
tried again. An LLM that no run trains is loaded once. Each run is the same as by `merv-train` with its config.yaml.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from featurestore import FeatureStore
from featurestore.clips import Sample
from featurestore.locate import is_url
from jobs.clusters import ClusterRequest, connect
from jobs.run import Task, run_tasks
from mervcache.console import ProgressLine
from mervcache.errors import MervCacheError, StoreError, UserError
from mervcache.files import replace_text
from trainer.ablation.live_time import add_end_to_end
from trainer.ablation.supervise import RunJob, RunTime, checkpoints_of, supervise
from trainer.ablation.sweep import (
    ALL,
    SWEEP_FILE,
    SweepConfig,
    SweepRun,
    add_to_record,
    axes_entry,
    expand_subsets,
    plan_runs,
    read_sweep,
    recorded_axes,
    run_folder,
    shared_settings,
    with_keys,
)
from trainer.ablation.wall_time import add_run_time
from trainer.config import Protocol, TrainConfig, in_paper_order
from trainer.data.batches import named_samples, order_digest, select
from trainer.data.tokens import StoreTokens
from trainer.evaluate import EvaluationRequest, default_device, evaluate_grids, evaluate_masked, evaluate_run
from trainer.loop.stages import to_yaml, train_stages
from trainer.model.letters import Template
from trainer.model.llm import FRESH_PREFIX, LoadedLLM
from trainer.model.multiple_choice import answer_all, default_protocol, questions, summarise
from trainer.model.projectors import build_projectors, parts_of
from trainer.model.video_llm import VideoLLM, build, new_llm
from trainer.recipes import RECIPES, Stages
from trainer.runs import checkpoint
from trainer.runs.run_record import RunRecord, ScoreSource, read_scores, write_scores
from trainer.runs.score_files import grid_scores_file, masked_scores_file
from trainer.runs.stage_folders import last_stage
from trainer.sources import opened

CHECKED_WIDTH = 64  # of the projectors that are built to check their grids; any multiple of the attention's heads

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """What became of one run."""

    name: str
    status: str  # "finished", "failed", "stopped" or "pending"
    accuracy: float | None = None  # on all questions
    questions: int | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class PinnedSweep:
    """A sweep on a store's snapshot: its runs, and what they share."""

    store: str
    out: Path
    encoders: tuple[str, ...]
    split: str
    protocol: Protocol
    runs: tuple[SweepRun, ...]
    samples: tuple[Sample, ...] = field(repr=False)  # that every run trains on, in the order of their ids
    questions: tuple[Sample, ...] = field(repr=False)  # that every run is scored on
    pins: dict[str, Any] = field(repr=False)
    axes: tuple[dict[str, Any], ...] = field(repr=False)  # the axes and settings that give the runs, as recorded


def open_recorded(out: Path, store_path: str | None = None) -> PinnedSweep:
    """A sweep that was begun, with all runs that its recorded axes and settings give; nothing is written."""
    record = read_sweep(out)
    parts = [open_sweep(*axes, store_path or record["store"], out) for axes in recorded_axes(record)]
    if not parts:
        raise UserError(
            f"{Path(out) / SWEEP_FILE} was written before axes were recorded; give the options that the sweep was begun"
            " with"
        )
    runs: dict[str, SweepRun] = {}
    for run in (run for part in parts for run in part.runs):
        runs[run.name] = run if run.is_masked else runs.get(run.name, run)
    ordered = sorted(runs.values(), key=lambda run: len(run.encoders))
    return replace(parts[-1], runs=tuple(ordered), axes=tuple(entry for part in parts for entry in part.axes))


def open_sweep(sweep: SweepConfig, stages: Stages, store_path: str, out: Path) -> PinnedSweep:
    """Expand a sweep and pin it to a snapshot, samples and questions; nothing is written.

    A sweep that was begun keeps its snapshot, whatever was added to the store since; the store may have moved, since a
    snapshot's name holds a digest of its content. Raises UserError for encoders,
    grids or settings that the store does not serve, before anything is trained.
    """
    store = _open_pinned(store_path, out)
    config = stages[-1].config
    encoders = tuple(map(store.encoder_key, sweep.encoders)) or tuple(in_paper_order(store.encoders))
    sweep = replace(sweep, subsets=with_keys(sweep.subsets, store))
    protocol = default_protocol(config)
    if config.eval_every is not None and config.eval_split == sweep.split:
        raise UserError(
            f"runs would be validated on split {config.eval_split!r}, which scores them: set eval_split to another"
            " split, or leave eval_every out; a sweep scores the last checkpoint of every run"
        )
    time_steps = store.encoders[encoders[0]].grid[0]
    runs = tuple(plan_runs(sweep, stages, encoders=encoders, snapshot=store.snapshot, time_steps=time_steps))
    source = StoreTokens(store, encoders, parts=parts_of(config.projector), max_windows=config.max_windows)
    for run in runs:
        _check_grids(run, source)
    known = named_samples(config.samples, store.sample_names, store.samples)
    samples = select(known, source, replace(config, encoders=encoders)).samples
    asked = questions(known, source, split=sweep.split, has_visual=True)
    pins = {
        "snapshot": store.snapshot,
        "encoders": list(encoders),
        "split": sweep.split,
        "protocol": protocol,
        "num_samples": len(samples),
        "samples_digest": order_digest(samples),
        "num_questions": len(asked),
        "questions_digest": _digest(asked),
        "settings": shared_settings(stages),
    }
    return PinnedSweep(
        store=store_path,
        out=Path(out),
        encoders=encoders,
        split=sweep.split,
        protocol=protocol,
        runs=runs,
        samples=samples,
        questions=tuple(asked),
        pins=pins,
        axes=(axes_entry(sweep, stages),),
    )


def _open_pinned(store_path: str, out: Path) -> FeatureStore:
    """The store at the snapshot that the sweep was begun with, else at its newest one."""
    if not (out / SWEEP_FILE).exists():
        return FeatureStore.open(store_path)
    snapshot = read_sweep(out)["snapshot"]
    try:
        return FeatureStore.open(store_path, snapshot=snapshot)
    except StoreError as error:
        raise UserError(
            f"{out} was begun with snapshot {snapshot} of its store: {error}. Give the place where that store is now"
            " with --from-cache STORE, or another --out for this one"
        ) from error


def train_sweep(
    axes: SweepConfig, stages: Stages, store: str | Path, out: str | Path, *, cluster: ClusterRequest | None = None
) -> list[RunOutcome]:
    """Train and score every combination of `axes` from one store; an outcome for each, in the order of the sweep.

    Called again with the same `out` it goes on where it ended and tries again what failed; other axes add runs.

    Parameters
    ----------
    stages
        The recipe that all runs start from, such as `get_stages("demo")`.
    store
        Path or URL of the store with all encoders of the sweep.
    cluster
        Workers that train side by side; None: one run after another in this process.

    Raises
    ------
    UserError
        Encoders, grids or settings that the store does not serve; before anything is trained.
    """
    pinned = open_sweep(axes, stages, str(store), Path(out))
    outcomes = run_sweep(pinned) if cluster is None else run_sweep_on(pinned, cluster)
    write_times(pinned)
    return outcomes


def run_sweep(sweep: PinnedSweep, *, attempts: int = 2) -> list[RunOutcome]:
    """Train and score every run that is not done; an outcome for each, in the order of the sweep.

    A run that fails is tried again after the others, up to `attempts` times, unless its request is invalid. A stop
    signal ends the sweep after the step, which is saved.
    """
    add_to_record(sweep.out, sweep.pins, sweep.axes, sweep.runs, store=sweep.store)
    outcomes = {run.name: outcome_of(sweep, run) for run in sweep.runs}
    pending = [run for run in sweep.runs if outcomes[run.name].status != "finished"]
    pending.sort(key=lambda run: not run.is_trained)  # what is scored as it is needs a trained run's settings
    llm = shared_llm(sweep) if pending else None
    for attempt in range(1, attempts + 1):
        failed = []
        for number, run in enumerate(pending, start=1):
            log.info(f"run {number} of {len(pending)}: {run.name}")
            outcome, is_final = _train_and_score(sweep, run, llm)
            outcomes[run.name] = outcome
            gc.collect()  # accelerate ties a model to itself
            if outcome.status == "stopped":
                return list(outcomes.values())
            if outcome.status == "failed":
                log.warning(f"{run.name} failed: {outcome.error}")
                failed += [] if is_final or attempt == attempts else [run]
        pending = failed
    return list(outcomes.values())


def run_sweep_on(sweep: PinnedSweep, request: ClusterRequest, *, launch: Sequence[str] = ()) -> list[RunOutcome]:
    """As `run_sweep`, side by side on the workers of a cluster, each run in processes of its own.

    `launch` are further options of `merv-train`, such as `--launch ddp`. What is scored without training, and the
    outcomes, are read in this process.
    """
    add_to_record(sweep.out, sweep.pins, sweep.axes, sweep.runs, store=sweep.store)
    outcomes = {run.name: outcome_of(sweep, run) for run in sweep.runs}
    pending = {run.name: run for run in sweep.runs if outcomes[run.name].status != "finished"}
    jobs = {name: _job(sweep, run, launch) for name, run in pending.items() if run.is_trained}
    with ProgressLine("sweep", total=len(jobs), unit="runs") as line, connect(request) as client:
        while jobs:
            before, advanced = {name: checkpoints_of(job.run) for name, job in jobs.items()}, {}
            tasks = [Task(key=name, arguments=(job,)) for name, job in jobs.items()]
            for ended in run_tasks(
                client, supervise, tasks, attempts=1, per_worker=1, worker_wait_s=request.worker_wait_s
            ):
                name = ended.task.key
                if ended.error is None:
                    add_run_time(sweep.out, name, ended.result)
                    outcomes[name] = outcome_of(sweep, pending[name])
                else:
                    outcomes[name] = RunOutcome(name=name, status="failed", error=str(ended.error))
                    log.warning(f"{name} failed: {ended.error}")
                    if not checkpoints_of(jobs[name].run) <= before[name]:  # it got on, so its attempts begin anew
                        advanced[name] = jobs[name]
                        continue
                line.advance(failed=int(ended.error is not None))
            jobs = advanced
    for run in pending.values():
        if not run.is_trained:
            outcomes[run.name] = _train_and_score(sweep, run, None)[0]
    return list(outcomes.values())


def _job(sweep: PinnedSweep, run: SweepRun, launch: Sequence[str]) -> RunJob:
    """A run as command lines; its settings are written to a file of the sweep."""
    configs, logs = sweep.out / "configs", sweep.out / "logs"
    for folder in (configs, logs):
        folder.mkdir(parents=True, exist_ok=True)
    config = replace_text(configs / f"{run.name}.yaml", to_yaml(run.stages)).absolute()
    folder = run_folder(sweep.out, run).absolute()
    store = sweep.store if is_url(sweep.store) else str(Path(sweep.store).absolute())
    names = [stage.name for stage in run.stages]  # its file has all settings: any recipe of the same stages will do
    recipe = next(name for name, stages in RECIPES.items() if [stage.name for stage in stages] == names)
    source = ("--from-cache", store, "--recipe", recipe, "--config", str(config))
    of_run = ("--checkpoint", str(folder), "--store", store, "--split", sweep.split, "--protocol", sweep.protocol)
    program = (sys.executable, "-P", "-m", "trainer.main")
    views = {"mask": run.is_masked, "grids": bool(run.nested_grids)}
    return RunJob(
        run=str(folder),
        train=(*program, "train", *source, "--out", str(folder), "--resume", "auto", *launch),
        score=(*program, "eval", "run", *of_run, "--no-open-ended"),
        views=tuple((*program, "eval", command, *of_run) for command, is_wanted in views.items() if is_wanted),
        log=str((logs / f"{run.name}.log").absolute()),
    )


def _train_and_score(sweep: PinnedSweep, run: SweepRun, llm: LoadedLLM | None) -> tuple[RunOutcome, bool]:
    """One attempt at a run, and whether it makes no sense to try again."""
    folder = run_folder(sweep.out, run)
    try:
        if not run.is_trained:
            began = time.monotonic()
            _score_untrained(sweep, run, folder, llm)
            add_run_time(sweep.out, run.name, RunTime(train_s=0.0, score_s=time.monotonic() - began))
            return outcome_of(sweep, run), True
        began = time.monotonic()
        with opened(sweep.store) as open_tokens:
            results = train_stages(run.stages, open_tokens, folder, store=sweep.store, resume=True, llm=llm)
        trained = time.monotonic()
        if results[-1].steps < results[-1].num_steps:
            return RunOutcome(name=run.name, status="stopped"), True
        request = EvaluationRequest(store=sweep.store, split=sweep.split, protocol=sweep.protocol, open_ended=False)
        evaluate_run(folder, request, llm=llm)
        if run.is_masked:
            evaluate_masked(folder, request, [(), *expand_subsets([ALL], run.encoders)], llm=llm)
        if run.nested_grids:
            evaluate_grids(folder, request, llm=llm)
        ended = time.monotonic()
        add_run_time(sweep.out, run.name, RunTime(train_s=trained - began, score_s=ended - trained))
        return outcome_of(sweep, run), True
    except MervCacheError as error:
        return RunOutcome(name=run.name, status="failed", error=str(error)), isinstance(error, UserError)
    except Exception as error:  # out of memory, a full disk, a bug: the other runs go on, and the result names it
        log.debug(traceback.format_exc())
        return RunOutcome(name=run.name, status="failed", error=f"{type(error).__name__}: {error}"), False


def _score_untrained(sweep: PinnedSweep, run: SweepRun, folder: Path, llm: LoadedLLM | None) -> None:
    """Scores of the LLM as it is published, without visual tokens."""
    config = run.stages[-1].config
    llm = llm or new_llm(config, sweep.samples)
    with opened(sweep.store) as open_tokens:
        _, source = open_tokens(config, None)
        built = build(config, source.shapes, llm)
        text_only = VideoLLM(llm.model, {}, None, exceeds_context=built.model.exceeds_context)
        template = Template.read(config.letters_template) if sweep.protocol == "letters" else None
        options = {"device": default_device(), "template": template, "run": run.name}
        answers = list(answer_all(replace(built, model=text_only), sweep.questions, source, **options))
    result = {
        "data_digest": "",
        "step": 0,
        "protocol": sweep.protocol,
        "scores": [asdict(score) for score in summarise(answers)],
        "beside": {},
        "answers": [{**asdict(answer), "credit": answer.credit} for answer in answers],
        "template": template and asdict(template),
    }
    folder.mkdir(parents=True, exist_ok=True)
    source = ScoreSource(split=sweep.split, limit=None, store=sweep.store, snapshot=sweep.pins["snapshot"])
    write_scores(folder, result, source)


def outcome_of(sweep: PinnedSweep, run: SweepRun) -> RunOutcome:
    """What the run's folder says: finished once it is scored on all questions of the sweep at its last step."""
    folder = run_folder(sweep.out, run)
    if not folder.is_dir():
        return RunOutcome(name=run.name, status="pending")
    folder = last_stage(folder)
    num_steps = 0
    if run.is_trained:
        newest = checkpoint.newest(folder)
        if newest is None:
            return RunOutcome(name=run.name, status="pending")
        num_steps = RunRecord.read(folder).num_steps
        if checkpoint.load_state(newest).step < num_steps:
            return RunOutcome(name=run.name, status="pending")
    further = [(run.is_masked, masked_scores_file), (run.nested_grids, grid_scores_file)]
    if any(wanted and not file(folder, sweep.split, protocol=sweep.protocol).is_file() for wanted, file in further):
        return RunOutcome(name=run.name, status="pending")
    for record in read_scores(folder):
        found = (record["split"], record.get("limit"), record["step"], record.get("protocol", sweep.protocol))
        ids = [answer["sample_id"] for answer in record["answers"]]
        if found == (sweep.split, None, num_steps, sweep.protocol) and ids == _ids(sweep.questions):
            overall = record["scores"][0]
            return RunOutcome(
                name=run.name, status="finished", accuracy=overall["accuracy"], questions=overall["questions"]
            )
    return RunOutcome(name=run.name, status="pending")


def write_times(sweep: PinnedSweep, live: Path | None = None) -> None:
    """Write what the runs that have ended would have taken end to end; `live` is a run whose steps give the rate."""
    add_end_to_end(
        sweep.out,
        sweep.runs,
        FeatureStore.open(sweep.store, snapshot=sweep.pins["snapshot"]).runs(),
        encoders=sweep.encoders,
        samples=sweep.samples,
        questions=sweep.questions,
        live=live,
    )


def shared_llm(sweep: PinnedSweep) -> LoadedLLM | None:
    """The LLM of all runs, loaded once, where none of them changes it; else None, and each run loads its own."""
    configs = [stage.config for run in sweep.runs for stage in run.stages]
    return new_llm(configs[0], ()) if all(map(_is_shareable, configs)) else None


def _is_shareable(config: TrainConfig) -> bool:
    return config.train_llm == "none" and not config.llm.startswith(FRESH_PREFIX) and config.init is None


def _check_grids(run: SweepRun, source: StoreTokens) -> None:
    """Refuse a grid that the store does not serve; on the meta device, where nothing is allocated."""
    shapes = {encoder: source.shapes[encoder] for encoder in run.encoders}
    for stage in run.stages if shapes else ():
        try:
            with torch.device("meta"):
                build_projectors(stage.config.projector, shapes, CHECKED_WIDTH)
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from error


def _digest(samples: Sequence[Sample]) -> str:
    return hashlib.sha256("".join(f"{sample.sample_id}\t{sample.digest}\n" for sample in samples).encode()).hexdigest()


def _ids(samples: Sequence[Sample]) -> list[str]:
    return [sample.sample_id for sample in samples]

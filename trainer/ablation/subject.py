"""What a report is about, a sweep or one run: its answers, folders, records, and the commands that make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from featurestore.locate import is_url
from mervcache.errors import UserError
from mervcache.text import redact
from trainer.ablation.results import LIKELIHOOD, POST_HOC, Results, read_results, read_run_results
from trainer.ablation.sweep import NESTED, ONE_SHOT, RETRAINED, SWEEP_FILE, read_sweep, run_folder
from trainer.config import CONFIG_FILE, PROJECTORS, RECORD_FILE, Protocol, TrainConfig, read_config
from trainer.loop.stages import STAGES_KEY
from trainer.recipes import RECIPES
from trainer.runs.run_record import RunRecord, read_scores
from trainer.runs.score_files import grid_scores_file, masked_scores_file
from trainer.runs.stage_folders import check_are_runs, last_stage, read_stages, stage_folder


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A sweep, or one run."""

    path: Path
    is_sweep: bool
    results: Results | None  # None: a run that is not scored
    runs: Mapping[str, Path]  # run -> its folder, of what has begun
    records: Mapping[str, RunRecord]
    configs: Mapping[str, TrainConfig]
    commands: tuple[str, ...]  # that make it again
    files: Mapping[str, str] = field(default_factory=dict)  # config files of these commands: name -> text
    curves: Mapping[str, Path] = field(default_factory=dict)  # name -> folder with metrics; of a run, its stages
    scores: Mapping[str, Any] | None = None  # of a run: the record that its answers are from

    @property
    def name(self) -> str:
        return self.path.resolve().name


def read_subject(
    path: Path, *, split: str | None = None, protocol: str | None = None, store: str | None = None
) -> Subject:
    """What PATH holds. `split` and `protocol` choose the scores of a run; a sweep has one of each."""
    path = Path(path)
    if (path / SWEEP_FILE).is_file():
        if split is not None or protocol is not None:
            raise UserError("--split and --protocol choose among the scores of one run, and a sweep has one of each")
        return _sweep(path, store)
    check_are_runs(path)
    return _run(path, split or "heldout", protocol, store)


def _sweep(path: Path, store: str | None) -> Subject:
    results, record = read_results(path, store=store), read_sweep(path)
    runs = {name: last_stage(run_folder(path, name)) for name in record["runs"]}
    runs = {name: folder for name, folder in runs.items() if (folder / RECORD_FILE).is_file()}
    files, commands = {}, []
    for number, axes in enumerate(record.get("axes", []), start=1):
        name = f"sweep-{number}.yaml"
        files[name] = yaml.safe_dump(axes, sort_keys=False)
        source = shlex.quote(_place(str(record.get("store") or "")))
        stages = list(axes[STAGES_KEY])
        recipe = next(name for name, known in RECIPES.items() if [stage.name for stage in known] == stages)
        commands.append(f"merv-train sweep --from-cache {source} --recipe {recipe} --config {name} --out NEW")
    return Subject(
        path=path,
        is_sweep=True,
        results=results,
        runs=runs,
        records={name: RunRecord.read(folder) for name, folder in runs.items()},
        configs={name: read_config(folder) for name, folder in runs.items()},
        commands=(*commands, "merv-eval table NEW", "merv-eval report NEW") if commands else (),
        files=files,
        curves=runs,
    )


def _run(path: Path, split: str, protocol: str | None, store: str | None) -> Subject:
    folder, stages = last_stage(path), read_stages(path)
    config, record, name = read_config(folder), RunRecord.read(folder), path.resolve().name
    found = [s for s in read_scores(folder) if s["split"] == split and s.get("limit") is None]
    protocols = sorted({s["protocol"] for s in found})
    if len(protocols) > 1 and protocol is None:
        raise UserError(f"{path} has scores by {' and '.join(protocols)}, which are not comparable; give --protocol")
    chosen = next((s for s in found if protocol in (None, s["protocol"])), None)
    results = None
    by = chosen["protocol"] if chosen else protocol or _view_protocol(folder, split)
    if chosen is not None or _has_views(folder, split, by):
        encoders = () if config.mode == "text-only" else record.encoder_order
        conditions = {
            "split": split,
            "store": store or record.store,
            "snapshot": chosen["snapshot"] if chosen else record.snapshot,
            "protocol": by,
        }
        results = read_run_results(path, encoders, _entry(config, encoders), conditions, store=store)
    shown = {stage.name: stage_folder(path, stages, stage) for stage in stages} if len(stages) > 1 else {name: folder}
    return Subject(
        path=path,
        is_sweep=False,
        results=results,
        runs={name: folder},
        records={name: record},
        configs={name: config},
        commands=_run_commands(path, record, results, len(stages) > 1),
        files={CONFIG_FILE: (folder / CONFIG_FILE).read_text()},
        curves=shown,
        scores=chosen,
    )


def _has_views(folder: Path, split: str, protocol: str) -> bool:
    """Whether there are answers with masks, or at nested grids."""
    return any(file(folder, split, protocol=protocol).is_file() for file in (masked_scores_file, grid_scores_file))


def _view_protocol(folder: Path, split: str) -> str:
    """That of a run's answers with masks or at grids, where it has no scores of its own."""
    return next((name for name in get_args(Protocol) if _has_views(folder, split, name)), LIKELIHOOD)


def _entry(config: TrainConfig, encoders: Sequence[str]) -> dict[str, Any]:
    """What a sweep's record would say of the run."""
    shape = (config.projector.resampler, config.projector.frame_divisor)
    rows = [row for row, preset in PROJECTORS.items() if (preset.resampler, preset.frame_divisor) == shape]
    grid, nested = config.projector.grid, list(config.projector.nested_grids)
    return {
        "encoders": list(encoders),
        "fusion": config.fusion.name if encoders else "",
        "projector": (rows or [config.projector.resampler])[0] if encoders else "",
        "tokens_per_frame": grid[1] * grid[2] if grid and encoders else None,
        "rate": 1.0,
        "seed": config.seed,
        "mode": config.mode,
        "is_trained": True,
        "method": NESTED
        if config.projector.nested_grids
        else RETRAINED
        if config.mask_encoders == "none"
        else ONE_SHOT,
        "nested_grids": nested,
    }


def _run_commands(path: Path, record: RunRecord, results: Results | None, is_staged: bool) -> tuple[str, ...]:
    """Train, score and show a run of the same settings, named NEW."""
    source = f"--from-cache {shlex.quote(_place(record.store))}"
    if record.live:
        live = {name: record.live[name] for name in ("dataset", "root") if record.live.get(name)}
        source = " ".join(
            ["--end-to-end", *(f"--{name} {shlex.quote(redact(str(value)))}" for name, value in live.items())]
        )
    commands = [f"merv-train {source} --config {CONFIG_FILE} --out NEW"]
    if is_staged:
        commands = [f"merv-train --resume {shlex.quote(str(path))}  # staged: its settings are in stages.yaml"]
    split = f" --split {shlex.quote(results.record['split'])}" if results else ""
    blocks = {member.block for member in results.answers} if results else set()
    if RETRAINED in blocks:
        commands.append(f"merv-eval run --checkpoint NEW{split}")
    if blocks & {POST_HOC, ONE_SHOT}:
        commands.append(f"merv-eval mask --checkpoint NEW{split}")
    if NESTED in blocks:
        commands.append(f"merv-eval grids --checkpoint NEW{split}")
    return (*commands, "merv-eval report NEW")


def _place(store: str) -> str:
    return redact(store) if store and is_url(store) else store or "STORE"

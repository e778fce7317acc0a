"""The folder of a run of several stages; a recipe of one stage is RUN itself. Imports no torch.

RUN/stages.yaml    name -> settings, in order
RUN/align/         each stage is a complete run; a later one has `init:` the one before
RUN/finetune/
"""

from __future__ import annotations

import re
from pathlib import Path

from mervcache.config import load_yaml, overlay
from mervcache.errors import UserError
from trainer.config import CONFIG_FILE, Stage, Stages, TrainConfig, read_config

STAGES_FILE = "stages.yaml"  # in the folder of a chain


def stage_folder(out: Path, stages: Stages, stage: Stage) -> Path:
    """The run folder of a stage."""
    return Path(out) / stage.name if len(stages) > 1 else Path(out)


def check_is_free(out: Path, stages: Stages, only: str | None = None) -> None:
    """Raise UserError for a folder in which a run of these stages, or of the one named `only`, has begun."""
    chosen = [stage for stage in stages if only in (None, stage.name)]
    if begun := [s.name for s in chosen if (stage_folder(out, stages, s) / CONFIG_FILE).exists()]:
        held = ", ".join(begun) if len(stages) > 1 else "a run"
        raise UserError(f"{out} holds {held} already; go on with --resume auto, or choose another --out")


def read_stages(run: Path) -> Stages:
    """The stages a run was started with; those of a single run are itself."""
    path = Path(run) / STAGES_FILE
    if not path.is_file():
        return (Stage(name=Path(run).name, config=read_config(run)),)
    stages = load_yaml(path)
    if not stages or not all(re.fullmatch(r"[\w-]+", str(name)) for name in stages):
        raise UserError(f"{path} must hold the settings of stages by plain names, got {list(stages)}")
    return tuple(Stage(name=name, config=overlay(TrainConfig(), settings)) for name, settings in stages.items())


def check_are_runs(*folders: Path) -> None:
    """Raise UserError for a folder without a run or an export in it, before torch is loaded to read it."""
    for run in map(last_stage, folders):
        if not (run / CONFIG_FILE).is_file():
            raise UserError(no_checkpoint(run))


def no_checkpoint(run: Path) -> str:
    """The message for a folder that holds nothing trained."""
    if (run / CONFIG_FILE).is_file():
        return f"{run} was stopped before its first checkpoint; go on with merv-train --resume {run}"
    return f"{run} holds no run; give the folder that merv-train wrote with --out"


def last_stage(run: Path) -> Path:
    """The run's own folder: of a chain of stages, that of its last one."""
    stages = read_stages(run) if (Path(run) / STAGES_FILE).is_file() else ()
    return stage_folder(run, stages, stages[-1]) if stages else Path(run)

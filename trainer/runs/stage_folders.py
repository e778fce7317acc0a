"""The folder of a run of several stages; a recipe of one stage is RUN itself. Imports no torch.

RUN/stages.yaml    name -> settings, in order
RUN/align/         each stage is a complete run; a later one has `init:` the one before
RUN/finetune/
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from mervcache.config import load_yaml, overlay, to_builtin
from mervcache.errors import StoreDamagedError, UserError
from mervcache.files import record_digest, replace_text
from trainer.config import CONFIG_FILE, RECORD_FILE, TrainConfig, read_config
from trainer.paths import found_path, found_settings, recorded_settings
from trainer.recipes import Stage, Stages
from trainer.runs.lock import STAGES_LOCK, lock_holder

STAGES_FILE = "stages.yaml"  # in the folder of a chain
LLM_FOLDER = "llm"  # of a run or an export
METRICS_FILE = "metrics.jsonl"
EXPORT_FILE = "export.json"  # of an export
DIGEST = "digest"  # the first entry of that file: the digest of the others


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
    digest = stages.pop(DIGEST, None)
    if digest is not None and digest != record_digest(stages):
        raise StoreDamagedError(
            f"{path} was changed after the run began; put it back from a copy, and give other settings with --config or"
            " as options"
        )
    if not stages or not all(re.fullmatch(r"[\w-]+", str(name)) for name in stages):
        raise UserError(f"{path} must hold the settings of stages by plain names, got {list(stages)}")
    found = {name: found_settings(settings, Path(run)) for name, settings in stages.items()}
    return tuple(Stage(name=name, config=overlay(TrainConfig(), settings)) for name, settings in found.items())


def write_stages(out: Path, stages: Stages) -> None:
    """Write the stages of a chain to its folder, with a digest of themselves."""
    settings = {name: recorded_settings(one, out) for name, one in settings_by_stage(stages).items()}
    replace_text(out / STAGES_FILE, yaml.safe_dump({DIGEST: record_digest(settings), **settings}, sort_keys=False))


def settings_by_stage(stages: Stages) -> dict[str, Any]:
    """Name -> settings, as YAML holds them."""
    return {stage.name: to_builtin(asdict(stage.config)) for stage in stages}


def has_local_llm(run: Path) -> bool:
    """Whether a run or an export was trained with an LLM of a folder, wherever that is now, not of the Hub."""
    recorded = str(load_yaml(run / CONFIG_FILE).get("llm"))
    return recorded.startswith(("./", "../")) or os.path.isabs(recorded) or os.path.isdir(found_path(recorded, run))


def lacks_llm(run: Path) -> bool:
    """Whether the LLM of a run or an export is read from a folder that is not where its settings name it."""
    holds_llm = (run / LLM_FOLDER / "config.json").is_file()
    return has_local_llm(run) and not holds_llm and not os.path.isdir(read_config(run).llm)


def check_llm_is_there(run: Path) -> None:
    """Raise UserError where `lacks_llm`."""
    if lacks_llm(run):
        recorded = load_yaml(run / CONFIG_FILE)["llm"]
        raise UserError(
            f"there is no folder {found_path(recorded, run)}, the LLM of {run} (recorded as {recorded} in"
            f" {CONFIG_FILE}); put it there, or name its folder with --llm of merv-eval ask and run"
        )


def check_are_runs(*folders: Path) -> None:
    """Raise UserError for a folder without a run or an export in it, before torch is loaded to read it."""
    for run in map(last_stage, folders):
        if not (run / CONFIG_FILE).is_file():
            raise UserError(no_checkpoint(run))


def check_are_trained(*folders: Path) -> None:
    """Raise UserError for a folder without a checkpoint or an export in it, before torch is loaded to read it."""
    check_are_runs(*folders)
    for folder in folders:
        run = last_stage(folder)
        if not any(run.glob("checkpoints/step-*")) and not (run / EXPORT_FILE).is_file():
            raise UserError(no_checkpoint(run))


def no_checkpoint(run: Path) -> str:
    """The message for a folder that holds nothing trained."""
    # The folder of a later stage is made when its turn comes; the lock of the whole command is in the one above.
    in_stages = lock_holder(run.parent, STAGES_LOCK) if (run.parent / STAGES_FILE).is_file() else None
    if holder := lock_holder(run) or lock_holder(run, STAGES_LOCK) or in_stages:
        return f"{run} is being trained by {holder}, {_progress(run)}; ask again then"
    if (run / CONFIG_FILE).is_file():
        return f"{run} was stopped before its first checkpoint; go on with merv-train --resume {run}"
    if any(run.glob("checkpoints/step-*")):
        return f"{run} has checkpoints and no {CONFIG_FILE}; put it back from a copy of the run"
    return f"{run} holds no run; give the folder that merv-train wrote with --out"


def _progress(run: Path) -> str:
    """How far a run without a checkpoint is, and when its first one comes."""
    if not (run / CONFIG_FILE).is_file():
        return "which has not begun its first step; a checkpoint comes later"
    config, done = read_config(run), 0
    with suppress(OSError, ValueError, KeyError, TypeError, IndexError):  # nothing is written yet, or half a line
        done = json.loads((run / METRICS_FILE).read_text().rpartition("\n")[0].splitlines()[-1])["step"] + 1
    num_steps = read_record_file(run)["num_steps"]
    minutes = f" or {config.checkpoint_minutes:g} minutes" if config.checkpoint_minutes is not None else ""
    first = min(config.checkpoint_every, num_steps)
    return f"at step {done:,} of {num_steps:,}; its first checkpoint comes after step {first:,}{minutes}"


def last_stage(run: Path) -> Path:
    """The run's own folder: of a chain of stages, that of its last one."""
    stages = read_stages(run) if (Path(run) / STAGES_FILE).is_file() else ()
    return stage_folder(run, stages, stages[-1]) if stages else Path(run)


def read_record_file(run: Path) -> dict[str, Any]:
    """run.json as JSON, its paths as `found_path`; StoreDamagedError where it is missing or cannot be parsed."""
    try:
        record = json.loads((run / RECORD_FILE).read_text())
    except OSError as error:
        raise StoreDamagedError(no_record(run, str(error.strerror))) from error
    except ValueError as error:
        raise StoreDamagedError(no_record(run, f"it is not JSON ({error})")) from error
    if not isinstance(record, dict):
        raise StoreDamagedError(no_record(run, f"it holds {type(record).__name__}, not a mapping"))
    for part in (record, record.get("live")):
        for name in ("store", "root"):
            if isinstance(part, dict) and isinstance(path := part.get(name), str):
                part[name] = found_path(path, run)
    return record


def no_record(run: Path, reason: str) -> str:
    """The message for a run whose record cannot be read."""
    return (
        f"{run / RECORD_FILE}, the record of the run, cannot be read: {reason}; put it back from a copy of the run:"
        " it alone names the tokens that the weights were trained on"
    )

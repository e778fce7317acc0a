"""Trackers: a run's metrics in TensorBoard or Weights & Biases besides its own JSON lines, through accelerate.

RUN/trackers/merv-train/   TensorBoard's event files: tensorboard --logdir RUN/trackers
wandb's own folder         in RUN; WANDB_MODE=offline keeps it from sending anything
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mervcache.errors import UserError
from trainer.config import TrainConfig

TRACKERS_FOLDER, PROJECT = "trackers", "merv-train"


def check_trackers(config: TrainConfig) -> None:
    """Each tracker asked for must be installed: accelerate leaves out those that are not, with a warning."""
    for name in config.trackers:
        if find_spec(name) is None:
            raise UserError(f"tracker {name} is not installed: pip install 'merv-pipeline[track]', or leave it out")


def start_trackers(accelerator: Accelerator, config: TrainConfig, run: Path, start: int) -> None:
    """Begin logging from step `start`; TensorBoard forgets what an earlier part of the run logged behind it."""
    accelerator.init_trackers(
        PROJECT,
        config=flat(dataclasses.asdict(config)),
        init_kwargs={"tensorboard": {"purge_step": start}, "wandb": {"name": run.name, "dir": str(run)}},
    )


def flat(settings: Mapping[str, Any], where: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings under dotted names, as trackers take them."""
    found: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{where}{name}.")
        else:
            found[f"{where}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def log(accelerator: Accelerator, row: Mapping[str, Any]) -> None:
    """One step's metrics."""
    accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def stop_trackers(accelerator: Accelerator) -> None:
    """Flush and close. `Accelerator.end_training` would end the ranks' process group too."""
    for tracker in accelerator.trackers:
        tracker.finish()

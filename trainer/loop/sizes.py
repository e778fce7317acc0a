"""Batch size, epochs and learning rates that follow from the number of samples, where nobody has chosen them.

A recipe has the values that were published for hundreds of thousands of samples. For a few dozen they would make one
step of repeated samples. The settings in `TrainConfig.undecided` give way then: the batch becomes smaller and the
epochs more until a run has `SHORT_STEPS` steps, and below `LONG_STEPS` steps rates rise with the square root of the
steps that are missing, at most by `MOST_RATE`: under a frozen LLM, 160 steps learned more at 4e-3 than at the 1e-3 of a
long run (benchmarks/README.md, learning rates).
"""

from __future__ import annotations

from dataclasses import fields, replace
from math import ceil, sqrt
from pathlib import Path
from typing import Any

from trainer.config import CONFIG_FILE, TrainConfig, read_config

SHORT_STEPS = 100  # that a run of few samples comes to
LONG_STEPS = 1000  # from which on rates are as published
MOST_RATE = 4.0  # times a published rate
LEAST_BATCH = 4  # samples per step, where there are as many
FEW_STEPS = 50  # fewer are reported


def fit_to_samples(config: TrainConfig, per_epoch: int, num_processes: int = 1) -> TrainConfig:
    """The settings with the undecided ones decided for `per_epoch` samples an epoch; `by_samples` is empty then."""
    undecided = config.undecided
    chosen: dict[str, Any] = {}
    if "batch_size" in undecided:
        readings = per_epoch if config.max_steps is not None or "epochs" in undecided else config.epochs * per_epoch
        size = max(_power_of_two(readings / SHORT_STEPS), min(LEAST_BATCH, _power_of_two(per_epoch)))
        size = num_processes * ceil(size / num_processes)  # ranks take equal shares
        chosen["batch_size"] = min(size, config.batch_size)
    batch = chosen.get("batch_size", config.batch_size)
    if "epochs" in undecided and config.max_steps is None:
        chosen["epochs"] = max(config.epochs, float(ceil(SHORT_STEPS * batch / per_epoch)))
    steps = config.max_steps or max(1, int(chosen.get("epochs", config.epochs) * per_epoch) // batch)
    factor = min(MOST_RATE, max(1.0, sqrt(LONG_STEPS / steps)))
    rates = [name.removeprefix("optimizer.") for name in undecided if name.startswith("optimizer.")]
    raised = {name: float(f"{factor * getattr(config.optimizer, name):.2g}") for name in rates if factor > 1}
    optimizer = replace(config.optimizer, **raised)
    return replace(config, **chosen, optimizer=optimizer, by_samples={})


def as_begun(config: TrainConfig, run: Path) -> TrainConfig:
    """The settings with the undecided ones as they were decided when `run` began; unchanged for a new run."""
    if not config.by_samples or not (run / CONFIG_FILE).is_file():
        return config
    before = read_config(run)
    rates = [name.removeprefix("optimizer.") for name in config.undecided if name.startswith("optimizer.")]
    optimizer = replace(config.optimizer, **{name: getattr(before.optimizer, name) for name in rates})
    names = {field.name for field in fields(config)}.intersection(config.undecided)
    return replace(config, **{name: getattr(before, name) for name in names}, optimizer=optimizer, by_samples={})


def size_warnings(config: TrainConfig, per_epoch: int, num_steps: int) -> list[str]:
    """What is wrong with a run's sizes for its number of samples, with the options that change them."""
    lines = []
    if config.batch_size > per_epoch:
        lines.append(
            f"a batch of {config.batch_size:,} holds each of the {per_epoch:,} samples more than once: set a smaller"
            " --batch-size, or leave it out"
        )
    if num_steps < FEW_STEPS:
        how = f"raise --max-steps (now {config.max_steps})"
        if config.max_steps is None:
            how = f"raise --epochs (now {config.epochs:g}) or lower --batch-size (now {config.batch_size:,})"
        lines.append(f"{num_steps} steps of training are few, and fewer than {FEW_STEPS} teach little: {how}")
    return lines


def _power_of_two(value: float) -> int:
    """The largest power of two that is not larger, at least 1."""
    return 1 << max(0, int(value).bit_length() - 1)

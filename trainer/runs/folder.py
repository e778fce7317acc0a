"""Folder: a run's folder before its first step, and whether a run may go on in it.

RUN/config.yaml   the settings in force     RUN/run.json   what the data and the model were
RUN/llm/          tokenizer, and the sizes of a fresh LLM
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from featurestore.locate import check_room
from mervcache.errors import UserError
from trainer.config import CONFIG_FILE, TrainConfig, read_config
from trainer.model.build import Built
from trainer.model.llm import save_shape
from trainer.runs import checkpoint
from trainer.runs.files import replace_text
from trainer.runs.record import LLM_FOLDER, RunRecord

# Settings that change neither weights nor losses beyond the rounding of sums: a resumed run may have others.
FREE_ON_RESUME = {
    "activation_checkpointing",
    "allow_fresh_frozen",
    "checkpoint_every",
    "checkpoint_minutes",
    "deterministic",
    "eval_every",
    "eval_limit",
    "eval_split",
    "keep_checkpoints",
    "log_every",
    "prefetch_batches",
    "trackers",
}


def starting_point(out: Path, config: TrainConfig, resume: bool) -> Path | None:
    """The checkpoint to go on from; an existing run is neither overwritten nor continued with other settings."""
    check_room(out, "run", "--out")
    if not (out / CONFIG_FILE).exists():
        return None
    if not resume:
        raise UserError(f"{out} holds a run already; go on with --resume auto, or choose another --out")
    before = read_config(out)
    names = [field.name for field in fields(config) if field.name not in _free(config)]
    if odd := [name for name in names if getattr(before, name) != getattr(config, name)]:
        values = "; ".join(f"{name} was {getattr(before, name)!r}, is {getattr(config, name)!r}" for name in odd)
        raise UserError(
            f"{out} was started with other settings ({values}); resume with the same, or choose another --out"
        )
    return checkpoint.newest(out)


def _free(config: TrainConfig) -> set[str]:
    """Settings that may change: a loss per token is one sum, however cut; the mean of micro-batches is not."""
    return FREE_ON_RESUME | ({"micro_batch_size"} if config.loss == "per_token" else set())


def write_folder(out: Path, built: Built, record: RunRecord, *, is_new: bool) -> None:
    """Write settings, record and tokenizer, before the first step; a resumed run's settings may have changed."""
    out.mkdir(parents=True, exist_ok=True)
    if is_new:
        save_shape(built.llm, out / LLM_FOLDER)
        record.write(out)
    replace_text(out / CONFIG_FILE, built.config.to_yaml())

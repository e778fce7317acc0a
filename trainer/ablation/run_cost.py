"""Visual tokens, parameters and FLOPs of trained runs, by their settings: no weights of an LLM are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import isqrt
from pathlib import Path

import torch

from mervcache.errors import UserError
from trainer.ablation.flops import Cost, count
from trainer.config import TrainConfig, read_config
from trainer.model.llm import LoadedLLM, holds_shape, hub_options, load_saved_shape, reason_not_loaded
from trainer.model.video_llm import build
from trainer.runs.run_record import LLM_FOLDER, RunRecord, read_metrics
from trainer.runs.stage_folders import last_stage


def run_cost(run: Path, text_tokens: int, *, tokens_per_frame: int | None = None) -> Cost:
    """Cost of one forward of a run's model for a clip with so many text tokens; frozen encoders are left out.

    `tokens_per_frame` is one of the nested grids of a run that has such. Raises UserError where the LLM's sizes cannot
    be read.
    """
    folder = last_stage(run)
    config, record = read_config(folder), RunRecord.read(folder)
    if config.train_encoders:
        raise UserError(f"{run} trains encoders, which are not counted")
    if tokens_per_frame is not None:
        time, side = config.projector.grid[0], isqrt(tokens_per_frame)
        config = replace(config, projector=replace(config.projector, nested_grids=(), grid=(time, side, side)))
    llm = llm_without_weights(config, folder / LLM_FOLDER)
    with torch.device("meta"):
        built = build(replace(config, activation_checkpointing=False), record.shapes, llm)
    return count(built, record.shapes, text_tokens)


def llm_without_weights(config: TrainConfig, saved: Path) -> LoadedLLM:
    """A run's LLM on the meta device: sizes as the run saved them in `saved`, else as they are published."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with torch.device("meta"):
        if holds_shape(saved):
            return load_saved_shape(saved)
        try:
            sizes = AutoConfig.from_pretrained(config.llm, trust_remote_code=False, **hub_options(config.llm))
            model = AutoModelForCausalLM.from_config(sizes, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(saved, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"the sizes of LLM {config.llm} cannot be read: {reason_not_loaded(error)}") from error
    return LoadedLLM(model=model, tokenizer=tokenizer, is_fresh=False)


def mean_text_tokens(runs: Iterable[Path]) -> int | None:
    """Mean text tokens of a training sample by the runs' metrics, rounded; None where none of them has any.

    Text-only runs are preferred: in others, samples without a clip have no visual tokens, which the metrics do not
    tell apart.
    """
    found: list[tuple[int, int]] = []
    for run in map(last_stage, runs):
        rows = [row for row in read_metrics(run) if row.get("tokens") and row.get("samples")]
        if rows:
            visual = RunRecord.read(run).num_visual_tokens
            mean = sum(row["tokens"] for row in rows) / sum(row["samples"] for row in rows)
            found.append((visual, max(1, round(mean - visual))))
            if visual == 0:
                break
    return min(found)[1] if found else None

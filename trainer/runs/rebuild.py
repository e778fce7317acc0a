"""Rebuild: settings and record of a run -> its model as it was trained, before any weights are put in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mervcache.errors import UserError
from trainer.config import TrainConfig
from trainer.model.build import Built, build, llm_dtype, new_llm
from trainer.model.llm import LoadedLLM, holds_shape, load_saved_shape
from trainer.runs.record import LLM_FOLDER, RunRecord


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained model with what it was trained on."""

    built: Built
    record: RunRecord
    step: int  # steps done


def rebuild(config: TrainConfig, record: RunRecord, llm: LoadedLLM) -> Built:
    """The model of a run as it was trained, before its weights are put in."""
    built = build(config, record.shapes, llm)
    if config.train_encoders:
        from trainer.end_to_end import empty_encoders  # the pipeline's encoders: only where a run has trained some

        built.model.join(empty_encoders(config, record.encoders))
    return built


def resumed_llm(config: TrainConfig, run: Path) -> LoadedLLM:
    """The LLM of a run that has begun: its shape alone where the run's checkpoints hold all of its weights."""
    if holds_shape(run / LLM_FOLDER):
        if config.llm_quant is not None:
            raise UserError(f"llm_quant is for an LLM as it is published, and {run} holds one that was trained")
        return load_saved_shape(run / LLM_FOLDER, llm_dtype(config))
    return new_llm(config, ())

"""Projectors and fusion of a run, from its checkpoint alone: no LLM is loaded, which may take minutes.

They run in float32 whatever the run's precision: rounding to 16 bits would be noise in what is measured of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from featurestore.clips import Sample
from mervcache.errors import UserError
from trainer.config import TrainConfig, read_config, used_encoders
from trainer.data.tokens import ClipTokens, StoreTokens
from trainer.model.fusion import Fusion, build_fusion
from trainer.model.projectors import Projector, build_projectors
from trainer.runs import checkpoint
from trainer.runs.load import is_export, read_weights
from trainer.runs.run_record import RunRecord
from trainer.runs.stage_folders import last_stage, no_checkpoint
from trainer.runs.weight_names import to_model_names
from trainer.sources import open_store_for

if TYPE_CHECKING:
    from trainer.runs.load import LoadedRun

_HEAD_BIAS = re.compile(r"projectors\.0\.head\.(?:(\d+)\.)?bias")  # that of the last layer has the LLM's width


@dataclass(frozen=True, kw_only=True)
class VisualPart:
    """What turns the tokens of a clip into the visual tokens of the LLM, in evaluation mode."""

    folder: Path  # of the run, or of the last stage of a chain
    step: int  # steps done
    config: TrainConfig
    record: RunRecord
    projectors: Mapping[str, Projector]  # by encoder, in the order of the fusion
    fusion: Fusion
    width: int  # of the LLM

    def project(self, tokens: Mapping[str, ClipTokens]) -> list[Tensor]:
        """encoder -> tokens_BTHWD on any device to embeddings_BNM, in the order of the fusion."""
        device = next(self.fusion.parameters(), next(self._first.parameters())).device
        return [projector(tokens[encoder].to(device)) for encoder, projector in self.projectors.items()]

    @property
    def _first(self) -> Projector:
        return next(iter(self.projectors.values()))


def load_visual(run: Path, *, step: int | None = None, best: bool = False) -> VisualPart:
    """Projectors and fusion of a run, a chain's last stage or an export: newest, best or that of a step.

    Weights are compared with their digests; UserError for a text-only run. On a GPU where there is one.
    """
    folder = last_stage(Path(run))
    config, record = read_config(folder), RunRecord.read(folder)
    if config.mode == "text-only":
        raise UserError(f"{run} is text-only: it has no projectors and no fusion; give a run with encoders")
    done, weights = _read_weights(folder, step=step, best=best)
    biases = {int(found[1] or 0): weights[found[0]] for found in filter(None, map(_HEAD_BIAS.fullmatch, weights))}
    width = len(biases[max(biases)])
    used = used_encoders(config, list(record.shapes))
    projectors = build_projectors(config.projector, {encoder: record.shapes[encoder] for encoder in used}, width)
    fusion = build_fusion(config.fusion, len(used), width)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for prefix, module in [*((f"projectors.{i}.", p) for i, p in enumerate(projectors.values())), ("fusion.", fusion)]:
        found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        module.load_state_dict(found)
        module.to(device).eval()
    return VisualPart(
        folder=folder, step=done, config=config, record=record, projectors=projectors, fusion=fusion, width=width
    )


def open_tokens(part: VisualPart, store: str | None) -> tuple[str, list[Sample], StoreTokens]:
    """Path, samples and tokens of the run's store, or of another one that holds the same identities."""
    path = store or part.record.store
    if not path:
        raise UserError(f"{part.folder} names no store of its own; give the one whose tokens it reads with --store")
    run = cast("LoadedRun", _Run(built=_Config(config=part.config), record=part.record))
    return path, *open_store_for(run, path)


@dataclass(frozen=True, kw_only=True)
class _Config:
    config: TrainConfig


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The part of a loaded run that opening its store reads."""

    built: _Config
    record: RunRecord


def _read_weights(run: Path, *, step: int | None, best: bool) -> tuple[int, Mapping[str, Tensor]]:
    """Steps done, and the weights by their names in `VideoLLM`, compared with their digests."""
    if is_export(run):
        done, weights = read_weights(run)
        if step not in (None, done):
            raise UserError(f"{run} is an export of step {done} and has no step {step}")
        return done, weights
    folders = checkpoint.checkpoints(run)
    if step is not None:
        folder = next((folder for folder in folders if int(folder.name.rpartition("-")[2]) == step), None)
        if folder is None and folders:
            kept = ", ".join(str(int(folder.name.rpartition("-")[2])) for folder in folders)
            raise UserError(f"{run} has no checkpoint of step {step}; it has {kept}")
    else:
        folder = checkpoint.best(run) if best else checkpoint.newest_finite(run)
    if folder is None and best and folders:
        raise UserError(f"no checkpoint of {run} was validated: train with --eval-every, or leave out --best")
    if folder is None:
        raise UserError(no_checkpoint(run))
    done = checkpoint.load_state(folder).step
    return done, to_model_names(load_file(folder / checkpoint.MODEL_FILE), RunRecord.read(run).encoder_order)

"""Initialise: start a run from another run's weights instead of fresh ones.

Comes in: a run's folder (of a chain of stages: its last one) or an export, and the model of the new run. Goes out: the
model with all of the run's weights where both are the same, otherwise with the parts that both have, and a message that
names what was loaded and what was not. A part is one encoder's projector, the fusion, the LLM or an encoder that is
trained; it is loaded whole or not at all. The LLM's own weights are put in before adapters change its layers; from then
on they exist only in the new run, whose checkpoints therefore hold them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from featurestore.clips import Sample
from mervcache.errors import UserError
from trainer.config import TrainConfig, read_config
from trainer.data.tokens import TokenShape
from trainer.model.llm import LoadedLLM, is_adapter
from trainer.model.video_llm import Built, new_llm
from trainer.runs import checkpoint
from trainer.runs.checkpoint import LLM_PREFIX
from trainer.runs.load import is_export, read_weights, resumed_llm
from trainer.runs.run_record import RunRecord
from trainer.runs.stage_folders import last_stage

FUSION_PREFIX = "fusion."
BASE = ".base_layer."  # in names of parameters beside adapters, as peft makes them


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A run whose weights another one starts from."""

    run: Path
    step: int  # steps done
    config: TrainConfig
    record: RunRecord
    weights: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What was taken over from another run, without holding its weights."""

    names: frozenset[str]  # tensors of the new model
    message: str  # for a person


@dataclass(kw_only=True)
class _Loading:
    """What is being taken over."""

    origin: Origin
    names: set[str] = field(default_factory=set)  # tensors of the new model
    parts: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # part -> why it was not loaded

    @property
    def message(self) -> str:
        """Message that lists the parts loaded, and why the others were not."""
        left = "".join(f"; not {part}: {reason}" for part, reason in self.missing.items())
        done = f"{self.origin.run} (step {self.origin.step} of {self.origin.record.num_steps})"
        return f"weights of {done}: loaded {', '.join(self.parts)}{left}"


def read_origin(init: str) -> Origin:
    """The newest checkpoint of the run that `init` names, or what an export holds; either after its digests agreed."""
    run = last_stage(Path(init))
    step, weights = read_weights(run) if is_export(run) else _newest_weights(run)
    return Origin(run=run, step=step, config=read_config(run), record=RunRecord.read(run), weights=weights)


def _newest_weights(run: Path) -> tuple[int, dict[str, Tensor]]:
    folder = checkpoint.newest(run)
    if folder is None:
        raise UserError(f"init: {run} has no checkpoint yet; train it first, or name another run")
    step = checkpoint.load_state(folder).step  # compares the files with their digests
    return step, load_file(folder / checkpoint.MODEL_FILE)


def starting_llm(
    origin: Origin, config: TrainConfig, samples: Iterable[Sample], words: Iterable[str] = ()
) -> LoadedLLM:
    """The new run's LLM, with the weights that the origin's checkpoint holds where it is the same LLM."""
    if origin.config.llm != config.llm:
        return new_llm(config, samples, words)
    llm = resumed_llm(config, origin.run)
    held = {
        name.removeprefix(LLM_PREFIX).replace(BASE, "."): value
        for name, value in origin.weights.items()
        if name.startswith(LLM_PREFIX) and not is_adapter(name)
    }
    if not held:
        return llm  # it was not trained: both runs take it from where it came from
    shapes = {name: value.shape for name, value in llm.model.state_dict().items()}
    if {name: value.shape for name, value in held.items()} != shapes:
        raise UserError(f"init: the LLM in {origin.run} is not of the shape of {config.llm}")
    llm.model.load_state_dict(held)
    return replace(llm, is_fresh=True)


@torch.no_grad()
def load_parts(origin: Origin, built: Built, shapes: Mapping[str, TokenShape]) -> Loaded:
    """Every part of the origin that fits into the model; an error if none does."""
    loaded = _Loading(origin=origin)
    before = list(origin.record.shapes)
    for index, encoder in enumerate(built.model.encoders):
        reason = _unlike_tokens(origin, built, encoder, shapes[encoder].identity)
        old = f"projectors.{before.index(encoder)}." if encoder in before else ""
        _load(loaded, built, f"projector {encoder}", f"projectors.{index}.", old, reason)
    for index, encoder in enumerate(built.model.trained_names):
        there = origin.config.train_encoders
        old = f"trained_encoders.{there.index(encoder)}." if encoder in there else ""
        reason = None if old else "it was not trained there"
        _load(loaded, built, f"encoder {encoder}", f"trained_encoders.{index}.", old, reason)
    if built.model.has_visual and list(built.model.fusion.state_dict()):
        _load(loaded, built, "fusion", FUSION_PREFIX, FUSION_PREFIX, _unlike_fusion(origin, built))
    _load_llm(loaded, built)
    if not loaded.parts:
        raise UserError(f"nothing of {origin.run} fits: {'; '.join(f'{p}: {r}' for p, r in loaded.missing.items())}")
    return Loaded(names=frozenset(loaded.names), message=loaded.message)


def _load(loaded: _Loading, built: Built, part: str, prefix: str, old_prefix: str, reason: str | None) -> None:
    """Load what the origin holds under `old_prefix` as tensors under `prefix`, unless a `reason` forbids it."""
    wanted = {name: value for name, value in built.model.state_dict().items() if name.startswith(prefix)}
    found = {
        prefix + n.removeprefix(old_prefix): v for n, v in loaded.origin.weights.items() if n.startswith(old_prefix)
    }
    if reason is None and {n: v.shape for n, v in found.items()} != {n: v.shape for n, v in wanted.items()}:
        reason = "its shapes are others there"
    if reason is not None:
        loaded.missing[part] = reason
        return
    built.model.load_state_dict(found, strict=False)
    loaded.parts.append(part)
    loaded.names |= set(found)


def _load_llm(loaded: _Loading, built: Built) -> None:
    """Load adapters where both runs have the same ones; the LLM's own weights are in already and are only listed."""
    origin, config = loaded.origin, built.config
    if origin.config.llm != config.llm:
        loaded.missing["LLM"] = f"there it is {origin.config.llm}, here {config.llm}"
        return
    names = {name for name in origin.weights if name.startswith(LLM_PREFIX)}
    adapters = {name for name in names if is_adapter(name)}
    if names - adapters:
        loaded.parts.append("LLM")
        loaded.names |= {
            name for name in built.model.state_dict() if name.startswith(LLM_PREFIX) and not is_adapter(name)
        }
    if not adapters:
        return  # new ones begin as no change at all
    here = {name: v.shape for name, v in built.model.state_dict().items() if is_adapter(name)}
    if here == {name: origin.weights[name].shape for name in adapters}:
        built.model.load_state_dict({name: origin.weights[name] for name in adapters}, strict=False)
        loaded.parts.append("LoRA adapters")
        loaded.names |= adapters
    else:
        loaded.missing["LoRA adapters"] = "here there are none, or of other shapes"


def _unlike_tokens(origin: Origin, built: Built, encoder: str, identity: str) -> str | None:
    there = origin.record.shapes.get(encoder)
    if there is None:
        return "there is none there"
    if encoder in origin.config.train_encoders and encoder not in built.model.trained_names:
        return "there its encoder was trained too"
    return None if there.identity == identity else f"it was trained on tokens of identity {there.identity}"


def _unlike_fusion(origin: Origin, built: Built) -> str | None:
    """Why the fusion cannot be taken over, if so; its weights stand in the order of the encoders."""
    if origin.config.fusion != built.config.fusion:
        return f"there it is {origin.config.fusion.name}"
    there = list(origin.record.shapes)
    return None if there == list(built.model.encoders) else f"there it mixes {', '.join(there) or 'nothing'}"

"""Starts a run from another run's weights (`init`): all of them, or with `init_partial` the parts that both have.

A part is one encoder's projector, the fusion, the LLM or an encoder that is trained; it is loaded whole or not at all.
The LLM's own weights are loaded before adapters change its layers; from then on they exist only in the new run, whose
checkpoints therefore hold them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from featurestore.clips import Sample
from mervcache.errors import UserError
from trainer.config import TrainConfig, read_config
from trainer.data.tokens import TokenSource
from trainer.model.llm import LoadedLLM, is_adapter
from trainer.model.video_llm import Built, new_llm
from trainer.paths import is_same_path
from trainer.runs import checkpoint
from trainer.runs.checkpoint import LLM_PREFIX
from trainer.runs.load import is_export, read_weights, resumed_llm
from trainer.runs.run_record import RunRecord
from trainer.runs.stage_folders import last_stage
from trainer.runs.unbound import is_unbound, why_unreadable
from trainer.runs.weight_names import to_model_names

BASE = ".base_layer."  # in names of weights that have an adapter, as peft makes them


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
    """What was loaded from another run, without holding its weights."""

    names: frozenset[str]  # tensors of the new model
    message: str  # lists the parts loaded, and why the others were not; kept in the new run's record


def read_origin(init: str) -> Origin:
    """The newest checkpoint of the run (of a chain: of its last stage) or the export that `init` names.

    Its files have been compared with their digests.
    """
    run = last_stage(Path(init))
    if is_export(run):
        step, weights = read_weights(run)
    else:
        folder = checkpoint.newest_finite(run)
        if folder is None:
            raise UserError(f"init: {run} has no checkpoint yet; train it first, or name another run")
        step = checkpoint.load_state(folder).step
        weights = to_model_names(load_file(folder / checkpoint.MODEL_FILE), RunRecord.read(run).encoder_order)
    return Origin(run=run, step=step, config=read_config(run), record=RunRecord.read(run), weights=weights)


def starting_llm(
    origin: Origin,
    config: TrainConfig,
    samples: Iterable[Sample],
    words: Iterable[str] = (),
    device: torch.device | None = None,
) -> LoadedLLM:
    """The new run's LLM, with the weights that the origin's checkpoint holds where it is the same LLM."""
    if not _is_same_llm(origin, config):
        return new_llm(config, samples, words, device)
    llm = resumed_llm(config, origin.run, device)
    weights = {
        name.removeprefix(LLM_PREFIX).replace(BASE, "."): value
        for name, value in origin.weights.items()
        if name.startswith(LLM_PREFIX) and not is_adapter(name)
    }
    if not weights:
        return llm  # it was not trained: both runs load it as published
    if _shapes(weights) != _shapes(llm.model.state_dict()):
        raise UserError(f"init: the LLM in {origin.run} is not of the shape of {config.llm}")
    llm.model.load_state_dict(weights)
    return replace(llm, is_fresh=True)


def _is_same_llm(origin: Origin, config: TrainConfig) -> bool:
    """Whether both runs name one LLM; an export that holds the LLM names its folder without the path."""
    return is_same_path(origin.config.llm, config.llm) or origin.config.llm == Path(config.llm).name


@torch.no_grad()
def load_parts(origin: Origin, built: Built, source: TokenSource) -> Loaded:
    """Load the parts of the origin into the model; UserError unless all fit, or some with `init_partial`.

    Projectors of encoders that the settings leave out by name are not missed.
    """
    model, weights = built.model, origin.weights
    names: set[str] = set()
    parts: list[str] = []
    missing: dict[str, str] = {}  # part -> why it was not loaded
    for part, prefix, old_prefix, reason in _candidates(origin, built, source):
        found = {prefix + n.removeprefix(old_prefix): v for n, v in weights.items() if n.startswith(old_prefix)}
        wanted = {name: value for name, value in model.state_dict().items() if name.startswith(prefix)}
        if reason is None and _shapes(found) != _shapes(wanted):
            reason = "its shapes are others there"
        if reason is None:
            model.load_state_dict(found, strict=False)
            parts.append(part)
            names |= set(found)
        else:
            missing[part] = reason
    missing |= _left_behind(origin, built)
    if not _is_same_llm(origin, built.config):
        missing["LLM"] = f"there it is {origin.config.llm}, here {built.config.llm}"
    else:
        llm_names = {name for name in model.state_dict() if name.startswith(LLM_PREFIX)}
        adapters = {name: value for name, value in weights.items() if name.startswith(LLM_PREFIX) and is_adapter(name)}
        if any(name.startswith(LLM_PREFIX) and name not in adapters for name in weights):
            parts.append("LLM")  # `starting_llm` has loaded it
            names |= {name for name in llm_names if not is_adapter(name)}
        here = {name: value for name, value in model.state_dict().items() if is_adapter(name)}
        if adapters and _shapes(here) == _shapes(adapters):
            model.load_state_dict(adapters, strict=False)
            parts.append("LoRA adapters")
            names |= set(adapters)
        elif adapters:  # without any, fresh ones begin as no change at all
            missing["LoRA adapters"] = "here there are none, or of other shapes"
    if not parts:
        raise UserError(f"nothing of {origin.run} fits: {'; '.join(f'{p}: {r}' for p, r in missing.items())}")
    dropped = {part: reason for part, reason in missing.items() if part not in _left_out_by_name(origin, built)}
    if dropped and not built.config.init_partial:
        raise UserError(
            f"init: not all of {origin.run} can be loaded: {'; '.join(f'{p}: {r}' for p, r in dropped.items())}. Choose"
            " the settings of that run, or --init-partial to load the rest, which is"
            f" {', '.join(parts)}"
        )
    done = f"{origin.run} (step {origin.step} of {origin.record.num_steps})"
    left = "".join(f"; not {part}: {reason}" for part, reason in missing.items())
    return Loaded(names=frozenset(names), message=f"weights of {done}: loaded {', '.join(parts)}{left}")


def _candidates(origin: Origin, built: Built, source: TokenSource) -> Iterable[tuple[str, str, str, str | None]]:
    """Of each part besides the LLM: name, prefix of its tensors here and there, and why it cannot be loaded."""
    model, there = built.model, origin.record.shapes
    old_trained = origin.config.train_encoders
    for index, encoder in enumerate(model.encoders):
        reason = None
        if encoder not in there:
            reason = "there is none there"
        elif encoder in old_trained and encoder not in model.trained_names:
            reason = "there its encoder was trained too"
        elif is_unbound(there[encoder]):
            reason = why_unreadable(origin.record, encoder, source.shapes[encoder], source.facts.get(encoder, {}))
        elif there[encoder].identity != source.shapes[encoder].identity:
            reason = f"it was trained on tokens of identity {there[encoder].identity}"
        old = f"projectors.{list(there).index(encoder)}." if encoder in there else ""
        yield f"projector {encoder}", f"projectors.{index}.", old, reason
    for index, encoder in enumerate(model.trained_names):
        old = f"trained_encoders.{old_trained.index(encoder)}." if encoder in old_trained else ""
        reason = None if old else "it was not trained there"
        yield f"encoder {encoder}", f"trained_encoders.{index}.", old, reason
    if model.fusion is not None and list(model.fusion.state_dict()):
        reason = None
        if origin.config.fusion != built.config.fusion:
            reason = f"there it is {origin.config.fusion.name}"
        elif model.fusion.is_ordered and list(there) != list(model.encoders):
            reason = f"there it mixes {', '.join(there) or 'nothing'}, here {', '.join(model.encoders)}"
        yield "fusion", "fusion.", "fusion.", reason


def _left_out_by_name(origin: Origin, built: Built) -> set[str]:
    """Projectors whose encoders the new run's settings leave out by naming others: reported, and no error."""
    if not built.config.encoders or not built.model.has_visual:
        return set()
    return {f"projector {name}" for name in origin.record.shapes if name not in built.config.encoders}


def _left_behind(origin: Origin, built: Built) -> dict[str, str]:
    """Parts of the origin that have no counterpart in the model, with the reason."""
    model = built.model
    reason = "the new run does not read that encoder"
    left = {f"projector {name}": reason for name in origin.record.shapes if name not in model.encoders}
    if any(name.startswith("fusion.") for name in origin.weights):
        if model.fusion is None:
            left["fusion"] = "the new run is text-only"
        elif not list(model.fusion.state_dict()):
            left["fusion"] = f"there it is {origin.config.fusion.name}, here {built.config.fusion.name}"
    return left


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}

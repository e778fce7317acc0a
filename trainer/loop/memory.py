"""Device memory of training: what one process holds, by part, and the settings that fit a device.

What autograd keeps of the LLM and of the visual path is measured instead of derived from sizes: the first decoder layer
runs on the CPU at two short lengths, projectors and fusion on one clip, and the tensors that are saved for the backward
pass are counted. So adapters, grouped heads and any other architecture cost what they cost. The layers are taken to be
alike. Not compared with a GPU's own figure yet; encoders that are trained themselves are not counted.

B samples of a micro-batch, S sequence length, M LLM width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from mervcache.console import format_bytes
from mervcache.errors import UserError
from trainer.config import TrainConfig, parse_bytes
from trainer.data.partition import Limit
from trainer.data.tokens import ClipTokens, PrefixedTokens, TokenShape
from trainer.loop.launch import Launch, num_processes
from trainer.model.causal_lm import CausalLM
from trainer.model.llm import checkpoint_layers, decoder_layers, is_checkpointed
from trainer.model.projectors import Projector
from trainer.model.video_llm import Built

NUM_MOMENTS = 2  # AdamW's
FLOAT_BYTES = 4
# Of a logit: 2 in 16 bits, 4 in fp32, 4 of log-softmax, which the backward pass keeps, and 6 of both gradients.
LOGIT_BYTES = 16
OUTSIDE_BYTES = 4  # of the last norm by position and channel: its input in fp32; where it is trained, its output too
SHORT, LONG = 16, 48  # positions of the two measurements
USABLE_SHARE = 0.92  # of a device's memory; CUDA's context, work space of kernels and fragments take the rest
FORMULA = (
    "{layers:.0f} bytes a position in all {num_layers} layers together ({plain:.1f} M in each, measured;"
    " {work:.0f} of it are the layer at work) x {positions} positions, {visual:.0f} a clip x {clips} clips"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Device:
    """What each process of a run has."""

    memory: int | None = None  # bytes; None: not known, so nothing is compared
    num_processes: int = 1
    is_sharded: bool = False  # FSDP: weights, gradients and moments are divided by the processes

    @property
    def usable(self) -> float:
        return float("inf") if self.memory is None else USABLE_SHARE * self.memory


ONE_PROCESS = Device()


def device_memory(config: TrainConfig, device: torch.device | str) -> int | None:
    """Bytes of a device: as configured, else what torch reports of a GPU."""
    if config.device_memory is not None:
        return parse_bytes("device_memory", config.device_memory)
    is_gpu = torch.device(device).type == "cuda"
    return torch.cuda.get_device_properties(device).total_memory if is_gpu else None


def planned_device(config: TrainConfig, launch: Launch | None, processes: int | None) -> Device:
    """What each process of a run would have that is started on this machine, or on one whose memory is configured."""
    memory = device_memory(config, "cuda" if torch.cuda.is_available() else "cpu")
    if launch is None:
        return Device(memory=memory)
    # Without a GPU the run is planned for another machine, and fsdp is meant for one that has some.
    num_gpus = torch.cuda.device_count() or processes or 0
    return Device(memory=memory, num_processes=num_processes(launch, processes, num_gpus), is_sharded=launch == "fsdp")


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that autograd keeps of a forward pass, as measured."""

    layer: float  # of a decoder layer by position
    layer_input: float  # of its input by position: all that is kept with activation checkpointing
    layer_copies: float  # of a decoder layer, whatever the positions: weights that autocast has cast
    outside: float  # of the embeddings and the last norm, by position
    num_layers: int
    clip: float  # of projectors and fusion by clip

    def per_position(self, *, is_checkpointed: bool) -> float:
        """All layers together, what is before and behind them, and the layer that the backward pass is at.

        Of that one there are gradients as large as what it keeps, and with checkpointing what it keeps.
        """
        kept = self.layer_input if is_checkpointed else self.layer
        return self.num_layers * kept + self.outside + (2 if is_checkpointed else 1) * self.layer


def measure(built: Built, shapes: Mapping[str, TokenShape]) -> Activations:
    """Run the first decoder layer, then projectors and fusion, on the device where they are, and count what is kept."""
    model, llm = built.model, built.model.llm
    was_training, wanted = model.training, is_checkpointed(llm, built.config)
    model.train()
    checkpoint_layers(llm, is_on=False)
    try:
        with torch.random.fork_rng(), built.autocast(llm.device):
            short, long = (_layer_bytes(llm, length) for length in (SHORT, LONG))
            layer = (long - short) / (LONG - SHORT)
            embeddings = llm.get_input_embeddings().weight
            return Activations(
                layer=layer,
                layer_input=embeddings.shape[1] * embeddings.element_size(),
                layer_copies=short - SHORT * layer,
                outside=OUTSIDE_BYTES * embeddings.shape[1] * (2 if built.config.train_llm == "full" else 1),
                num_layers=len(decoder_layers(llm)) or 1,
                clip=_clip_bytes(built, shapes) if model.has_visual else 0.0,
            )
    finally:
        checkpoint_layers(llm, is_on=wanted)
        model.train(was_training)


def _layer_bytes(llm: CausalLM, length: int) -> int:
    """What autograd keeps of the first decoder layer at so many positions, without what all layers share."""
    layer = (decoder_layers(llm) or [llm])[0]
    embeddings = llm.get_input_embeddings().weight
    inputs = torch.randn(1, length, embeddings.shape[1], dtype=embeddings.dtype, device=embeddings.device)
    kept = _Kept(llm)

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        shared = [value for value in tree_leaves((args[1:], kwargs)) if isinstance(value, Tensor)]
        kept.own.update(value.untyped_storage().data_ptr() for value in shared)  # masks, sines of positions
        kept.is_on = True

    def end(module: nn.Module, args: Any, output: Any) -> None:
        raise _LayerDoneError

    hooks = [layer.register_forward_pre_hook(begin, with_kwargs=True), layer.register_forward_hook(end)]
    try:
        with kept.counting():
            llm(inputs_embeds=inputs.requires_grad_(), use_cache=False)
    except _LayerDoneError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return kept.num_bytes


def _clip_bytes(built: Built, shapes: Mapping[str, TokenShape]) -> int:
    """What autograd keeps of projectors and fusion for a clip."""
    model = built.model
    kept = _Kept(model)
    kept.is_on = True
    with kept.counting():
        pairs = zip(model.encoders, model.projectors, strict=True)
        model.fuse(
            [
                projector(_clip_tokens(projector, shapes[encoder], model.llm.device), None)
                for encoder, projector in pairs
            ]
        )
    return kept.num_bytes


def _clip_tokens(projector: Projector, shape: TokenShape, device: torch.device) -> ClipTokens:
    """Tokens of one clip as a source gives them."""
    tokens_BTHWD = torch.randn(1, *shape.grid, shape.width, device=device)
    if "prefix" not in projector.resampler.reads:
        return tokens_BTHWD
    prefix_BTKD = torch.randn(1, shape.grid[0], shape.num_prefix, shape.width, device=device)
    return PrefixedTokens(tokens_BTHWD=tokens_BTHWD, prefix_BTKD=prefix_BTKD)


class _LayerDoneError(Exception):
    """Ends a forward pass behind its first decoder layer."""


class _Kept:
    """Counts the memory of tensors that are saved for the backward pass and belong to no parameter or buffer."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()]}
        self.is_on = False
        self._saved: dict[int, Tensor] = {}  # by address: held, so that no other gets the same

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.enable_grad(), saved_tensors_hooks(self._pack, lambda value: value):
            yield

    def _pack(self, value: Tensor) -> Tensor:
        address = value.untyped_storage().data_ptr()
        if self.is_on and address not in self.own:
            self._saved.setdefault(address, value)
        return value

    @property
    def num_bytes(self) -> int:
        return sum(value.untyped_storage().nbytes() for value in self._saved.values())


def memory_by_part(
    built: Built,
    shapes: Mapping[str, TokenShape],
    longest_text: int,
    device: Device = ONE_PROCESS,
    activations: Activations | None = None,
) -> dict[str, Any]:
    """Bytes that one process holds on its device at the most, by part, their sum, and the formula of the activations.

    `longest_text` are the tokens of the longest text: every sample of the micro-batch may be as long.
    """
    config, model, llm = built.config, built.model, built.model.llm
    activations = activations or measure(built, shapes)
    limit, visual, checkpointed = Limit.of(config), built.most_visual_tokens, is_checkpointed(llm, config)
    longest = longest_text + visual
    positions = limit.samples * longest if limit.tokens is None else max(limit.tokens, longest)
    clips = 0 if not visual else limit.samples if limit.tokens is None else -(-positions // (visual + 1))
    clips *= config.max_windows or 1
    has_texts_alone = config.train_llm != "none" and limit.tokens is not None
    text = positions if has_texts_alone else positions - positions // longest * visual
    layers = activations.per_position(is_checkpointed=checkpointed)
    # Every sample of the micro-batch may have a clip of its own; projectors read tokens in float32.
    tokens = sum((prod(shape.grid) + shape.grid[0] * shape.num_prefix) * shape.width for shape in shapes.values())
    weights, trained = _num_bytes(model, trained_only=False), _num_bytes(model, trained_only=True)
    divisor = device.num_processes if device.is_sharded else 1
    is_ddp = device.num_processes > 1 and not device.is_sharded
    parts = {
        "parameters": weights // divisor,
        "gradients": trained // divisor * (2 if is_ddp else 1),  # DDP adds them up in buckets of their own
        "moments": NUM_MOMENTS * trained // divisor,
        "copies": _gathered_bytes(built)
        if device.is_sharded
        else int(activations.layer_copies) * activations.num_layers,
        "tokens": clips * tokens * FLOAT_BYTES,
        "activations": int(layers * positions + activations.clip * clips),
        "logits": LOGIT_BYTES * text * llm.config.get_text_config().vocab_size,
    }
    formula = FORMULA.format(
        layers=layers,
        num_layers=activations.num_layers,
        plain=activations.layer / llm.get_input_embeddings().weight.shape[1],
        work=layers - activations.num_layers * (activations.layer_input if checkpointed else activations.layer),
        positions=positions,
        visual=activations.clip,
        clips=clips,
    )
    return {**parts, "total": sum(parts.values()), "activations_formula": formula}


def _num_bytes(module: nn.Module, *, trained_only: bool) -> int:
    parameters = (p for p in module.parameters() if p.requires_grad or not trained_only)
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _gathered_bytes(built: Built) -> int:
    """Whole weights that a process of FSDP holds at once: all that are outside of the layers, and those of two layers.

    They are counted as they are stored; in bf16 trained ones take half of it.
    """
    layers = decoder_layers(built.model.llm)
    of_layer = max((_num_bytes(layer, trained_only=False) for layer in layers), default=0)
    rest = _num_bytes(built.model, trained_only=False) - sum(_num_bytes(layer, trained_only=False) for layer in layers)
    return rest + 2 * of_layer


def fit(
    built: Built, shapes: Mapping[str, TokenShape], longest_text: int, device: Device, *, is_first_rank: bool = True
) -> Built:
    """The model with settings that fit the device: activation checkpointing, then smaller micro-batches.

    Only what the config leaves open is chosen: checkpointing where it says neither on nor off, micro-batches where the
    loss does not depend on them. What is chosen is logged. Raises UserError where nothing fits.
    """
    if device.memory is None:
        return built
    activations = measure(built, shapes)
    config, longest = built.config, longest_text + built.most_visual_tokens
    best = memory = memory_by_part(built, shapes, longest_text, device, activations)
    for candidate in _candidates(config, longest, has_layers=bool(decoder_layers(built.model.llm))):
        tried = replace(built, config=candidate)
        memory = memory_by_part(tried, shapes, longest_text, device, activations)
        if memory["total"] <= device.usable:
            if candidate != config and is_first_rank:
                logger.info(
                    f"about {format_bytes(best['total'])} as configured is more than the {format_bytes(device.usable)}"
                    f" that are usable of {format_bytes(device.memory)}: {_changes(config, candidate)}, about"
                    f" {format_bytes(memory['total'])}"
                )
            checkpoint_layers(tried.model.llm, is_on=is_checkpointed(tried.model.llm, candidate))
            return tried
    raise UserError(_too_large(config, memory, device))


def _candidates(config: TrainConfig, longest: int, *, has_layers: bool) -> Iterator[TrainConfig]:
    """The config, then those that take less memory."""
    yield config
    if config.activation_checkpointing is None and has_layers:
        config = replace(config, activation_checkpointing=True)
        yield config
    limit = Limit.of(config).halved(longest) if config.loss == "per_token" else None
    while limit is not None:
        yield limit.over(config)
        limit = limit.halved(longest)


def _changes(before: TrainConfig, after: TrainConfig) -> str:
    chosen = []
    if before.activation_checkpointing != after.activation_checkpointing:
        chosen.append("activation_checkpointing is on")
    if Limit.of(before) != Limit.of(after):
        chosen.append(f"{Limit.of(after)} instead of {Limit.of(before)}")
    return " and ".join(chosen)


def _too_large(config: TrainConfig, memory: Mapping[str, Any], device: Device) -> str:
    parts = ", ".join(f"{name} {format_bytes(memory[name])}" for name in memory if isinstance(memory[name], int))
    held = memory["total"] - memory["activations"] - memory["logits"] - memory["tokens"]
    advice = []
    if config.activation_checkpointing is False:
        advice.append("activation_checkpointing: true")
    if config.loss == "micro_batch_means":
        advice.append("a smaller micro_batch_size (this loss depends on it, so it is not changed for you)")
    if held > device.usable / 2 and not device.is_sharded:
        advice.append("--launch fsdp, which divides weights, gradients and moments by the GPUs")
    if held > device.usable / 2 and config.train_llm == "full":
        advice.append("--train-llm lora or none")
    advice += ["a smaller max_text_tokens", "fewer visual tokens (fusion, projector.grid)"]
    kind = (
        "FSDP" if device.is_sharded else "DDP, which holds the whole model in each," if device.num_processes > 1 else ""
    )
    where = f"under {kind} with {device.num_processes} processes " if kind else ""
    return (
        f"training {where}takes about {format_bytes(memory['total'])} a process at the least ({parts}), and"
        f" {format_bytes(device.usable)} are usable of {format_bytes(device.memory or 0)}: choose {'; '.join(advice)};"
        " a larger --device-memory trains all the same"
    )

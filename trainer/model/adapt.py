"""Adapt: what is done to an LLM between loading and training.

Comes in: the LLM as it was loaded. Goes out: the same module, changed in place: which of its weights want a gradient,
LoRA adapters in its linear layers, layers that forget their activations. The adapters are put into the LLM instead of
around it: it stays a causal LM with its own `generate` and its own parameter names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mervcache.errors import UserError, unknown_name
from trainer.config import LoraConfig, TrainConfig


def adapt(llm: nn.Module, config: TrainConfig) -> None:
    """Make the LLM what the config says; fresh adapters follow torch's seed."""
    llm.requires_grad_(config.train_llm == "full")
    if config.train_llm == "lora":
        add_adapters(llm, config.lora)
    if config.activation_checkpointing:
        checkpoint_layers(llm)


def add_adapters(llm: nn.Module, config: LoraConfig) -> None:
    """Adapters in fp32 beside linear layers whose own weights keep their type and stay as they are."""
    from peft import LoraConfig as PeftLoraConfig  # seconds, and most runs have no adapters
    from peft import inject_adapter_in_model

    check_targets(llm, config.targets)
    settings = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets) or "all-linear",  # its words for all but the output layer
    )
    inject_adapter_in_model(settings, llm)
    for name, parameter in llm.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_" in name


def check_targets(llm: nn.Module, targets: Sequence[str]) -> None:
    """Every target must be the name, or the end of the name, of a layer that can be adapted."""
    linear = [name for name, module in llm.named_modules() if _is_linear(module)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            short = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(unknown_name("linear layer in lora.targets", target, short))


def checkpoint_layers(llm: nn.Module) -> None:
    """Let every decoder layer keep only its input and compute the rest again in the backward pass.

    transformers' own switch does nothing in evaluation mode, and that is where a frozen LLM is. Here the layer's
    `forward` is replaced: hooks around the layer (FSDP gathers weights in one) run once, and no input needs a gradient.
    """
    layers = decoder_layers(llm)
    if not layers:
        raise UserError(f"activation_checkpointing: {type(llm).__name__} names no layers for it; turn it off")
    for layer in layers:
        layer.forward = _forgetful(layer.forward)


def decoder_layers(llm: nn.Module) -> list[nn.Module]:
    """The layers that an LLM of transformers is a stack of."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in llm.modules() if isinstance(module, GradientCheckpointingLayer)]


def _forgetful(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's transposed one

"""AdamW with one learning rate per part of the model, and the rate of every step."""

from __future__ import annotations

from collections import defaultdict
from importlib.util import find_spec
from math import cos, pi
from typing import Any

import torch
from torch.nn import Parameter

from mervcache.errors import UserError
from trainer.config import OptimizerConfig
from trainer.model.llm import is_adapter
from trainer.model.video_llm import VideoLLM

LR_SETTINGS = {  # module of VideoLLM -> the setting of its learning rate
    "projectors": "projector_lr",
    "fusion": "fusion_lr",
    "llm": "llm_lr",
    "trained_encoders": "encoder_lr",
}
ADAPTER_LR = "lora_lr"  # of the adapters inside the LLM


def build_optimizer(
    model: VideoLLM, config: OptimizerConfig, *, fused: bool = False, is_sharded: bool = False
) -> torch.optim.Optimizer:
    """AdamW with a group per part and decay; tensors with fewer than two axes never decay.

    `fused`: one kernel, which skips an update where `found_inf` is set on the device. `is_sharded`: under FSDP.
    `set_rates` sets the learning rates before each step. Raises UserError where nothing is trained, or 8-bit moments
    cannot be had.
    """
    members: dict[tuple[str, bool], list[Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.partition(".")[0]
            setting = ADAPTER_LR if part == "llm" and is_adapter(name) else LR_SETTINGS[part]
            members[setting, parameter.ndim > 1 and not name.endswith(".bias")].append(parameter)
    groups = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "rate": setting,
            "peak": getattr(config, setting),
            "lr": 0.0,
        }
        for (setting, decays), parameters in members.items()
    ]
    if not groups:
        raise UserError("nothing is trained: the fusion and the projectors have no parameters and the LLM is frozen")
    if config.name == "adamw8bit":
        return _adamw8bit(groups, config, is_sharded)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=fused or None)


def _adamw8bit(groups: list[dict[str, Any]], config: OptimizerConfig, is_sharded: bool) -> torch.optim.Optimizer:
    """AdamW whose moments of larger tensors are kept in 8 bits (arXiv 2110.02861): 2 bytes a parameter, not 8."""
    if is_sharded:
        raise UserError(
            "optimizer.name adamw8bit quantises whole tensors, and FSDP shards them: use --launch ddp, or adamw"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "optimizer.name adamw8bit needs bitsandbytes: pip install 'merv-pipeline[quant]', or set it to adamw"
        )
    from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]: wants a GPU, not in the test extra

    return AdamW8bit(groups, betas=config.betas, eps=config.eps)


def set_rates(optimizer: torch.optim.Optimizer, step: int, num_steps: int, config: OptimizerConfig) -> None:
    """Set every group's learning rate for step 0, 1, ..."""
    factor = rate_factor(step, num_steps, int(config.warmup_ratio * num_steps))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def current_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Setting -> current learning rate, of what is trained."""
    return {group["rate"]: group["lr"] for group in optimizer.param_groups}


def rate_factor(step: int, num_steps: int, num_warmup: int) -> float:
    """Share of the peak rate: linear up over `num_warmup` steps, then half a cosine to zero.

    As `get_cosine_schedule_with_warmup` of transformers, but warming up from the first step, which has rate 0 there.
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + cos(pi * (step - num_warmup) / max(1, num_steps - num_warmup)))

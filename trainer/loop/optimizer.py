"""Optimizer: AdamW with a group per part and decay, and the learning rate as a function of the step."""

from __future__ import annotations

from collections import defaultdict
from math import cos, pi

import torch
from torch.nn import Parameter

from mervcache.errors import UserError
from trainer.config import OptimizerConfig
from trainer.model.adapt import is_adapter
from trainer.model.video_llm import VideoLLM

PARTS = {  # module of VideoLLM -> its setting
    "projectors": "projector_lr",
    "fusion": "fusion_lr",
    "llm": "llm_lr",
    "trained_encoders": "encoder_lr",
}
ADAPTERS = "lora_lr"  # of the adapters inside the LLM


def build_optimizer(model: VideoLLM, config: OptimizerConfig) -> torch.optim.AdamW:
    """Groups by part; tensors with fewer than two axes never decay. Rates are set by `set_rates` before each step."""
    members: dict[tuple[str, bool], list[Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[rate_setting(name), parameter.ndim > 1 and not name.endswith(".bias")].append(parameter)
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
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)


def rate_setting(name: str) -> str:
    """The setting that holds the learning rate of the parameter of that name."""
    part = name.partition(".")[0]
    return ADAPTERS if part == "llm" and is_adapter(name) else PARTS[part]


def set_rates(optimizer: torch.optim.Optimizer, step: int, num_steps: int, config: OptimizerConfig) -> None:
    """Every group's rate for step 0, 1, ..."""
    factor = rate_factor(step, num_steps, int(config.warmup_ratio * num_steps))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def current_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Setting -> the rate now, of what is trained."""
    return {group["rate"]: group["lr"] for group in optimizer.param_groups}


def rate_factor(step: int, num_steps: int, num_warmup: int) -> float:
    """Share of the peak rate: linear up over `num_warmup` steps, then half a cosine to zero.

    As `get_cosine_schedule_with_warmup` of transformers, but warming up from the first step, which has rate 0 there.
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + cos(pi * (step - num_warmup) / max(1, num_steps - num_warmup)))

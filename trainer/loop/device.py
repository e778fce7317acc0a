"""What a device can do and how much of it a run uses: peak FLOP/s of known GPUs, model FLOPs of a step, peak memory.

Model FLOPs utilisation (MFU) as arXiv 2204.02311, appendix B: the FLOPs that the model's forward and backward pass take
by their shapes, per second, as a share of the device's peak in bf16, whatever the run's precision. What activation
checkpointing computes again and what padding costs is not counted, so both lower it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from trainer.model.video_llm import VideoLLM

# Part of the name that CUDA reports -> dense FLOP/s with bf16 products and fp32 sums, from NVIDIA's data sheets; the
# first that fits counts. Sheets that state sparse figures only are halved.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True)
class Device:
    """The device of one rank; of a CPU there is neither a peak nor a memory of its own."""

    device: torch.device | None
    num_ranks: int = 1

    def figures(self, flops_per_s: float) -> dict[str, float | int]:
        """`mfu` for so many FLOP/s of all ranks, where the peak is known, and `peak_memory` of this rank in bytes."""
        if self.device is None or self.device.type != "cuda":
            return {}
        found: dict[str, float | int] = {"peak_memory": torch.cuda.max_memory_allocated(self.device)}
        peak = peak_flops(torch.cuda.get_device_name(self.device))
        if peak is not None:
            found["mfu"] = flops_per_s / (peak * self.num_ranks)
        return found


def peak_flops(name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by the name that CUDA reports; None for one that is not listed."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part.lower() in name.lower()), None)


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of forward and backward, of the matrix products of linear layers."""

    per_token: float = 0.0  # of the LLM's layers, for each position
    per_answer: float = 0.0  # of its output layer, for each supervised token

    @classmethod
    def of(cls, model: VideoLLM) -> TrainingFlops:
        """By the sizes of the LLM's layers: 2 per weight forward, 2 for the gradient of what goes in, and 2 for that of
        the weight where it is trained.

        Not counted: attention's scores, which grow with the length, projectors, fusion and everything element by
        element. So the figure is a lower bound.
        """
        head = model.llm.get_output_embeddings()
        layers = (module for module in model.llm.modules() if module is not head)
        return cls(sum(map(_linear_flops, layers)), _linear_flops(head))

    def of_steps(self, tokens: int, answers: int) -> float:
        """FLOPs of steps with so many positions and supervised tokens."""
        return tokens * self.per_token + answers * self.per_answer


def _linear_flops(module: nn.Module) -> float:
    """FLOPs of a linear layer for a position; 0 of any other module."""
    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":  # GPT-2's transposed one
        return 0.0
    weight = cast("Tensor", module.weight)
    # quantised weights have other shapes than the layer
    count = module.in_features * module.out_features if isinstance(module, nn.Linear) else weight.numel()
    return count * (6.0 if weight.requires_grad else 4.0)

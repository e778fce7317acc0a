"""Steps whose loss or gradient is not finite: they change nothing, are counted, and too many in a row end the run.

The last step that a run allows is traced: hooks on every module find the first value that is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trainer.runs.checkpoint import nonfinite_names


class SkippedSteps:
    """Counts skipped steps; `limit` in a row are too many."""

    def __init__(self, limit: int, total: int = 0) -> None:
        self.limit, self.total, self.in_a_row = limit, total, 0

    def count(self, is_skipped: bool) -> None:
        """Count one step."""
        self.total += is_skipped
        self.in_a_row = self.in_a_row + 1 if is_skipped else 0

    @property
    def is_traced(self) -> bool:
        """Whether the run ends if the next step is skipped too."""
        return self.in_a_row >= self.limit - 1


class Trace:
    """Within the block, the first output and the first gradient of a module that are not finite."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks: list[Any] = []
        self.activation = self.gradient = self.parameter = ""

    def __enter__(self) -> Trace:
        for name, module in self._model.named_modules():
            self._hooks.append(module.register_forward_hook(partial(self._check_output, name or "the loss")))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def look_at_parameters(self) -> None:
        """Before gradients are cleared: the first parameter whose gradient is not finite."""
        gradients = {name: p.grad for name, p in self._model.named_parameters() if p.grad is not None}
        self.parameter = next(iter(nonfinite_names(gradients)), "")

    @torch.no_grad()
    def _check_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for value in tree_leaves(output):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if not self.activation and not value.detach().isfinite().all():
                self.activation = name
            if value.requires_grad:
                self._hooks.append(value.register_hook(partial(self._check_gradient, name)))

    def _check_gradient(self, name: str, gradient: Tensor) -> None:
        if not self.gradient and not gradient.detach().isfinite().all():
            self.gradient = name

    def place(self) -> str:
        """Where numbers stopped being finite, on whichever rank; every rank calls it and gets the same."""
        found: Sequence[tuple[str, str, str]] = gather_object([(self.activation, self.gradient, self.parameter)])
        texts = ("the output of {}", "the gradient of the output of {}", "the gradient of the parameter {}")
        for kind, text in enumerate(texts):
            for rank, names in enumerate(found):
                if names[kind]:
                    return text.format(names[kind]) + (f" on rank {rank}" if len(found) > 1 else "")
        return "the norm of all gradients, each of which is finite"

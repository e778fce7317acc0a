"""Standardise: tokens to mean 0 and deviation 1, with constants measured once on the training tokens.

Encoders differ in scale by orders of magnitude (a last layer after its norm beside un-normed inner layers), and a
channel's constant part can be far larger than what differs between clips. Large runs learn their way round this;
a run of some hundred steps does not, so small recipes turn it on. It is off by default, as in arXiv 2501.01426.

- ``channel``: one mean and deviation per channel, over all clips and positions.
- ``position``: one mean per channel and grid position, over clips, and one deviation per channel: it also takes away
  what an encoder says about every clip alike, above all its position embedding.

The constants are buffers: a checkpoint carries them, nothing is measured again when it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-6  # deviation of a channel that never changes


class Standardise(nn.Module):
    """(tokens - mean) / deviation; the identity until `fit`."""

    def __init__(self, grid: tuple[int, int, int], width: int, per_position: bool) -> None:
        super().__init__()
        self.per_position = per_position
        mean_shape = (*grid, width) if per_position else (1, 1, 1, width)
        self.register_buffer("mean_THWD", torch.zeros(mean_shape))
        self.register_buffer("std_D", torch.ones(width))

    def forward(self, tokens_BTHWD: Tensor) -> Tensor:
        return (tokens_BTHWD - self.mean_THWD) / self.std_D

    def fit(self, moments: Moments) -> None:
        """Take the constants from what was measured."""
        mean_THWD, square_THWD = moments.total_THWD / moments.count, moments.square_THWD / moments.count
        if not self.per_position:
            mean_THWD = mean_THWD.mean((0, 1, 2), keepdim=True)
        variance_D = (square_THWD - mean_THWD.square()).mean((0, 1, 2)).clamp_min(0)
        self.mean_THWD.copy_(mean_THWD)
        self.std_D.copy_(variance_D.sqrt().clamp_min(EPS))


class Moments:
    """Sums over clips of tokens and their squares, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total_THWD = self.square_THWD = torch.zeros((), dtype=torch.float64)

    def add(self, tokens_BTHWD: Tensor) -> None:
        exact_BTHWD = tokens_BTHWD.double()
        self.count += len(exact_BTHWD)
        self.total_THWD = self.total_THWD + exact_BTHWD.sum(0)
        self.square_THWD = self.square_THWD + exact_BTHWD.square().sum(0)

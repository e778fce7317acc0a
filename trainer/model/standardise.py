"""Standardise: every channel to mean 0 and deviation 1, with constants measured once on the training tokens.

Encoders differ in scale by orders of magnitude (a last layer after its norm beside un-normed inner layers), and a
channel's constant part can be far larger than what differs between clips. Large runs learn their way round this; a run
of some hundred steps does not, so small recipes turn it on. It is off by default, as in arXiv 2501.01426. The constants
are buffers: a checkpoint carries them, and nothing is measured again when it is used. They stand in front of the first
trained layer: what is behind it changes while it learns, and constants measured there would be wrong after a step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-6  # deviation of a channel that never changes


class Standardise(nn.Module):
    """(tokens - mean) / deviation by channel; the identity until `fit`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("std_D", torch.ones(width))

    def forward(self, tokens_BTHWD: Tensor) -> Tensor:
        return (tokens_BTHWD - self.mean_D) / self.std_D

    def fit(self, moments: Moments) -> None:
        """Take the constants from what was measured."""
        mean_D = moments.total_D / moments.count
        variance_D = (moments.square_D / moments.count - mean_D.square()).clamp_min(0)
        self.mean_D.copy_(mean_D)
        self.std_D.copy_(variance_D.sqrt().clamp_min(EPS))


class Moments:
    """Sums of tokens and of their squares over clips and positions, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total_D = self.square_D = torch.zeros((), dtype=torch.float64)

    def add(self, tokens_BTHWD: Tensor) -> None:
        for tokens_PD in tokens_BTHWD.flatten(1, 3):  # a clip at a time: a raw grid is 32 MiB in float64
            exact_PD = tokens_PD.double()
            self.count += len(exact_PD)
            self.total_D = self.total_D + exact_PD.sum(0)
            self.square_D = self.square_D + exact_PD.square().sum(0)

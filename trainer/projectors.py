"""Projectors: one encoder's stored tokens -> visual tokens of the LLM's width.

Comes in: tokens_BTHWD as the store holds them (any float dtype). Goes out: embeddings_BNM, N = T x H x W of the
target grid, in time, row, column order. A resampler without parameters, then an optional standardisation and layer
norm, then a trained head (arXiv 2501.01426, section 3; heads as in princetonvisualai/merv). The average commutes with
the linear head, so what the store has pooled already is not pooled again: with equal grids the resampler is the
identity.

B batch, T time, H W height width, D encoder width, N visual tokens, M LLM width.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torch import Tensor, nn
from torch.nn import functional as F

from featurestore.errors import UserError
from trainer.config import HeadName, ProjectorConfig, ResamplerName
from trainer.standardise import Standardise
from trainer.tokens import TokenShape

Grid = tuple[int, int, int]


class Projector(nn.Module):
    """Resampler, standardisation, layer norm, head."""

    def __init__(self, config: ProjectorConfig, stored: TokenShape, llm_width: int) -> None:
        super().__init__()
        width = stored.width
        self.grid = config.grid or stored.grid
        self.resampler = RESAMPLERS[config.resampler](stored, self.grid)
        self.standardise = Standardise(width) if config.standardise else None
        self.norm = nn.LayerNorm(width) if config.pre_layer_norm else None
        self.head = HEADS[config.head](width, llm_width)

    @property
    def num_tokens(self) -> int:
        """N."""
        return prod(self.grid)

    def resample(self, tokens_BTHWD: Tensor) -> Tensor:
        """Tokens on the target grid in float32, before anything that is trained or measured."""
        return self.resampler(tokens_BTHWD.float())

    def forward(self, tokens_BTHWD: Tensor) -> Tensor:
        tokens_BTHWD = self.resample(tokens_BTHWD)
        if self.standardise is not None:
            tokens_BTHWD = self.standardise(tokens_BTHWD)
        if self.norm is not None:
            tokens_BTHWD = self.norm(tokens_BTHWD)
        return self.head(tokens_BTHWD.flatten(1, 3))  # B (T H W) D -> B N M


class AverageResampler(nn.Module):
    """Adaptive average pooling over T, H and W; the identity when both grids are equal.

    The 2D average of the paper is the case of equal T. Grids that were pooled before must nest (each target divides the
    stored one): averages of overlapping windows, 14 -> 8, pooled again to 4, are not the average of the 14-grid.
    """

    def __init__(self, stored: TokenShape, grid: Grid) -> None:
        super().__init__()
        stored_grid = stored.grid
        self.stored_grid, self.grid = stored_grid, grid
        words, stored_words = ("x".join(map(str, value)) for value in (grid, stored_grid))
        if any(target > stored for target, stored in zip(grid, stored_grid, strict=True)):
            raise UserError(f"projector grid {words} is finer than the stored grid {stored_words}; extract a finer one")
        if stored.is_pooled and any(stored % target for target, stored in zip(grid, stored_grid, strict=True)):
            raise UserError(
                f"projector grid {words} does not nest in the stored grid {stored_words}, which is pooled already:"
                " choose divisors of the stored grid, or extract the raw grid (pooling none)"
            )

    def forward(self, tokens_BTHWD: Tensor) -> Tensor:
        if self.grid == self.stored_grid:
            return tokens_BTHWD
        return F.adaptive_avg_pool3d(tokens_BTHWD.movedim(-1, 1), self.grid).movedim(1, -1)


def linear(width: int, llm_width: int) -> nn.Module:
    """The paper's head: d x sum of d_e weights over all encoders."""
    return nn.Linear(width, llm_width)


def gelu_mlp(width: int, llm_width: int) -> nn.Module:
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))


def fused_gelu_mlp(width: int, llm_width: int) -> nn.Module:
    """As `gelu_mlp` behind a hidden layer of 4 x the encoder's width."""
    hidden = 4 * width
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.GELU(),
        nn.Linear(hidden, llm_width),
        nn.GELU(),
        nn.Linear(llm_width, llm_width),
    )


RESAMPLERS: dict[ResamplerName, Callable[[TokenShape, Grid], nn.Module]] = {"average": AverageResampler}
HEADS: dict[HeadName, Callable[[int, int], nn.Module]] = {
    "linear": linear,
    "gelu-mlp": gelu_mlp,
    "fused-gelu-mlp": fused_gelu_mlp,
}

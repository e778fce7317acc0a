"""Projectors: one encoder's stored tokens -> visual tokens of the LLM's width.

Comes in: what a source gives for the encoder, in any float dtype. Goes out: embeddings_BNM, N = T x H x W of the
resampler's grid, in time, row, column order. A resampler, an optional layer norm, then a trained head (arXiv
2501.01426, section 3; heads as in princetonvisualai/merv). A standardisation stands in front of the first trained
layer: behind a resampler without parameters, before one that is trained.

B batch, T time, H W height width, D encoder width, N visual tokens, M LLM width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from torch import Tensor, nn

from mervcache.errors import UserError
from trainer.config import HeadName, ProjectorConfig
from trainer.data.tokens import ClipTokens, PrefixedTokens, TokenShape
from trainer.model.resamplers import RESAMPLERS, Grid
from trainer.model.standardise import Standardise


class Projector(nn.Module):
    """Resampler, standardisation, layer norm, head."""

    def __init__(self, config: ProjectorConfig, stored: TokenShape, llm_width: int) -> None:
        super().__init__()
        self.resampler = RESAMPLERS[config.resampler](config, stored, llm_width)
        self.standardise = Standardise(stored.width) if config.standardise else None
        width = self.resampler.width
        self.norm = nn.LayerNorm(width) if config.pre_layer_norm else None
        self.head = HEADS[config.head](width, llm_width)
        self.resampler.start_head(self.head)

    @property
    def grid(self) -> Grid:
        """T, H, W of the visual tokens."""
        return self.resampler.grid

    @property
    def num_tokens(self) -> int:
        """Visual tokens of a clip: N."""
        return prod(self.grid)

    def resample(self, tokens: ClipTokens) -> Tensor:
        """Tokens in float32 as the first trained layer finds them: on the target grid, or as stored where the
        resampler itself is trained. What a standardisation is measured on."""
        if isinstance(tokens, PrefixedTokens) and "prefix" not in self.resampler.reads:
            tokens = tokens.tokens_BTHWD  # a source may give more than is needed
        return tokens.float() if self.resampler.is_trained else self.resampler(tokens)

    def forward(self, tokens: ClipTokens) -> Tensor:
        tokens_BTHWD = self.resample(tokens)
        if self.standardise is not None:
            tokens_BTHWD = self.standardise(tokens_BTHWD)
        if self.resampler.is_trained:
            tokens_BTHWD = self.resampler(tokens_BTHWD)
        if self.norm is not None:
            tokens_BTHWD = self.norm(tokens_BTHWD)
        return self.head(tokens_BTHWD.flatten(1, 3))  # B (T H W) D -> B N M


def build_projectors(config: ProjectorConfig, shapes: Mapping[str, TokenShape], llm_width: int) -> dict[str, Projector]:
    """A projector for every encoder, all with one grid; an error names its encoder."""
    projectors = {}
    for encoder, shape in shapes.items():
        try:
            projectors[encoder] = Projector(config, shape, llm_width)
        except UserError as error:
            raise UserError(f"{encoder}: {error}") from error
    if len({projector.num_tokens for projector in projectors.values()}) > 1:
        grids = ", ".join(f"{encoder} {'x'.join(map(str, p.grid))}" for encoder, p in projectors.items())
        remedy = "projector.grid to one they share" if config.takes_grid else "encoders to those that share one"
        raise UserError(f"encoders must share one grid to be fused, got {grids}; set {remedy}")
    return projectors


def linear(width: int, llm_width: int) -> nn.Module:
    """The paper's head: d x sum of d_e weights over all encoders."""
    return nn.Linear(width, llm_width)


def gelu_mlp(width: int, llm_width: int) -> nn.Module:
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))


def fused_gelu_mlp(width: int, llm_width: int) -> nn.Module:
    """As `gelu_mlp` behind a hidden layer of 4 x the incoming width."""
    hidden = 4 * width
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.GELU(),
        nn.Linear(hidden, llm_width),
        nn.GELU(),
        nn.Linear(llm_width, llm_width),
    )


HEADS: dict[HeadName, Callable[[int, int], nn.Module]] = {
    "linear": linear,
    "gelu-mlp": gelu_mlp,
    "fused-gelu-mlp": fused_gelu_mlp,
}

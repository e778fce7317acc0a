"""Fusions: the visual tokens of several encoders -> one sequence, and the weight that each encoder got.

Definitions from arXiv 2501.01426, section 3.3 and its ablation tables; `cross_attention_released` as
princetonvisualai/merv computes it. No fusion holds a parameter that cannot change its output. `trainer.config.FUSIONS`
lists them by name.

B batch, E encoders, N visual tokens, M LLM width, Q query width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mervcache.errors import UserError
from trainer.config import FUSIONS, FusionConfig, import_choice

Fused = tuple[Tensor, Tensor | None]
MASKED = float("-inf")  # score of a masked encoder before the softmax


class Fusion(nn.Module):
    """Base class of fusions: one embeddings_BNM per encoder, in the order of the encoders -> fused_BNM and weights_BE.

    Weights are None where the formula has none; `concat_sequence` gives E x N tokens, all others N. `shown_BE` is True
    for the encoders that a sample shows, at least one each: a masked one has no influence, and gets no gradient.

    Parameters
    ----------
    num_encoders
        E.
    width
        M, that of the embeddings and of the fused tokens.
    config
        The section `fusion` of the settings.
    """

    leaves_out_masked = False  # whether masked encoders' tokens are dropped from the sequence by the caller

    is_ordered = False  # parameters belong to encoders by their place

    def __init__(self, num_encoders: int, width: int, config: FusionConfig) -> None:
        super().__init__()
        self.num_encoders, self.width = num_encoders, width

    def num_tokens(self, num_tokens: int) -> int:
        """Visual tokens that come out when each encoder brings `num_tokens`."""
        return num_tokens

    def forward(self, embeddings: Sequence[Tensor], shown_BE: Tensor | None = None) -> Fused:
        raise NotImplementedError

    def contributions(self, embeddings: Sequence[Tensor]) -> Iterator[Tensor]:
        """Each encoder's part of what becomes of its `embeddings`: their sum, and a bias if any, is the result.

        They come one after the other. Of `concat_sequence` they are the encoders' own tokens, which follow each other.
        """
        _, weights_BE = self(embeddings)
        for index in range(weights_BE.shape[1]):
            yield weights_BE[:, index, None, None].to(embeddings[index].dtype) * embeddings[index]


class CrossAttention(Fusion):
    """a = softmax(Q xbar^T / sqrt(M)), O = sum_e a_e X_e; xbar_e is the mean over encoder e's tokens.

    One learned query Q of the LLM's width, so one weight per encoder and sample, the same for all tokens.
    """

    def __init__(self, num_encoders: int, width: int, config: FusionConfig) -> None:
        super().__init__(num_encoders, width, config)
        self.query_M = nn.Parameter(_xavier_row(width))

    def forward(self, embeddings: Sequence[Tensor], shown_BE: Tensor | None = None) -> Fused:
        mean_BEM = torch.stack([embeddings_BNM.mean(1) for embeddings_BNM in embeddings], dim=1)
        return _mix(embeddings, _weights(mean_BEM @ self.query_M / sqrt(self.width), shown_BE))


class CrossAttentionReleased(Fusion):
    """a = softmax((W_q Q + b_q) . (W_k xbar_e) / sqrt(Q width)), O = sum_e a_e X_e.

    The released code takes the weights of a `torch.nn.MultiheadAttention` with one head and throws its output away.
    What cannot change the weights is left out here: the value and output projections, and the bias of the keys,
    which adds the same to every encoder's score and cancels in the softmax.
    """

    def __init__(self, num_encoders: int, width: int, config: FusionConfig) -> None:
        super().__init__(num_encoders, width, config)
        query_width = config.query_width
        self.query_Q = nn.Parameter(_xavier_row(query_width))
        self.query_projection = nn.Linear(query_width, query_width)
        self.key_projection = nn.Linear(width, query_width, bias=False)
        nn.init.xavier_uniform_(self.query_projection.weight)
        nn.init.zeros_(self.query_projection.bias)
        nn.init.xavier_uniform_(self.key_projection.weight)

    def forward(self, embeddings: Sequence[Tensor], shown_BE: Tensor | None = None) -> Fused:
        mean_BEM = torch.stack([embeddings_BNM.mean(1) for embeddings_BNM in embeddings], dim=1)
        keys_BEQ = self.key_projection(mean_BEM)
        query_Q = self.query_projection(self.query_Q)
        return _mix(embeddings, _weights(keys_BEQ @ query_Q / sqrt(len(query_Q)), shown_BE))


class ConcatSequence(Fusion):
    """All encoders' tokens, one encoder after the other: E times the visual length.

    Those of masked encoders are left out by the caller, which knows the lengths of the sequences.
    """

    leaves_out_masked = True

    def num_tokens(self, num_tokens: int) -> int:
        return self.num_encoders * num_tokens

    def forward(self, embeddings: Sequence[Tensor], shown_BE: Tensor | None = None) -> Fused:
        return torch.cat(list(embeddings), dim=1), None

    def contributions(self, embeddings: Sequence[Tensor]) -> Iterator[Tensor]:
        yield from embeddings


class ConcatChannel(Fusion):
    """Concatenated channels, then Linear(E x M -> M)."""

    is_ordered, has_norm = True, False

    def __init__(self, num_encoders: int, width: int, config: FusionConfig) -> None:
        super().__init__(num_encoders, width, config)
        # Before `linear`: the norm of all gradients is summed in the order of the parameters.
        self.norm = nn.LayerNorm(num_encoders * width) if self.has_norm else None
        self.linear = nn.Linear(num_encoders * width, width)

    def forward(self, embeddings: Sequence[Tensor], shown_BE: Tensor | None = None) -> Fused:
        if shown_BE is not None:
            embeddings = [
                torch.where(shown_BE[:, index, None, None], embeddings_BNM, 0.0)
                for index, embeddings_BNM in enumerate(embeddings)
            ]
        joined_BNC = torch.cat(list(embeddings), dim=-1)
        if self.norm is not None:
            joined_BNC = self.norm(joined_BNC) if shown_BE is None else _norm_of_shown(self.norm, joined_BNC, shown_BE)
        return self.linear(joined_BNC), None

    def contributions(self, embeddings: Sequence[Tensor]) -> Iterator[Tensor]:
        """The norm is over the channels of all encoders, and each channel behind it belongs to one."""
        joined_BNC = torch.cat(list(embeddings), dim=-1)
        if self.norm is not None:
            joined_BNC = self.norm(joined_BNC)
        for part_BNM, weight_MM in zip(
            joined_BNC.split(self.width, dim=-1), self.linear.weight.split(self.width, dim=1), strict=True
        ):
            yield F.linear(part_BNM, weight_MM)


class ConcatChannelNorm(ConcatChannel):
    """As `ConcatChannel`, with a layer norm over all E x M channels before the linear layer."""

    has_norm = True


class LearnableWeights(Fusion):
    """O = sum_e softmax(s)_e X_e; s ~ N(0, 1) at the start, the same for every sample."""

    is_ordered = True

    def __init__(self, num_encoders: int, width: int, config: FusionConfig) -> None:
        super().__init__(num_encoders, width, config)
        self.scores_E = nn.Parameter(torch.randn(num_encoders))

    def forward(self, embeddings: Sequence[Tensor], shown_BE: Tensor | None = None) -> Fused:
        if shown_BE is not None:
            return _mix(embeddings, _weights(self.scores_E.expand(len(shown_BE), -1), shown_BE))
        weights_E = self.scores_E.float().softmax(-1)
        return _mix(embeddings, weights_E.expand(len(embeddings[0]), -1))


class MeanFusion(Fusion):
    """O = mean of X_e: the paper's "25%-Mixed" of four encoders."""

    def forward(self, embeddings: Sequence[Tensor], shown_BE: Tensor | None = None) -> Fused:
        first_BNM = embeddings[0]
        if shown_BE is not None:
            return _mix(embeddings, shown_BE.float() / shown_BE.sum(1, keepdim=True))
        return _mix(embeddings, first_BNM.new_full((len(first_BNM), self.num_encoders), 1 / self.num_encoders))


class SingleEncoder(Fusion):
    """The first encoder alone; the others are not read."""

    def forward(self, embeddings: Sequence[Tensor], shown_BE: Tensor | None = None) -> Fused:
        return embeddings[0], embeddings[0].new_ones(len(embeddings[0]), 1)


def _mix(embeddings: Sequence[Tensor], weights_BE: Tensor) -> Fused:
    """sum_e a_e X_e, one encoder at a time: stacking them would hold E x N x M once more."""
    scale_BE = weights_BE.to(embeddings[0].dtype)
    fused_BNM = scale_BE[:, 0, None, None] * embeddings[0]
    for index, embeddings_BNM in enumerate(embeddings[1:], start=1):
        fused_BNM = fused_BNM + scale_BE[:, index, None, None] * embeddings_BNM
    return fused_BNM, weights_BE


def _weights(scores_BE: Tensor, shown_BE: Tensor | None) -> Tensor:
    """Softmax over the shown encoders, in float32."""
    scores_BE = scores_BE.float()
    return (scores_BE if shown_BE is None else scores_BE.masked_fill(~shown_BE, MASKED)).softmax(-1)


def _norm_of_shown(norm: nn.LayerNorm, joined_BNC: Tensor, shown_BE: Tensor) -> Tensor:
    """Layer norm over the channels of the shown encoders; those of masked ones, which are zero, stay zero."""
    width = joined_BNC.shape[-1] // shown_BE.shape[1]
    shown_B1C = shown_BE.repeat_interleave(width, dim=1)[:, None]
    count_B11 = shown_B1C.sum(-1, keepdim=True)
    exact_BNC = joined_BNC.float()
    mean_BN1 = exact_BNC.sum(-1, keepdim=True) / count_B11
    centred_BNC = torch.where(shown_B1C, exact_BNC - mean_BN1, 0.0)
    variance_BN1 = centred_BNC.square().sum(-1, keepdim=True) / count_B11
    normed_BNC = centred_BNC * torch.rsqrt(variance_BN1 + norm.eps) * norm.weight + norm.bias
    return torch.where(shown_B1C, normed_BNC, 0.0).to(joined_BNC.dtype)


def _xavier_row(width: int) -> Tensor:
    """Xavier-uniform on shape (1, width), as the released code starts its query: bound sqrt(6 / (1 + width))."""
    return nn.init.xavier_uniform_(torch.empty(1, width))[0]


def build_fusion(config: FusionConfig, num_encoders: int, width: int) -> Fusion:
    """The fusion that the config names, for these sizes."""
    cls = import_choice(FUSIONS, config.name)
    if not (isinstance(cls, type) and issubclass(cls, Fusion)):
        raise UserError(f"fusion plug-in {config.name} = {FUSIONS[config.name]} must be a class of Fusion, got {cls!r}")
    return cls(num_encoders, width, config)

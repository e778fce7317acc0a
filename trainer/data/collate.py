"""Collate: rendered conversations and the tokens of their clips -> one padded batch.

The batch knows where everything goes before the model runs: lengths, labels and mask are made here, on the CPU and
ahead of time, from lengths and never from `id != pad` (a tokenizer whose pad is its end token would lose its ends).
A clip that several samples share is projected once.

B samples, C distinct clips, L padded text length, S padded length with visual tokens, N visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mervcache.errors import UserError
from trainer.data.prompts import IGNORE_INDEX, Rendered
from trainer.data.tokens import ClipTokens

MOVED = ("input_ids_BL", "labels_BS", "attention_mask_BS")  # what a batch has on the device, besides its tokens


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward reads; `clip_rows`, `lengths` and `visual_at` stay on the CPU, so nothing waits for a device."""

    input_ids_BL: Tensor  # int64, right-padded with 0
    labels_BS: Tensor  # int64 in the layout with visual tokens; IGNORE_INDEX everywhere but on answers
    attention_mask_BS: Tensor  # int64, 1 on real positions
    lengths: tuple[int, ...]  # text tokens of each sample
    visual_at: tuple[int, ...]  # text position before which a sample's visual tokens stand
    clip_rows: tuple[int, ...]  # row of the sample's clip in `tokens`; -1 for text only
    tokens: Mapping[str, ClipTokens]  # encoder -> tokens_CTHWD, maybe with prefix; empty if no sample has a clip
    first_label: int  # smallest labelled position, S if there is none: no logits are needed before

    @property
    def supervised_B(self) -> Tensor:
        """Supervised tokens of each sample."""
        return (self.labels_BS != IGNORE_INDEX).sum(1)

    @property
    def num_supervised(self) -> int:
        return int(self.supervised_B.sum())

    def pinned(self) -> Batch:
        """The same batch in page-locked memory: a GPU copies from it while it computes."""
        moved = {name: getattr(self, name).pin_memory() for name in MOVED}
        tokens = {encoder: value.pin_memory() for encoder, value in self.tokens.items()}
        return replace(self, **moved, tokens=tokens)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in MOVED}
        tokens = {encoder: value.to(device, non_blocking=True) for encoder, value in self.tokens.items()}
        return replace(self, **moved, tokens=tokens)


def collate(
    rendered: Sequence[Rendered],
    clip_rows: Sequence[int],
    tokens: Mapping[str, ClipTokens],
    *,
    num_visual_tokens: int,
    context: int | None = None,
) -> Batch:
    """One batch; `context` is the longest sequence that the LLM takes: in training texts have been cut to fit it."""
    totals = [
        len(sample.input_ids) + (num_visual_tokens if row >= 0 else 0)
        for sample, row in zip(rendered, clip_rows, strict=True)
    ]
    if context is not None and max(totals) > context:
        raise UserError(
            f"{num_visual_tokens} visual tokens and {max(len(s.input_ids) for s in rendered)} text tokens exceed the"
            f" LLM's context of {context}; shorten the text"
        )
    labels_BS = _pad([_with_gap(s, num_visual_tokens * (row >= 0)) for s, row in zip(rendered, clip_rows, strict=True)])
    labelled = (labels_BS != IGNORE_INDEX).any(0).nonzero()
    return Batch(
        input_ids_BL=_pad([sample.input_ids for sample in rendered], fill=0),
        labels_BS=labels_BS,
        attention_mask_BS=(torch.arange(max(totals))[None] < torch.tensor(totals)[:, None]).long(),
        lengths=tuple(len(sample.input_ids) for sample in rendered),
        visual_at=tuple(sample.visual_at for sample in rendered),
        clip_rows=tuple(clip_rows),
        tokens=dict(tokens),
        first_label=int(labelled[0]) if len(labelled) else max(totals),
    )


def distinct_clips(clip_ids: Sequence[str | None]) -> tuple[list[str], list[int]]:
    """Clips in order of first use, and for every sample the row of its clip, -1 for none."""
    rows = {clip_id: row for row, clip_id in enumerate(dict.fromkeys(c for c in clip_ids if c is not None))}
    return list(rows), [-1 if clip_id is None else rows[clip_id] for clip_id in clip_ids]


def _with_gap(sample: Rendered, num_visual_tokens: int) -> list[int]:
    """Labels with unsupervised places where the visual tokens will stand."""
    gap = [IGNORE_INDEX] * num_visual_tokens
    return [*sample.labels[: sample.visual_at], *gap, *sample.labels[sample.visual_at :]]


def _pad(rows: Sequence[Sequence[int]], fill: int = IGNORE_INDEX) -> Tensor:
    """int64 [rows, longest], padded at the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], dtype=torch.long)

"""What one forward reads: samples with the tokens of their clips, collated.

Label positions and masks come from lengths, not from `id != pad` (otherwise EOS would be masked where pad == eos).

B samples, C distinct clips or windows of videos, L padded text length, S padded length with visual tokens, N visual
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from mervcache.errors import UserError
from trainer.data.masks import Mask
from trainer.data.prompts import IGNORE_INDEX, Rendered
from trainer.data.tokens import ClipTokens, TokenSource
from trainer.data.windows import Rows

MOVED = (
    "input_ids_BL",
    "labels_BS",
    "attention_mask_BS",
    "supervised_K",
    "shown_CE",
)  # of a batch, on the device with its tokens


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward reads; `clip_rows`, `lengths` and `visual_at` stay on the CPU, so nothing waits for a device."""

    input_ids_BL: Tensor  # int64, right-padded with 0
    labels_BS: Tensor  # int64 in the layout with visual tokens; IGNORE_INDEX everywhere but on answers
    attention_mask_BS: Tensor  # int64, 1 on real positions
    supervised_K: Tensor  # int64, places in labels_BS.flatten() that hold a label; not a sequence's first, which no
    # position predicts
    lengths: tuple[int, ...]  # text tokens of each sample
    visual_at: tuple[int, ...]  # text position before which a sample's visual tokens are inserted
    clip_rows: tuple[int, ...]  # row of the sample's clip in `tokens`, of its first window; -1 for text only
    num_rows: tuple[int, ...]  # rows of each sample: 1, of a video in windows their number, 0 for text only
    tokens: Mapping[str, ClipTokens]  # encoder -> tokens_CTHWD, maybe with prefix; empty if no sample has a clip
    first_label: int  # smallest labelled position, S if there is none: no logits are needed before
    masks: tuple[Mask, ...] | None = None  # of each row of `tokens`, on the CPU; None: every encoder is shown
    shown_CE: Tensor | None = None  # bool, the same
    tokens_per_frame: int | None = None  # of nested grids; None: the grid of the run

    @property
    def supervised_B(self) -> Tensor:
        """Supervised tokens of each sample."""
        return (self.labels_BS != IGNORE_INDEX).sum(1)

    @property
    def num_supervised(self) -> int:
        return int(self.supervised_B.sum())

    def pinned(self) -> Batch:
        """The same batch in page-locked memory: a GPU copies from it while it computes."""
        moved = {name: value.pin_memory() for name in MOVED if (value := getattr(self, name)) is not None}
        tokens = {encoder: value.pin_memory() for encoder, value in self.tokens.items()}
        return replace(self, **moved, tokens=tokens)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        values = {name: value for name in MOVED if (value := getattr(self, name)) is not None}
        moved = {name: value.to(device, non_blocking=True) for name, value in values.items()}
        tokens = {encoder: value.to(device, non_blocking=True) for encoder, value in self.tokens.items()}
        return replace(self, **moved, tokens=tokens)


def collate(
    rendered: Sequence[Rendered],
    clip_rows: Sequence[int],
    tokens: Mapping[str, ClipTokens],
    *,
    num_visual_tokens: int,
    num_rows: Sequence[int] | None = None,
    context: int | None = None,
    masks: Sequence[Mask] | None = None,
    leaves_out_masked: bool = False,
    tokens_per_frame: int | None = None,
) -> Batch:
    """One batch; `context` is the longest sequence that the LLM takes: in training texts have been cut to fit it.

    `masks` are those of the rows of `tokens`. With `leaves_out_masked` a row has the visual tokens of the encoders that
    it shows alone, else `num_visual_tokens` whatever it shows; that is their number at `tokens_per_frame`. A sample
    has `num_rows` rows, one by default, and the visual tokens of all of them.
    """
    counts = tuple(num_rows) if num_rows is not None else tuple(int(row >= 0) for row in clip_rows)
    shown = masks if leaves_out_masked else None
    visual = [n * _num_visual(row, num_visual_tokens, shown) for row, n in zip(clip_rows, counts, strict=True)]
    totals = [len(sample.input_ids) + count for sample, count in zip(rendered, visual, strict=True)]
    if context is not None and max(totals) > context:
        raise UserError(
            f"{max(visual)} visual tokens and {max(len(s.input_ids) for s in rendered)} text tokens exceed the"
            f" LLM's context of {context}; shorten the text"
        )
    labels_BS = _labels(rendered, visual)
    is_labelled_BS = labels_BS != IGNORE_INDEX
    labelled = is_labelled_BS.any(0).nonzero()
    supervised = torch.arange(labels_BS.numel()).view(labels_BS.shape)[:, 1:][is_labelled_BS[:, 1:]]
    return Batch(
        input_ids_BL=_pad([sample.input_ids for sample in rendered], fill=0),
        labels_BS=labels_BS,
        attention_mask_BS=(torch.arange(max(totals))[None] < torch.tensor(totals)[:, None]).long(),
        supervised_K=supervised,
        lengths=tuple(len(sample.input_ids) for sample in rendered),
        visual_at=tuple(sample.visual_at for sample in rendered),
        clip_rows=tuple(clip_rows),
        num_rows=counts,
        tokens=dict(tokens),
        first_label=int(labelled[0]) if len(labelled) else max(totals),
        masks=None if masks is None else tuple(masks),
        shown_CE=None if masks is None else torch.tensor(masks),
        tokens_per_frame=tokens_per_frame,
    )


def _num_visual(row: int, num_visual_tokens: int, masks: Sequence[Mask] | None) -> int:
    """Visual tokens of a sample, of which `num_visual_tokens` would be those of all encoders."""
    if row < 0:
        return 0
    return num_visual_tokens if masks is None else num_visual_tokens * sum(masks[row]) // len(masks[row])


def distinct_clips(clip_ids: Sequence[str | None]) -> tuple[list[str], list[int]]:
    """Clips in order of first use, and for every sample the row of its clip, -1 for none."""
    rows = {clip_id: row for row, clip_id in enumerate(dict.fromkeys(c for c in clip_ids if c is not None))}
    return list(rows), [-1 if clip_id is None else rows[clip_id] for clip_id in clip_ids]


def _labels(rendered: Sequence[Rendered], visual: Sequence[int]) -> Tensor:
    """labels_BS with unsupervised positions for the visual tokens of each sample, padded at the right."""
    longest = max(len(sample.labels) + count for sample, count in zip(rendered, visual, strict=True))
    labels_BS = np.full((len(rendered), longest), IGNORE_INDEX, dtype=np.int64)
    for row_S, sample, count in zip(labels_BS, rendered, visual, strict=True):
        row_S[: sample.visual_at] = sample.labels[: sample.visual_at]
        row_S[sample.visual_at + count : len(sample.labels) + count] = sample.labels[sample.visual_at :]
    return torch.from_numpy(labels_BS)


def _pad(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """int64 [rows, longest], padded at the right."""
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(padded)


def make_batch(
    rendered: Sequence[Rendered],
    clip_ids: Sequence[str | None],
    source: TokenSource,
    num_visual_tokens: int,
    context: int | None,
    *,
    masks: Sequence[Mask | None] | None = None,
    leaves_out_masked: bool = False,
    tokens_per_frame: int | None = None,
) -> Batch:
    """Fetch the tokens of the samples' clips, each once, and collate.

    `masks` are those of the samples; a sample that shows no encoder has no visual tokens. `num_visual_tokens` are those
    at `tokens_per_frame`, where grids are nested.
    """
    options = {"num_visual_tokens": num_visual_tokens, "context": context, "tokens_per_frame": tokens_per_frame}
    if masks is None:
        clips, places = distinct_clips(clip_ids)
        rows, tokens = _fetch(source, clips)
        first_rows, num_rows = rows.of(places)
        return collate(rendered, first_rows, tokens, num_rows=num_rows, **options)
    pairs = [(c, m) if c is not None and m and any(m) else None for c, m in zip(clip_ids, masks, strict=True)]
    places = {pair: row for row, pair in enumerate(dict.fromkeys(pair for pair in pairs if pair is not None))}
    clips, of_pairs = distinct_clips([clip_id for clip_id, _ in places])
    rows, tokens = _fetch(source, clips)
    if len(of_pairs) > len(clips):
        taken = rows.taken(of_pairs)
        tokens = {encoder: value[taken] for encoder, value in tokens.items()}
    rows = Rows(tuple(rows.counts[clip] for clip in of_pairs))
    first_rows, num_rows = rows.of([-1 if pair is None else places[pair] for pair in pairs])
    return collate(
        rendered,
        first_rows,
        tokens,
        num_rows=num_rows,
        masks=[mask for (_, mask), count in zip(places, rows.counts, strict=True) for _ in range(count)] or None,
        leaves_out_masked=leaves_out_masked,
        **options,
    )


def _fetch(source: TokenSource, clips: Sequence[str]) -> tuple[Rows, dict[str, ClipTokens]]:
    """The tokens of clips, and which rows of them are those of each."""
    windows = [source.windows(clip_id) for clip_id in clips]
    rows = Rows(tuple(map(len, windows)))
    return rows, source.fetch(list(chain(*windows))) if clips else {}

"""Validation loss of a run on the same tokens as stored, and as they would be in a store of each storage dtype.

The run was trained on the stored dtype, so the change shows what switching costs a finished run, not what training on
another dtype would give.

B clips, T time, H W height width, K prefix tokens, D encoder width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from featurestore.clips import Sample
from featurestore.quality import STORED, LossRecord, LossRow, now
from featurestore.storage_dtypes import STORAGE_DTYPES, OverflowedTokens, from_stored, prefix_dtype, to_stored
from mervcache.errors import UserError
from trainer.config import TrainConfig
from trainer.data.tokens import ClipTokens, PrefixedTokens, StoreTokens, TokenSource
from trainer.loop.distributed import make_accelerator
from trainer.loop.plan import Validation
from trainer.model.video_llm import Built
from trainer.runs.load import load_run
from trainer.sources import open_store_for

if TYPE_CHECKING:
    from trainer.loop.plan import Plan

_LOSS = "val_loss"


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """The part of a training plan that `Validation` reads."""

    built: Built
    config: TrainConfig


class CastTokens(TokenSource):
    """Another source's tokens as a store of `dtype` would give them; encoders stored so already pass as they are."""

    def __init__(self, source: TokenSource, dtype: str, stored: Mapping[str, str]) -> None:
        self._source, self._dtype, self._stored = source, dtype, stored
        self.shapes, self.facts = source.shapes, source.facts

    def fetch(self, clip_ids: Sequence[str]) -> dict[str, ClipTokens]:
        fetched = self._source.fetch(clip_ids)
        return {
            encoder: tokens if self._stored[encoder] == self._dtype else cast_tokens(tokens, self._dtype)
            for encoder, tokens in fetched.items()
        }

    def available(self, clip_ids: Iterable[str]) -> set[str]:
        return self._source.available(clip_ids)

    def data_digest(self, clip_ids: Iterable[str], samples: Iterable[Sample]) -> str:
        raise NotImplementedError  # no run is trained from these

    def stills(self, clip_ids: Iterable[str]) -> set[str]:
        return self._source.stills(clip_ids)


def cast_tokens(tokens: ClipTokens, dtype: str) -> ClipTokens:
    """Every clip through a storage dtype and back; raises OverflowedTokens where one does not fit."""
    if isinstance(tokens, PrefixedTokens):
        grid = tokens.tokens_BTHWD
        return PrefixedTokens(
            tokens_BTHWD=None if grid is None else _cast(grid, dtype),
            prefix_BTKD=_cast(tokens.prefix_BTKD, prefix_dtype(dtype)),
        )
    return _cast(tokens, dtype)


def _cast(clips: Tensor, dtype: str) -> Tensor:
    stored = [to_stored({"tokens": clip}, dtype) for clip in clips.float().numpy()]
    return torch.from_numpy(np.stack([from_stored(arrays, dtype)["tokens"] for arrays in stored]))


def measure_losses(
    run: Path, store: str | None, *, split: str = "heldout", limit: int = 256, best: bool = False
) -> tuple[str, LossRecord]:
    """(the store's path, losses of the run on it): as stored, then through every storage dtype."""
    loaded = load_run(run, best=best)
    path = store or loaded.record.store
    if not path:
        raise UserError(f"{run} names no store of its own; give the one whose tokens it reads with --store")
    config = replace(loaded.built.config, eval_split=split, eval_limit=limit, eval_every=None)
    samples, source = open_store_for(loaded, path, names=config.samples)
    _refuse_missing_split(samples, split)
    loaded.built.model.to("cuda" if torch.cuda.is_available() else "cpu")
    subject = _Subject(built=loaded.built, config=config)
    rows, num_samples = _rows(subject, samples, source, run)
    return path, LossRecord(
        time=now(),
        snapshot=source.snapshot,
        run=Path(run).resolve().name,
        step=loaded.step,
        split=split,
        samples=num_samples,
        weights=", ".join(sorted({facts["weights"] for facts in source.facts.values()})),
        rows=rows,
    )


def _refuse_missing_split(samples: Sequence[Sample], split: str) -> None:
    found = sorted({sample.split for sample in samples})
    if split not in found:
        raise UserError(
            f"no sample of this store is of split {split!r}; it has: {', '.join(found) or 'none'}. Choose one with "
            "--split: where it was trained on, the loss is lower, and its change with the dtype is still informative"
        )


def _rows(
    subject: _Subject, samples: Sequence[Sample], source: StoreTokens, run: Path
) -> tuple[tuple[LossRow, ...], int]:
    """A row per dtype, and how many samples were measured."""
    stored = {encoder: facts["identity"]["storage_dtype"] for encoder, facts in source.facts.items()}
    accelerator = make_accelerator(replace(subject.config, trackers=()), run)
    validation = Validation(cast("Plan", subject), samples, source, accelerator)
    validation.questions = []  # the loss alone: answers cost several forwards a question
    rows = [_row(STORED, validation())]
    for dtype in STORAGE_DTYPES:
        validation.source = CastTokens(source, dtype, stored)
        try:
            rows.append(_row(dtype, validation()))
        except OverflowedTokens:
            rows.append(LossRow(dtype=dtype, loss=None, by_modality={}))
    return tuple(rows), len(validation.samples)


def _row(dtype: str, metrics: Mapping[str, Any]) -> LossRow:
    names = [name for name in metrics if name.startswith(f"{_LOSS}_")]
    by_modality = {name.removeprefix(f"{_LOSS}_"): metrics[name] for name in names}
    return LossRow(dtype=dtype, loss=metrics[_LOSS], by_modality=by_modality)

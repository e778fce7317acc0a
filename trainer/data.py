"""Data: which samples a run reads, in what batches, and the digest that names all of it.

Comes in: the samples of a store and a token source. Goes out: `TrainingData` (kept samples in a canonical order, what
was dropped and why, the data digest) and `Batches`, which makes the micro-batches of any step from the step's number
alone. Samples are never replaced: a clip without tokens drops its samples, and the count is reported.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from featurestore.errors import UserError
from featurestore.samples import Sample
from trainer.collate import Batch, collate, distinct_clips
from trainer.config import TrainConfig
from trainer.order import Order, rank_share
from trainer.prompts import Rendered, Renderer
from trainer.tokens import TokenSource


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The samples of a run; equal digests mean equal samples with equal tokens, in the same order."""

    samples: tuple[Sample, ...]
    digest: str  # 64 hex digits over every kept sample and its clip's tokens
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason -> samples


def select(samples: Sequence[Sample], source: TokenSource, config: TrainConfig) -> TrainingData:
    """Samples of the config's split and stage whose clips have tokens of every encoder."""
    wanted = [sample for sample in samples if sample.split == config.split and sample.stage == config.stage]
    if not wanted:
        found = sorted({f"{sample.split}/{sample.stage}" for sample in samples})
        raise UserError(
            f"no samples of split {config.split!r} and stage {config.stage!r}; found {', '.join(found) or 'none'}"
        )
    wanted.sort(key=lambda sample: (sample.sample_id, sample.digest))
    available = source.available({sample.clip_id for sample in wanted if sample.clip_id is not None})
    dropped: Counter[str] = Counter()
    kept = []
    for sample in wanted:
        reason = _reason_to_drop(sample, available, config)
        dropped.update([reason] if reason else [])
        kept += [] if reason else [sample]
    if not kept:
        raise UserError(f"no sample is left to train on: {dict(dropped)}")
    kept = kept[: config.limit]
    digest = source.data_digest({sample.clip_id for sample in kept if sample.clip_id is not None}, kept)
    return TrainingData(samples=tuple(kept), digest=digest, dropped=dict(dropped))


class Batches:
    """The micro-batches of every step, for one rank."""

    def __init__(
        self,
        data: TrainingData,
        source: TokenSource,
        renderer: Renderer,
        config: TrainConfig,
        *,
        num_visual_tokens: int,
        context: int | None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.data, self.source, self.config = data, source, config
        self.num_visual_tokens, self.context = num_visual_tokens, context
        self.rank, self.num_ranks = rank, num_ranks
        self.order = Order(
            num_samples=len(data.samples),
            batch_size=config.batch_size,
            seed=config.seed,
            digest=order_digest(data.samples),
        )
        self.rendered = lru_cache(maxsize=1 << 20)(lambda index: renderer(data.samples[index].turns))

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.max_steps or self.order.num_steps(self.config.epochs)

    def step(self, step: int) -> Step:
        """This rank's part of a step; needs no word from other ranks, since every rank knows the order."""
        batch, share = self.order.batch(step), self._share(step)
        size = self.config.micro_batch_size
        self.source.expect(self._clips([*share, *self._share(step + 1)]))
        return Step(
            micro_batches=[self._collate(share[start : start + size]) for start in range(0, len(share), size)],
            num_supervised=sum(self.rendered(index).num_supervised for index in batch),
            num_text_tokens=sum(len(self.rendered(index).input_ids) for index in batch),
        )

    def _share(self, step: int) -> list[int]:
        """This rank's samples of a step. Those of like length share a micro-batch; the step's sum does not change."""
        share = rank_share(self.order.batch(step), self.rank, self.num_ranks)
        return sorted(share, key=lambda index: len(self.rendered(index).input_ids))

    def _clips(self, indices: Sequence[int]) -> list[str]:
        return [clip for index in indices if (clip := self._clip_id(index)) is not None]

    def _collate(self, indices: Sequence[int]) -> Batch:
        clips = [self._clip_id(index) for index in indices]
        return make_batch(
            [self.rendered(index) for index in indices], clips, self.source, self.num_visual_tokens, self.context
        )

    def _clip_id(self, index: int) -> str | None:
        return self.data.samples[index].clip_id if self.config.mode != "text-only" else None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step's reading."""

    micro_batches: list[Batch]  # of this rank
    num_supervised: int  # tokens over all ranks: the loss is a sum divided by it; 0 where all answers were cut off
    num_text_tokens: int  # over all ranks


def order_digest(samples: Sequence[Sample]) -> str:
    """Names the samples and not their tokens: a cache, live encoders and another encoder have the same batches."""
    lines = (f"{sample.sample_id}\t{sample.clip_id}\n" for sample in samples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def make_batch(
    rendered: Sequence[Rendered],
    clip_ids: Sequence[str | None],
    source: TokenSource,
    num_visual_tokens: int,
    context: int | None,
) -> Batch:
    """Fetch the tokens of the samples' clips, each once, and collate."""
    clips, rows = distinct_clips(clip_ids)
    tokens = source.fetch(clips) if clips else {}
    return collate(rendered, rows, tokens, num_visual_tokens=num_visual_tokens, context=context)


def _reason_to_drop(sample: Sample, available: set[str], config: TrainConfig) -> str | None:
    if sample.clip_id is None:
        return "text only under a frozen LLM: no gradient" if config.train_llm == "none" else None
    return None if sample.clip_id in available else "clip without tokens of every encoder"

"""Data: which samples a run reads, in what batches, and the digest that names all of it.

Comes in: the samples of a store and a token source. Goes out: `TrainingData` (kept samples in a canonical order, what
was dropped and why, the data digest) and `Batches`, which makes the micro-batches of any step from the step's number
alone. Samples are never replaced: a clip without tokens drops its samples, and the count is reported. Lengths are
known from the samples of a step alone, so nothing is tokenised before it is read.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from featurestore.clips import Sample
from mervcache.errors import UserError, unknown_name
from trainer.config import TrainConfig
from trainer.data.collate import Batch, collate, distinct_clips
from trainer.data.order import Group, Order, Stream, balanced_share, rank_share
from trainer.data.prompts import Rendered, Renderer, reason_to_refuse
from trainer.data.tokens import TokenSource

VISUAL, TEXT = "visual", "text"  # streams of the split_modality sampler: a cached image costs what a cached video costs
# Rendered samples that stay in memory, about 48 bytes per token: a small set from epoch to epoch, of a large one what a
# step and the next one need.
KEPT_SAMPLES, KEPT_BATCHES = 8192, 4


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The samples of a run; equal digests mean equal samples with equal tokens, in the same order."""

    samples: tuple[Sample, ...]
    digest: str  # 64 hex digits over every kept sample and its clip's tokens
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason -> samples


def named_samples(wanted: Sequence[str], known: Sequence[str], read: Callable[[str], Sequence[Sample]]) -> list[Sample]:
    """The conversations of the sets that are wanted, or of all that are known."""
    for name in wanted:
        if name not in known:
            raise UserError(unknown_name("sample set", name, known))
    return [sample for name in wanted or known for sample in read(name)]


def select(samples: Sequence[Sample], source: TokenSource, config: TrainConfig) -> TrainingData:
    """Samples of the config's split and stage that can be trained on, in the order of their ids."""
    check_source_weights(samples, config)
    wanted = [sample for sample in samples if sample.split == config.split and sample.stage == config.stage]
    if not wanted:
        raise UserError(_nothing_there(samples, config))
    wanted.sort(key=lambda sample: (sample.sample_id, sample.digest))
    available = _available(wanted, source, config)
    dropped: Counter[str] = Counter()
    kept = []
    for sample in wanted:
        reason = _reason_to_drop(sample, available, config)
        if reason is None and len(kept) == config.limit:
            reason = f"beyond the limit of {config.limit}"
        dropped.update([reason] if reason else [])
        kept += [] if reason else [sample]
    if not kept:
        raise UserError(f"no sample is left to train on: {dict(dropped)}")
    digest = source.data_digest({sample.clip_id for sample in kept if sample.clip_id is not None}, kept)
    return TrainingData(samples=tuple(kept), digest=digest, dropped=dict(dropped))


def _available(wanted: Sequence[Sample], source: TokenSource, config: TrainConfig) -> set[str]:
    """All clips but those found without tokens; a live source decodes what it is asked for, so no more is asked for
    than the samples need that could be kept."""
    clips = {sample.clip_id for sample in wanted if sample.clip_id is not None}
    could = [sample.clip_id for sample in wanted if _reason_to_drop(sample, clips, config) is None]
    limit = config.limit or len(could)
    num_kept = 0
    while could and num_kept < limit:
        part, could = could[: limit - num_kept], could[limit - num_kept :]
        asked = {clip_id for clip_id in part if clip_id is not None}
        clips -= asked - source.available(asked)
        num_kept += sum(clip_id is None or clip_id in clips for clip_id in part)
    return clips


def check_source_weights(samples: Sequence[Sample], config: TrainConfig) -> None:
    """A weight for a source that no sample has, of whatever stage, is a typing mistake."""
    known = {sample.source for sample in samples} if config.source_weights else set()
    for name in config.source_weights:
        if name not in known:
            raise UserError(unknown_name("source in source_weights", name, sorted(known)))


def streams(samples: Sequence[Sample], config: TrainConfig) -> list[Stream]:
    """One stream of all samples, or one per modality; sources with a weight of their own are groups."""
    members: dict[str, dict[tuple[str, float], list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, sample in enumerate(samples):
        modality = VISUAL if sample.clip_id is not None else TEXT
        weight = config.source_weights.get(sample.source, 1.0)
        group = (sample.source if weight != 1 else "", weight)
        members[modality if config.sampler == "split_modality" else ""][group].append(index)
    return [
        Stream(
            name=name,
            groups=tuple(
                Group(name=source, weight=weight, indices=np.array(indices))
                for (source, weight), indices in sorted(groups.items())
            ),
        )
        for name, groups in sorted(members.items())
    ]


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
            streams(data.samples, config),
            batch_size=config.batch_size,
            seed=config.seed,
            digest=order_digest(data.samples),
        )
        kept = max(KEPT_SAMPLES, KEPT_BATCHES * config.batch_size)
        self.rendered = lru_cache(maxsize=kept)(lambda index: renderer(data.samples[index].turns))

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.max_steps or self.order.num_steps(self.config.epochs)

    def step(self, step: int) -> Step:
        """This rank's part of a step; needs no word from other ranks, since every rank knows the order."""
        batch, share = self.order.batch(step), self._share(step)
        self.source.expect(self._clips([*share, *self._share(step + 1)]))
        size = self.config.micro_batch_size
        parts = [share[start : start + size] for start in range(0, len(share), size)]
        num_supervised = self._num_supervised(batch)
        return Step(
            micro_batches=[self._collate(part) for part in parts],
            divisors=tuple(self._divisor(part, num_supervised, len(parts)) for part in parts),
            num_supervised=num_supervised,
            num_tokens=sum(len(self.rendered(index).input_ids) for index in batch)
            + self.num_visual_tokens * len(self._clips(batch)),
        )

    def _divisor(self, part: Sequence[int], num_supervised: int, num_parts: int) -> int:
        """What the summed loss of a micro-batch is divided by, so that all of a step's add up to its loss."""
        if self.config.loss == "micro_batch_means":
            return max(self._num_supervised(part), 1) * num_parts * self.num_ranks
        return max(num_supervised, 1)

    def _num_supervised(self, indices: Sequence[int]) -> int:
        return sum(self.rendered(index).num_supervised for index in indices)

    def _share(self, step: int) -> list[int]:
        """This rank's samples of a step, the shortest first: those of like length share a micro-batch."""
        batch = self.order.batch(step)
        lengths = {index: len(self.rendered(index).input_ids) for index in batch}
        if self.config.sampler == "split_modality":
            share = balanced_share(batch, [lengths[index] for index in batch], self.rank, self.num_ranks)
        else:
            share = rank_share(batch, self.rank, self.num_ranks)
        return sorted(share, key=lengths.__getitem__)

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
    divisors: tuple[int, ...]  # of each micro-batch's summed loss; over all ranks the quotients add up to the loss
    num_supervised: int  # tokens over all ranks; 0 where all answers were cut off
    num_tokens: int  # of text and visual, over all ranks


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
    if config.source_weights.get(sample.source, 1.0) == 0:
        return "its source has weight 0"
    if not lies_in_fraction(sample.sample_id, config.fraction):
        return f"outside the fraction of {config.fraction:g}"
    if sample.clip_id is None:
        if config.prompt == "caption":
            return "caption prompt: nothing to describe"
        return "text only under a frozen LLM: no gradient" if config.train_llm == "none" else None
    if sample.clip_id not in available:
        return "clip without tokens of every encoder"
    return reason_to_refuse(config.prompt, sample.turns)


def lies_in_fraction(sample_id: str, fraction: float) -> bool:
    """Whether a share of the samples holds this one: by its id alone, so shares nest and stay when a store grows."""
    place = int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "big")
    return place < fraction * 2**64


def _nothing_there(samples: Sequence[Sample], config: TrainConfig) -> str:
    """What there is instead, and the setting that takes it."""
    counts = Counter((sample.stage, sample.split) for sample in samples)
    listed = ", ".join(f"{count} of {stage}/{split}" for (stage, split), count in sorted(counts.items()))
    same_split = sorted({stage for stage, split in counts if split == config.split})
    same_stage = sorted({split for stage, split in counts if stage == config.stage})
    if same_stage:
        advice = f"set `split: {same_stage[0]}` in a config file"
    elif same_split:
        advice = "type " + " or ".join(f"--stage {stage}" for stage in same_split)
    else:
        advice = "add some with `merv-pipeline extract --dataset NAME --root DIR --store STORE`"
    asked = f"stage {config.stage!r} and split {config.split!r}"
    return f"no samples of {asked}; there are {listed or 'none at all'}; {advice}"

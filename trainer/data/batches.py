"""Training data: which samples a run reads, and the batches of every step.

Batches of a step follow from its number alone, so resuming costs the same at any step. A clip without tokens drops its
samples, which are counted and never replaced.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain

import numpy as np

from featurestore.clips import Sample
from mervcache.console import plural
from mervcache.errors import UserError, unknown_name
from trainer.config import TrainConfig
from trainer.data.collate import Batch, make_batch
from trainer.data.grids import draw_grid
from trainer.data.masks import Mask, draw_mask
from trainer.data.order import Group, Order, Stream, balanced_shares, rank_shares
from trainer.data.partition import Limit, padding_share, partition
from trainer.data.prompts import IGNORE_INDEX, Rendered, Renderer, reason_to_refuse
from trainer.data.rendered_cache import RenderedCache
from trainer.data.tokens import TokenSource

EXCLUDED = "clip listed in exclude"  # a reason to drop a sample
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
    excluded: str = ""  # what the setting `exclude` left out; empty: it lists no clip


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
    listed = frozenset(config.exclude)
    left_out = [sample for sample in wanted if sample.clip_id in listed]
    wanted = [sample for sample in wanted if sample.clip_id not in listed]
    uses = Counter(sample.sample_id for sample in wanted)
    wanted.sort(key=lambda sample: (sample.sample_id, sample.digest if uses[sample.sample_id] > 1 else ""))
    available = _available(wanted, source, config)
    dropped = Counter({EXCLUDED: len(left_out)} if left_out else {})
    kept = []
    for sample in wanted:
        reason = _reason_to_drop(sample, available, config)
        if reason is None and len(kept) == config.limit:
            reason = f"beyond the limit of {config.limit}"
        dropped.update([reason] if reason else [])
        kept += [] if reason else [sample]
    if not kept:
        advice = "; shorten the list of clips in `exclude`" if left_out else ""
        raise UserError(f"no sample is left to train on: {dict(dropped)}{advice}")
    _check_windows(kept, source, config)
    digest = source.data_digest({sample.clip_id for sample in kept if sample.clip_id is not None}, kept)
    excluded = _excluded(left_out, listed, samples) if listed else ""
    return TrainingData(samples=tuple(kept), digest=digest, dropped=dict(dropped), excluded=excluded)


def _excluded(left_out: Sequence[Sample], listed: frozenset[str], samples: Sequence[Sample]) -> str:
    """What `exclude` left out, and how many of its ids no sample of any stage and split is about."""
    clips = plural(len({sample.clip_id for sample in left_out}), "clip")
    unknown = len(listed - {sample.clip_id for sample in samples})
    rest = f"; not found among the samples: {unknown:,} of {len(listed):,} listed" if unknown else ""
    return f"exclude left out {plural(len(left_out), 'sample')} of {clips}{rest}"


def _check_windows(samples: Sequence[Sample], source: TokenSource, config: TrainConfig) -> None:
    if not source.has_windows or config.max_windows is not None or config.mode == "text-only":
        return
    most = max((len(source.windows(sample.clip_id)) for sample in samples if sample.clip_id is not None), default=0)
    if most > 1:
        raise UserError(
            f"a sample would be shown up to {most} windows of its video: set max_windows, such as 4, in --config"
        )


def _available(wanted: Sequence[Sample], source: TokenSource, config: TrainConfig) -> set[str]:
    """All clips but those found without tokens.

    A live source decodes every clip it is queried for, so only as many are queried as samples can be kept.
    """
    clips = {sample.clip_id for sample in wanted if sample.clip_id is not None}
    could = [sample.clip_id for sample in wanted if _reason_to_drop(sample, clips, config) is None]
    limit = config.limit or len(could)
    num_kept = 0
    while could and num_kept < limit:
        part, could = could[: limit - num_kept], could[limit - num_kept :]
        queried = {clip_id for clip_id in part if clip_id is not None}
        clips -= queried - source.available(queried)
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


def samples_per_epoch(samples: Sequence[Sample], config: TrainConfig) -> int:
    """How many samples an epoch reads, by the weights of their sources."""
    return sum(stream.num_per_epoch for stream in streams(samples, config))


class Batches:
    """The micro-batches of every step, for one rank."""

    def __init__(
        self,
        data: TrainingData,
        source: TokenSource,
        renderer: Renderer | RenderedCache,
        config: TrainConfig,
        *,
        num_visual_tokens: int,
        context: int | None,
        leaves_out_masked: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.data, self.source, self.config = data, source, config
        self.num_visual_tokens, self.context, self.leaves_out_masked = num_visual_tokens, context, leaves_out_masked
        self.rank, self.num_ranks = rank, num_ranks
        self.limit = Limit.of(config)  # the loop lowers it where memory runs out
        self.order = Order(
            streams(data.samples, config),
            batch_size=config.batch_size,
            seed=config.seed,
            digest=order_digest(data.samples),
        )
        kept = max(KEPT_SAMPLES, KEPT_BATCHES * config.batch_size)

        def rendered(index: int) -> Rendered:
            sample = data.samples[index]
            return renderer(sample.turns, has_clip=sample.clip_id is not None)

        self.rendered = lru_cache(maxsize=kept)(rendered)

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.max_steps or self.order.num_steps(self.config.epochs)

    def step(self, step: int) -> Step:
        """This rank's part of a step; no communication, since every rank computes the order."""
        batch, limit = self.order.batch(step), self.limit
        shares, following = self.parts(step, limit), self.parts(step + 1, limit)[self.rank]
        parts = shares[self.rank]
        self.source.expect(self._clips([*chain(*parts), *chain(*following)]))
        num_supervised = self._num_supervised(batch)
        epoch, tokens_per_frame = self._epoch(step), self.tokens_per_frame(step)
        return Step(
            micro_batches=[
                self._collate(part, epoch, tokens_per_frame) if part else self.filler(step) for part in parts
            ],
            divisors=tuple(self._divisor(part, num_supervised, len(parts)) for part in parts),
            num_supervised=num_supervised,
            num_tokens=sum(len(self.rendered(index).input_ids) for index in batch)
            + self._num_visual_tokens(tokens_per_frame) * sum(map(self._num_windows, batch)),
            padding_share=padding_share(list(chain(*shares)), {index: self.length(index, step) for index in batch}),
            limit=limit,
            tokens_per_frame=tokens_per_frame,
        )

    def parts(self, step: int, limit: Limit) -> list[list[list[int]]]:
        """Every rank's micro-batches of a step, as indices of samples: those of like length share one."""
        batch = self.order.batch(step)
        if limit.tokens is not None:
            lengths = [self.length(index, step) for index in batch]
            shares = partition(lengths, self.num_ranks, limit.tokens)
            return [[[batch[place] for place in part] for part in share] for share in shares]
        # Samples of one window are ordered by their text alone; each further window is as long as its visual tokens.
        further = {index: max(0, self._num_windows(index) - 1) * self.num_visual_tokens for index in batch}
        texts = {index: len(self.rendered(index).input_ids) + further[index] for index in batch}
        if self.config.sampler == "split_modality":
            shares = balanced_shares(batch, [texts[index] for index in batch], self.num_ranks)
        else:
            shares = rank_shares(batch, self.num_ranks)
        shares = [sorted(share, key=texts.__getitem__) for share in shares]
        starts = range(0, len(shares[0]), limit.samples)
        return [[share[start : start + limit.samples] for start in starts] for share in shares]

    def filler(self, step: int) -> Batch:
        """A micro-batch that takes part in a step and changes nothing: the shortest sample without labels."""
        index = min(self.order.batch(step), key=lambda index: (self.length(index, step), index))
        return self._collate([index], self._epoch(step), self.tokens_per_frame(step), counts=False)

    def length(self, index: int, step: int) -> int:
        """Positions of a sample in a step, of text and visual tokens."""
        text = len(self.rendered(index).input_ids)
        if self._clip_id(index) is None:
            return text
        visual = self._num_visual_tokens(self.tokens_per_frame(step)) * self._num_windows(index)
        if self.config.mask_encoders == "none":
            return text + visual
        mask = self.mask(index, self._epoch(step))
        shown = sum(mask) / len(mask) if self.leaves_out_masked else any(mask)
        return text + int(visual * shown)

    def _epoch(self, step: int) -> int:
        return step * self.config.batch_size // self.order.num_per_epoch

    def tokens_per_frame(self, step: int) -> int | None:
        """The nested grid of a step; None for a run of one grid, or without visual tokens."""
        grids = () if self.config.mode == "text-only" else self.config.projector.nested_grids
        return draw_grid(grids, self.config.seed, step)

    def _num_visual_tokens(self, tokens_per_frame: int | None) -> int:
        if tokens_per_frame is None:
            return self.num_visual_tokens
        return self.num_visual_tokens * tokens_per_frame // max(self.config.projector.nested_grids)

    def _divisor(self, part: Sequence[int], num_supervised: int, num_parts: int) -> int:
        """What the summed loss of a micro-batch is divided by, so that all of a step's add up to its loss."""
        if self.config.loss == "micro_batch_means":
            return max(self._num_supervised(part), 1) * num_parts * self.num_ranks
        return max(num_supervised, 1)

    def _num_supervised(self, indices: Sequence[int]) -> int:
        return sum(self.rendered(index).num_supervised for index in indices)

    def _clips(self, indices: Sequence[int]) -> list[str]:
        return [clip for index in indices if (clip := self._clip_id(index)) is not None]

    def _collate(
        self, indices: Sequence[int], epoch: int, tokens_per_frame: int | None, *, counts: bool = True
    ) -> Batch:
        """The batch of these samples; where it does not count, without their labels."""
        clips = [self._clip_id(index) for index in indices]
        rendered = [self.rendered(index) for index in indices]
        if not counts:
            rendered = [replace(sample, labels=(IGNORE_INDEX,) * len(sample.labels)) for sample in rendered]
        return make_batch(
            rendered,
            clips,
            self.source,
            self._num_visual_tokens(tokens_per_frame),
            self.context,
            masks=None if self.config.mask_encoders == "none" else [self.mask(index, epoch) for index in indices],
            leaves_out_masked=self.leaves_out_masked,
            tokens_per_frame=tokens_per_frame,
        )

    def mask(self, index: int, epoch: int) -> Mask:
        """The encoders that a sample shows in an epoch; under a frozen LLM at least one, or nothing would learn."""
        config = self.config
        return draw_mask(
            config.mask_encoders,
            len(self.source.shapes),
            config.seed,
            epoch,
            self.data.samples[index].sample_id,
            may_be_empty=config.train_llm != "none",
        )

    def _num_windows(self, index: int) -> int:
        clip_id = self._clip_id(index)
        return 0 if clip_id is None else len(self.source.windows(clip_id))

    def _clip_id(self, index: int) -> str | None:
        return self.data.samples[index].clip_id if self.config.mode != "text-only" else None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step's reading."""

    micro_batches: list[Batch]  # of this rank
    divisors: tuple[int, ...]  # of each micro-batch's summed loss; over all ranks the quotients add up to the loss
    num_supervised: int  # tokens over all ranks; 0 where all answers were cut off
    num_tokens: int  # of text and visual, over all ranks
    padding_share: float  # of the positions of all ranks' micro-batches
    limit: Limit  # of these micro-batches
    tokens_per_frame: int | None = None  # of nested grids


def order_digest(samples: Sequence[Sample]) -> str:
    """Names the samples and not their tokens: a cache, live encoders and another encoder have the same batches."""
    lines = (f"{sample.sample_id}\t{sample.clip_id}\n" for sample in samples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
    return reason_to_refuse(config.prompt, sample.turns, config.visual_position)


def lies_in_fraction(sample_id: str, fraction: float) -> bool:
    """Whether a share of the samples holds this one: by its id alone, so shares nest and stay when a store grows."""
    if fraction >= 1:
        return True
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
    wanted = f"stage {config.stage!r} and split {config.split!r}"
    return f"no samples of {wanted}; there are {listed or 'none at all'}; {advice}"

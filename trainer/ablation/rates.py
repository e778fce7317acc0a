"""Which learning rate suits subsets of each size, before a sweep trains all of them at one.

SWEEP/rates/NAME/    a short run: the first subset of a size, with one factor of all learning rates

Validated on a part of the training clips that these runs leave out, never on the questions that score the sweep.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from featurestore.clips import Sample
from mervcache.errors import NonFiniteError, UserError
from trainer.ablation.execute import PinnedSweep, shared_llm
from trainer.ablation.sweep import RETRAINED, SweepRun, scale_rates
from trainer.config import TrainConfig
from trainer.data.order import derive_seed
from trainer.data.tokens import TokenSource
from trainer.loop.stages import train_stages
from trainer.recipes import Stage, Stages
from trainer.runs.run_record import read_metrics
from trainer.runs.stage_folders import last_stage
from trainer.sources import OpenTokens, opened

FOLDER = "rates"
CHECK_SPLIT = "rate-check"  # of the training clips that are left out
CHECK_SHARE = 0.1  # of the training videos
ONLY_AT_THE_END = 10**9  # steps between validations

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RateResult:
    """One short run."""

    encoders: tuple[str, ...]
    factor: float
    run: str
    steps: int
    val_loss: float | None  # None: not finite, or the run did not end
    error: str = ""


def check_rates(sweep: PinnedSweep, factors: Sequence[float], *, share: float) -> list[RateResult]:
    """Train the first subset of each size with each factor, for a share of the steps, each with a schedule of its own.

    Runs that are done are not repeated. A stop signal ends the check; what is done until then is returned.
    """
    if odd := [factor for factor in factors if factor <= 0]:
        raise UserError(f"--check-rates are factors of the learning rates, above 0; got {odd[0]}")
    llm, results = shared_llm(sweep), []
    for run in first_of_each_size(sweep.runs):
        for factor in factors:
            folder = sweep.out / FOLDER / f"{run.name}__factor{factor:g}__share{share:g}"
            log.info(f"{'+'.join(run.encoders)} with learning rates x {factor:g}")
            found = RateResult(encoders=run.encoders, factor=factor, run=str(folder), steps=0, val_loss=None)
            try:
                with opened(sweep.store) as open_tokens:
                    done = train_stages(
                        shortened(scale_rates(run.stages, factor), share),
                        _held_back_from(open_tokens),
                        folder,
                        store=sweep.store,
                        resume=True,
                        llm=llm,
                    )[-1]
            except NonFiniteError as error:
                results.append(replace(found, error=str(error)))
                continue
            if done.steps < done.num_steps:
                return results
            row = read_metrics(last_stage(Path(folder)))[-1]
            results.append(replace(found, steps=done.steps, val_loss=row.get("val_loss")))
            gc.collect()  # accelerate ties a model to itself
    return results


def _held_back_from(open_tokens: OpenTokens) -> OpenTokens:
    def open_held_back(config: TrainConfig, run: Path | None) -> tuple[list[Sample], TokenSource]:
        samples, source = open_tokens(config, run)
        return held_back(samples, config.split, config.seed), source

    return open_held_back


def first_of_each_size(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """The first run that has 1, 2, ... encoders."""
    found: dict[int, SweepRun] = {}
    for run in runs:
        if run.encoders and run.method == RETRAINED:
            found.setdefault(len(run.encoders), run)
    if not found:
        raise UserError("no run of this sweep has encoders, so there is no rate to check")
    return [found[size] for size in sorted(found)]


def shortened(stages: Stages, share: float) -> Stages:
    """The stages with a share of their steps, the last one validated at its end."""

    def short(stage: Stage, *, is_last: bool) -> Stage:
        config = stage.config
        length = {"epochs": config.epochs * share}
        if config.max_steps is not None:
            length = {"max_steps": max(1, ceil(config.max_steps * share))}
        validation = {"eval_every": ONLY_AT_THE_END if is_last else None, "eval_split": CHECK_SPLIT}
        return replace(stage, config=replace(config, **length, **validation))

    return tuple(short(stage, is_last=stage is stages[-1]) for stage in stages)


def held_back(samples: Sequence[Sample], split: str, seed: int) -> list[Sample]:
    """The samples, with those about a part of the training videos in the split `rate-check`; spans share a video."""

    found = (_video(sample) for sample in samples if sample.split == split)
    videos = {video for video in found if video is not None}
    if len(videos) < 2:
        raise UserError(f"a rate check leaves some training videos out, and there are {len(videos)} of split {split!r}")
    drawn = sorted(videos, key=lambda video: (derive_seed(CHECK_SPLIT, seed, video), video))
    held = set(drawn[: ceil(CHECK_SHARE * len(drawn))])
    return [
        replace(sample, split=CHECK_SPLIT) if sample.split == split and _video(sample) in held else sample
        for sample in samples
    ]


def _video(sample: Sample) -> str | None:
    """The media of a sample's clip, without its span."""
    return None if sample.clip_id is None else sample.clip_id.partition("#")[0]


def best_by_size(results: Sequence[RateResult]) -> dict[int, float]:
    """Number of encoders -> the factor with the lowest validation loss; sizes without a finite loss are left out."""
    best: dict[int, tuple[float, RateResult]] = {}
    for result in results:
        size = len(result.encoders)
        if result.val_loss is not None and (size not in best or result.val_loss < best[size][0]):
            best[size] = (result.val_loss, result)
    return {size: result.factor for size, (_, result) in best.items()}

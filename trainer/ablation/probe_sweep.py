"""Rank correlation of probes with the retrained runs of a sweep, over subsets of encoders.

Probes and runs answer different things about different clips, so the two are drawn independently: intervals cover the
videos of both, and the seeds of the runs.

K subsets, S seeds, B draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from trainer.ablation.document import Cell, Estimate, NotComputed
from trainer.ablation.panel import ACCURACY, Panel, Study
from trainer.ablation.probe_features import Readout
from trainer.ablation.results import RETRAINED, Results, Subset, subset_name
from trainer.ablation.statistics import (
    Draws,
    Floats,
    Resampling,
    mean_correlation,
    percentile_interval,
    spearman,
)
from trainer.data.order import derive_seed

LEAST_RANKED = 3


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How probes rank subsets against how retrained runs of one setting do."""

    probe: str
    reads: str
    setting: str
    subsets: tuple[str, ...]  # ranked
    without: tuple[str, ...]  # that only one of the two has
    seeds: tuple[int, ...]
    spearman: Cell  # with the mean over seeds
    single: Cell  # mean over seeds of the correlation with one seed
    ceiling: Cell  # mean over pairs of seeds of the correlation between two


def compare_with_sweep(
    scores: Draws,
    places: Mapping[Readout, Mapping[Subset, int]],  # of each probe in `scores`
    results: Results,
    *,
    draws: int,
    seed: int,
) -> tuple[Agreement, ...]:
    """One row per probe and setting of the sweep."""
    videos = np.unique(results.questions.videos, return_inverse=True)[1]
    resampling = Resampling(videos, draws=draws, seed=derive_seed("probes of a sweep", seed))
    study = Study(results=results, resampling=resampling)
    panels = study.panels(RETRAINED, ACCURACY)
    found = []
    for readout, place in places.items():
        by_members = {frozenset(subset): k for subset, k in place.items()}
        for setting, panel in panels.items():
            scored = [subset for subset in panel.keys if subset]
            shared = [subset for subset in scored if frozenset(subset) in by_members]
            columns = {subset: by_members[frozenset(subset)] for subset in shared}
            names = {subset_name(subset) for subset in scored if subset not in shared}
            in_sweep = {frozenset(subset) for subset in scored}
            names |= {subset_name(subset) for subset in place if frozenset(subset) not in in_sweep}
            found.append(_compare(scores, columns, panel, resampling, readout, str(setting), names))
    return tuple(found)


def _compare(
    scores: Draws,
    columns: Mapping[Subset, int],
    panel: Panel,
    resampling: Resampling,
    readout: Readout,
    setting: str,
    without: set[str],
) -> Agreement:
    choice = panel.choose(columns)
    subsets = [subset for subset in columns if subset in choice.keys]
    without = without | {subset_name(subset) for subset in columns if subset not in choice.keys}
    if len(subsets) < LEAST_RANKED:
        reason = NotComputed(f"{len(subsets)} sets of encoders are probed and retrained, {LEAST_RANKED} are needed")
        cells: list[Cell] = [reason] * 3
    else:
        cells = _correlations(scores, [columns[subset] for subset in subsets], panel, subsets, choice.seeds, resampling)
    return Agreement(
        probe=readout.probe,
        reads=str(readout),
        setting=setting,
        subsets=tuple(map(subset_name, subsets)),
        without=tuple(sorted(without)),
        seeds=choice.seeds,
        spearman=cells[0],
        single=cells[1],
        ceiling=cells[2],
    )


def _correlations(
    scores: Draws,
    probes: Sequence[int],
    panel: Panel,
    subsets: Sequence[Subset],
    seeds: tuple[int, ...],
    resampling: Resampling,
) -> list[Cell]:
    value_SKQ = panel.stack(subsets, seeds)
    means = resampling(value_SKQ)
    by_seed = resampling(value_SKQ.reshape(1, -1, value_SKQ.shape[-1]))
    shape = (len(seeds), len(subsets))
    estimate_SK, draws_BSK = by_seed.estimate_K.reshape(shape), by_seed.draws_BK.reshape(-1, *shape)
    probe_K, probe_BK = scores.estimate_K[probes], scores.draws_BK[:, probes]
    alone = [(0, index) for index in range(len(seeds))]
    pairs = list(combinations(range(len(seeds)), 2))
    cells = [
        _cell(spearman(probe_K, means.estimate_K), spearman(probe_BK, means.draws_BK), seeds),
        _cell(
            mean_correlation(probe_K[None], estimate_SK, alone, spearman),
            mean_correlation(probe_BK[:, None], draws_BSK, alone, spearman),
            seeds,
        ),
    ]
    if not pairs:
        return [*cells, NotComputed("one seed: a ceiling needs two")]
    estimate, draws_B = (mean_correlation(each, each, pairs, spearman) for each in (estimate_SK, draws_BSK))
    return [*cells, _cell(estimate, draws_B, seeds)]


def _cell(value: Floats, draws_B: Floats, seeds: tuple[int, ...]) -> Cell:
    if np.isnan(value):
        return NotComputed("all sets of encoders have one score: there is no ranking")
    if np.isnan(draws_B).any():  # draws without a ranking: the value stands without an interval
        return Estimate(value=float(value), seeds=seeds)
    low, high = percentile_interval(draws_B)
    return Estimate(value=float(value), low=float(low), high=float(high), seeds=seeds)

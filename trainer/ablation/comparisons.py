"""Comparisons: settings along one axis (fusion, projector, tokens per frame), and methods by rank correlation."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np

from trainer.ablation.document import Cell, Column, Estimate, NotComputed, Section
from trainer.ablation.panel import Metric, Panel, Study, estimates
from trainer.ablation.results import SUBSET_BLOCKS, VISUAL_SETTING, Setting, Subset, subset_name
from trainer.ablation.statistics import (
    Floats,
    kendall,
    mean_correlation,
    pareto_set,
    percentile_interval,
    spearman,
)

GRID = "tokens_per_frame"
REFERENCES = {"fusion": "cross_attention", "projector": "2d-average", GRID: 64, "rate": 1.0}  # the paper's
LEAST_RANKED = 3  # subsets of a rank correlation
FIRST_SEEDS = "Spearman between seeds of the first"  # the ceiling


def axis(study: Study, metric: Metric, panels: Mapping[Setting, Panel], name: str) -> Section | None:
    """Rows that differ in one setting only, against the reference; None where nothing does.

    Of all encoders, or where these differ in nothing, of every subset.
    """
    groups: dict[tuple[Setting, Subset], Panel] = {}
    for setting, panel in panels.items():
        for subset in filter(None, panel.keys):
            groups.setdefault((setting.without(name), subset), Panel()).add_from(panel, subset, setting.get(name))
    groups = {place: group for place, group in groups.items() if len(group.keys) > 1}
    groups = {place: group for place, group in groups.items() if place[1] == study.encoders} or groups
    if not groups:
        return None
    title = name.replace("_", " ")
    rows: list[tuple[Cell, ...]] = []
    notes: list[str] = []
    for (setting, subset), group in groups.items():
        choice = group.choose(group.keys)
        notes += group.left_out(group.keys, choice, f"{title} of {subset_name(subset)}")
        known = [key for key in group.keys if key in choice.keys]
        reference = REFERENCES[name] if REFERENCES.get(name) in known else next(iter(known), None)
        levels = study.resample(group, known, choice.seeds)
        differences: dict[Hashable, Cell] = {}
        if others := [key for key in known if key != reference]:
            value_SKQ = group.stack([reference, *others], choice.seeds)
            found = study.resampling(value_SKQ[:, 1:] - value_SKQ[:, :1])
            differences = dict(zip(others, estimates(found, choice.seeds, tested=True), strict=True))
            notes.append(f"Differences are to {_text(reference)}, paired by question and seed.")
        front = _front(levels) if name == GRID else {}
        for key in sorted(group.keys, key=_order):
            reason = group.why_not([key], choice)
            row = [str(setting), subset_name(subset), _text(key), levels.get(key) or reason]
            row += [differences.get(key) or reason]
            row += [front.get(key)] if name == GRID else []
            rows.append(tuple(row))
    columns = [Column(name="setting"), Column(name="encoders"), Column(name=title)]
    columns += [Column(name=metric.name, unit=metric.level), Column(name="difference", unit=metric.difference)]
    columns += [Column(name="on the Pareto front", unit="flag")] if name == GRID else []
    notes = list(dict.fromkeys(notes))
    return Section(title=title.capitalize(), columns=tuple(columns), rows=tuple(rows), notes=tuple(notes))


def token_matched(
    study: Study,
    block: str,
    metric: Metric,
    panels: Mapping[Setting, Panel],
    tokens: Mapping[tuple[Setting, Subset], int],
) -> Section | None:
    """Runs of several encoders against runs that give the LLM as many visual tokens; None without any.

    Controls are one of the run's own encoders alone, at any fusion, projector and grid, and the same encoders by
    another fusion at another grid: what several encoders are worth apart from the tokens that they add. Rows are of all
    encoders, or where there are none, of every subset.
    """
    placed = {(setting, subset): panel for setting, panel in panels.items() for subset in filter(None, panel.keys)}
    several = [place for place in placed if len(place[1]) > 1 and place in tokens]
    several = [place for place in several if place[1] == study.encoders] or several
    if not any(_is_control(place, other) for place in several for other in placed):
        return None  # whatever their tokens: a run of its own, which nothing could be compared with
    rows: list[tuple[Cell, ...]] = []
    notes: list[str] = []
    for place in several:
        setting, subset = place
        controls = [other for other in placed if tokens.get(other) == tokens[place] and _is_control(place, other)]
        if not controls:
            reason = NotComputed(
                f"no run of one of its encoders has {tokens[place]:,} visual tokens; --grids adds numbers of tokens"
            )
            rows.append((str(setting), subset_name(subset), tokens[place], None, reason, reason, reason))
        for control in controls:
            pair = Panel()
            for key in (place, control):
                pair.add_from(placed[key], key[1], key)
            choice = pair.choose([place, control])
            label = f"{subset_name(control[1])}{f' ({control[0]})' * (control[0] != setting)}"
            head = (str(setting), subset_name(subset), tokens[place], label)
            if reason := pair.why_not([place, control], choice):
                rows.append((*head, reason, reason, reason))
                continue
            notes += pair.left_out([place, control], choice, f"{subset_name(subset)} against {label}")
            levels = study.resample(pair, [place, control], choice.seeds)
            value_SKQ = pair.stack([place, control], choice.seeds)
            (difference,) = estimates(study.resampling(value_SKQ[:, :1] - value_SKQ[:, 1:]), choice.seeds, tested=True)
            rows.append((*head, levels[place], levels[control], difference))
    columns = (
        Column(name="setting"),
        Column(name="encoders"),
        Column(name="visual tokens", unit="count"),
        Column(name="control of as many tokens"),
        Column(name=metric.name, unit=metric.level),
        Column(name=f"{metric.name} of the control", unit=metric.level),
        Column(name="difference", unit=metric.difference),
    )
    return Section(
        title="Token-matched control", columns=columns, rows=tuple(rows), notes=tuple(dict.fromkeys(notes)), block=block
    )


def _is_control(place: tuple[Setting, Subset], other: tuple[Setting, Subset]) -> bool:
    """Whether the two differ in nothing but what a control of as many tokens may differ in."""
    (setting, subset), (its_setting, its_subset) = place, other
    if setting.without(*VISUAL_SETTING) != its_setting.without(*VISUAL_SETTING):
        return False
    if len(its_subset) == 1:
        return its_subset[0] in subset
    grids = setting.get(GRID), its_setting.get(GRID)
    return its_subset == subset and setting.get("fusion") != its_setting.get("fusion") and grids[0] != grids[1]


def _front(levels: Mapping[Any, Cell]) -> dict[Any, str]:
    """Whether a number of tokens is on the Pareto front of tokens and score."""
    points = {key: cell.value for key, cell in levels.items() if key is not None and isinstance(cell, Estimate)}
    return {
        key: "yes" if is_on else "no"
        for key, is_on in zip(points, pareto_set(list(points), list(points.values())), strict=True)
    }


def _order(key: Any) -> tuple[int, float]:
    """Numbers by size, behind the stored grid; names as the sweep has them."""
    return (0, 0) if key is None else (1, key) if isinstance(key, int | float) else (1, 0)


def _text(key: Any) -> str:
    return "as stored" if key is None else str(key)


def agreement(study: Study, metric: Metric) -> Section:
    """Rank correlation of the subsets' scores by two methods, with what retraining with another seed reaches."""
    by_block = {block: study.panels(block, metric) for block in SUBSET_BLOCKS}
    rows: list[tuple[Cell, ...]] = []
    notes: list[str] = []
    for one, other in combinations(SUBSET_BLOCKS, 2):
        for setting in [setting for setting in by_block[one] if setting in by_block[other]]:
            if not (by_block[one][setting].values and by_block[other][setting].values):
                continue
            first, second = by_block[one][setting], by_block[other][setting]
            subsets = [subset for subset in study.subsets if subset]
            in_both = first.choose(subsets).keys & second.choose(subsets).keys
            shared = [subset for subset in subsets if subset in in_both]
            label = (str(setting), f"{one} and {other}", str(len(shared)))
            if len(shared) < LEAST_RANKED:
                reason = NotComputed(f"{len(shared)} subsets have answers by both, {LEAST_RANKED} are needed")
                rows.append((*label, reason, reason, reason, reason))
                continue
            rows.append((*label, *_correlations(first, second, shared, study)))
            if absent := [subset_name(subset) for subset in subsets if subset not in shared]:
                notes.append(f"{one} and {other} ({setting}): without {', '.join(absent)}.")
    if rows:
        notes.append(
            "Text-only is not ranked. The first two columns rank means over seeds; the last two are means over pairs of"
            " different seeds, and comparable with each other. Draws add noise to both rankings: intervals lie low."
        )
    names = ("Spearman", "Kendall", "Spearman of single seeds", FIRST_SEEDS)
    columns = [Column(name=name) for name in ("setting", "methods", "subsets")]
    columns += [Column(name=name, unit="number") for name in names]
    return Section(
        title="Agreement of the methods",
        metric=metric.name,
        columns=tuple(columns),
        rows=tuple(rows),
        notes=tuple(dict.fromkeys(notes)),
    )


def _correlations(one: Panel, other: Panel, subsets: Sequence[Subset], study: Study) -> list[Cell]:
    """Spearman and Kendall of means over common seeds, Spearman of single seeds, and the ceiling of the latter.

    Single seeds are those of each method, and pairs are of different ones: a masked checkpoint is the retrained run of
    its seed.
    """
    one_seeds, other_seeds = one.choose(subsets).seeds, other.choose(subsets).seeds
    common = tuple(seed for seed in one_seeds if seed in other_seeds)
    cells: list[Cell] = [NotComputed("the methods have no seed in common")] * 2
    if common:
        first, second = (study.resampling(panel.stack(subsets, common)) for panel in (one, other))
        cells = [
            _correlation(
                function(first.estimate_K, second.estimate_K), function(first.draws_BK, second.draws_BK), common
            )
            for function in (spearman, kendall)
        ]
    first, second = _by_seed(study, one, subsets, one_seeds), _by_seed(study, other, subsets, other_seeds)

    def mean(first: _Pair, second: _Pair, pairs: list[tuple[int, int]], lacking: str) -> Cell:
        if not pairs:
            return NotComputed(lacking)
        value, draws_B = (mean_correlation(a, b, pairs, spearman) for a, b in zip(first, second, strict=True))
        return _correlation(value, draws_B, tuple(sorted({*one_seeds, *other_seeds})))

    places = product(range(len(one_seeds)), range(len(other_seeds)))
    different = [(a, b) for a, b in places if one_seeds[a] != other_seeds[b]]
    cells.append(mean(first, second, different, "the methods have no two different seeds"))
    ceiling = list(combinations(range(len(one_seeds)), 2))
    return [*cells, mean(first, first, ceiling, "one seed: a ceiling needs two")]


_Pair = tuple[Floats, Floats]  # estimates and draws


def _by_seed(study: Study, panel: Panel, subsets: Sequence[Subset], seeds: tuple[int, ...]) -> _Pair:
    """Scores [S, K] of every seed, and draws [B, S, K] over videos."""
    value_SKQ = panel.stack(subsets, seeds)
    found = study.resampling(value_SKQ.reshape(1, -1, value_SKQ.shape[-1]))
    shape = (len(seeds), len(subsets))
    return found.estimate_K.reshape(shape), found.draws_BK.reshape(-1, *shape)


def _correlation(value: Floats, draws_B: Floats, seeds: tuple[int, ...]) -> Cell:
    if np.isnan(value):
        return NotComputed("all subsets have one score: there is no ranking")
    if np.isnan(draws_B).any():  # draws without a ranking: the value stands without an interval
        return Estimate(value=float(value), seeds=seeds)
    low, high = percentile_interval(draws_B)
    return Estimate(value=float(value), low=float(low), high=float(high), seeds=seeds)

"""Tables of one block and metric about encoders: scores of subsets, importance of each encoder, the gap, pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from trainer.ablation.document import Cell, Column, Estimate, NotComputed, Section
from trainer.ablation.panel import ACCURACY, Metric, Panel, Study, estimates, seeds_text
from trainer.ablation.results import POST_HOC, RETRAINED, VISUAL_SETTING, Setting, Subset, subset_name
from trainer.ablation.statistics import (
    Draws,
    Floats,
    information_gap,
    interactions,
    pairs_of,
    shapley_values,
    utilisation,
)

SETTING, ENCODERS = Column(name="setting"), "Encoders"  # a column, and the title of the main table


def scores(study: Study, block: str, metric: Metric, panels: Mapping[Setting, Panel]) -> Section:
    """A row per setting and subset, each over the seeds that it has."""
    rows: list[tuple[Cell, ...]] = []
    notes: list[str] = []
    unreadable, shown = _unreadable(study, block), set()
    for setting, panel in panels.items():
        order = [subset for subset in sorted(study.subsets, key=len) if subset in panel.keys]
        means: dict = {}
        for seeds in dict.fromkeys(map(panel.seeds_of, order)):
            means |= study.resample(panel, [subset for subset in order if panel.seeds_of(subset) == seeds], seeds)
        for subset in order:
            place = _place(block, setting, subset)
            if place in shown:  # text only, which serves several settings
                continue
            shown.add(place)
            cell = means.get(subset) or panel.why_not([subset], panel.choose([subset]))
            row = [str(place[0]), subset_name(subset), seeds_text(panel.seeds_of(subset)), cell]
            if metric is ACCURACY:
                row += [unreadable.get(place), study.results.questions.chance]
            rows.append(tuple(row))
            if subset in means and (lacking := panel.missing.get(subset)):
                reasons = "; ".join(f"seed {seed}: {reason}" for seed, reason in lacking.items())
                notes.append(f"{subset_name(subset)}: of seed {seeds_text(panel.seeds_of(subset))} only ({reasons}).")
    columns = [SETTING, Column(name="encoders"), Column(name="seeds"), Column(name=metric.name, unit=metric.level)]
    if metric is ACCURACY:
        columns += [Column(name="unreadable", unit="share"), Column(name="chance", unit="share")]
    return Section(title="Scores", columns=tuple(columns), rows=tuple(rows), notes=tuple(dict.fromkeys(notes)))


def _place(block: str, setting: Setting, subset: Subset) -> tuple[Setting, Subset]:
    """Where the answers of a row come from: text-only runs serve several settings."""
    return (setting.without(*VISUAL_SETTING) if block == RETRAINED and not subset else setting, subset)


def _unreadable(study: Study, block: str) -> dict[tuple[Setting, Subset], float]:
    """Share of answers that name no option, over all seeds."""
    found: dict[tuple[Setting, Subset], list[float]] = {}
    for member, answers in study.results.answers.items():
        if member.block == block:
            place = _place(block, member.setting, member.subset)
            found.setdefault(place, []).append(float(answers.is_unreadable_Q.mean()))
    return {place: sum(shares) / len(shares) for place, shares in found.items()}


def importance(study: Study, block: str, metric: Metric, panels: Mapping[Setting, Panel]) -> list[Section]:
    """Tables of encoders, of the gap between their rates, and of pairs of encoders.

    Of settings with several subsets: the others are compared along their axis. A utilisation rate divides by the score,
    so it is of accuracy only: a margin has no natural zero.
    """
    drop_name = "Drop when masked" if block == POST_HOC else "Necessity"
    has_rates = metric is ACCURACY and block != RETRAINED
    encoder_rows, gap_rows, pair_rows = [], [], []
    notes: list[str] = []
    for setting, panel in panels.items():
        if sum(map(bool, panel.keys)) < 2:
            continue
        cells: list[list[Cell]] = []
        if block != POST_HOC:
            alone = [(encoder,) for encoder in study.encoders]
            choice = panel.choose(alone)
            notes += panel.left_out(alone, choice, _about("Capacity", setting))
            means = study.resample(panel, [key for key in alone if key in choice.keys], choice.seeds)
            cells.append([means.get(key) or panel.why_not([key], choice) for key in alone])
        drops, rates, gap = _drops(
            study, panel, notes, _about(f"{drop_name} and CUR" if has_rates else drop_name, setting)
        )
        shapley, pairs = _game(study, panel, notes, _about("Shapley values and interactions", setting))
        cells += [drops, rates, shapley] if has_rates else [drops, shapley]
        encoder_rows += [(str(setting), encoder, *row) for encoder, *row in zip(study.encoders, *cells, strict=True)]
        gap_rows += [(str(setting), *gap)] if has_rates else []
        pair_rows += [
            (str(setting), f"{study.encoders[i]}+{study.encoders[j]}", cell)
            for (i, j), cell in zip(pairs_of(len(study.encoders)), pairs, strict=True)
        ]
    columns = [SETTING, Column(name="encoder")]
    columns += [] if block == POST_HOC else [Column(name="Capacity", unit=metric.level)]
    columns += [Column(name=drop_name, unit=metric.difference)]
    columns += [Column(name="CUR", unit="number")] if has_rates else []
    columns += [Column(name="Shapley value", unit=metric.difference)]
    gaps = [
        Column(name=name, unit="number") for name in ("Information Gap", "mean if all are equal", "95th percentile")
    ]
    pair_columns = (SETTING, Column(name="pair"), Column(name="Shapley interaction index", unit=metric.difference))
    return [
        Section(
            title=ENCODERS,
            columns=tuple(columns),
            rows=tuple(encoder_rows),
            notes=tuple(dict.fromkeys(notes)),
        ),
        Section(title="Information Gap", columns=(SETTING, *gaps), rows=tuple(gap_rows)),
        Section(title="Pairwise interactions", columns=pair_columns, rows=tuple(pair_rows)),
    ]


def _drops(study: Study, panel: Panel, notes: list[str], about: str) -> tuple[list[Cell], list[Cell], list[Cell]]:
    """Of every encoder the drop without it and its utilisation rate, and the row of the gap between the rates."""
    whole = study.encoders
    without = [tuple(other for other in whole if other != encoder) for encoder in whole]
    choice = panel.choose([whole, *without])
    notes += panel.left_out([whole, *without], choice, about)
    reasons = [panel.why_not([whole, key], choice) for key in without]
    known = [key for key, reason in zip(without, reasons, strict=True) if reason is None]
    if not known:
        return [*reasons], [*reasons], [reasons[0], None, None]
    value_SKQ = panel.stack([whole, *known], choice.seeds)
    level = study.resampling(value_SKQ[:, :1])
    drop = study.resampling(value_SKQ[:, :1] - value_SKQ[:, 1:])
    drops = _fill(reasons, estimates(drop, choice.seeds, tested=True))
    if level.estimate_K[0] <= 0:
        zero = NotComputed("the score of all encoders is not above 0")
        return drops, [reason or zero for reason in reasons], [zero, None, None]
    rate = utilisation(level, drop)
    rates = _fill(reasons, estimates(rate, choice.seeds))
    if lacking := next((reason for reason in reasons if reason), None):
        return drops, rates, [lacking, None, None]
    gap = information_gap(rate)
    cell = Estimate(value=gap.value, low=gap.low, high=gap.high, p=gap.p, seeds=choice.seeds)
    return drops, rates, [cell, gap.null_mean, gap.null_high]


def _game(study: Study, panel: Panel, notes: list[str], about: str) -> tuple[list[Cell], list[Cell]]:
    """Shapley values and pairwise interactions, which need every subset."""
    choice = panel.choose(study.subsets)
    notes += panel.left_out(study.subsets, choice, about)
    if reason := panel.why_not(study.subsets, choice):
        return [reason] * len(study.encoders), [reason] * len(pairs_of(len(study.encoders)))
    levels = study.resampling(panel.stack(study.subsets, choice.seeds))

    def of(function: Callable[[Floats], Floats]) -> list[Cell]:
        found = Draws(estimate_K=function(levels.estimate_K), draws_BK=function(levels.draws_BK))
        return estimates(found, choice.seeds)

    return of(shapley_values), of(interactions)


def _fill(reasons: Sequence[NotComputed | None], cells: Iterable[Cell]) -> list[Cell]:
    """The reasons, with the cells in the places without one."""
    remaining = iter(cells)
    return [reason or next(remaining) for reason in reasons]


def _about(what: str, setting: Setting) -> str:
    return f"{what} ({setting})" if str(setting) else what

"""The parts of a report that are drawn: scores, lattices, categories of questions, learning curves, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mervcache.page import Markup, escaped, note, table
from trainer.ablation.costs_table import SweepCosts
from trainer.ablation.document import Estimate, NotComputed, Section
from trainer.ablation.figures import (
    LARGEST,
    NUM_COLOURS,
    Costed,
    Score,
    by_size,
    chips,
    cost_plot,
    heat_table,
    lattice,
    legend,
    percent,
    score_rows,
    short,
    size_legend,
    swatches,
)
from trainer.ablation.flops import NOT_COUNTED, Cost
from trainer.ablation.plots import Curve, curves
from trainer.ablation.render import HEADINGS, column_heading
from trainer.ablation.results import BLOCKS, POST_HOC, Results, Subset, subset_name
from trainer.ablation.statistics import LEVEL
from trainer.ablation.subject import Subject
from trainer.ablation.sweep import NESTED, ONE_SHOT, RETRAINED
from trainer.runs.run_record import read_metrics

MEANING = {
    POST_HOC: "It was trained on all of them: this shows what it relies on, not what a run of fewer reaches.",
    ONE_SHOT: "One checkpoint had to learn all subsets: a run of its own may do better at each.",
    NESTED: "One checkpoint had to learn all numbers of tokens: a run of its own may do better at each.",
}
MIN_LATTICE = 4  # subsets with scores from which on a lattice says something
OPEN_ROWS = 24  # longer tables are folded
NAMED_CURVES = 8  # runs with a colour of their own; more are coloured by their number of encoders


def methods_of(subject: Subject) -> dict[str, str]:
    """Block -> what it is called on the page: one run was trained, not retrained."""
    return {block: "as trained" if block == RETRAINED and not subject.is_sweep else block for block in BLOCKS}


def scores_part(subject: Subject, results: Results, scores: Sequence[Score]) -> Markup:
    """A row per subset, and of one run its baselines."""
    about = f"Accuracy in percent and intervals of {LEVEL:.0%}; the dashed line is chance. Point at a mark to read it."
    parts: list[str] = [note(about)]
    masked = dict.fromkeys(score.block for score in scores if score.block != RETRAINED)
    parts += [note(f"{HEADINGS[block]}. {MEANING[block]}") for block in masked]
    parts.append(legend(results.encoders, scores))
    others = _baselines(subject)
    parts.append(score_rows(scores, results.encoders, chance=results.questions.chance, others=others))
    return Markup("".join(parts))


def _baselines(subject: Subject) -> dict[str, float]:
    """Accuracy of the runs that a run was scored alongside."""
    beside = subject.scores["beside"] if subject.scores else {}
    return {
        f"baseline {Path(name).name}": row["accuracy"]
        for name, rows in beside.items()
        for row in rows
        if row["category"] == "all"
    }


def lattices_part(scores: Sequence[Score], encoders: Subset) -> Markup:
    """A lattice per method and setting that has several subsets, the first one open."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.block, score.setting), []).append(score)
    drawn = []
    for (block, setting), found in groups.items():
        method = found[0].method
        if block == RETRAINED and setting:  # text only has no setting, and is in all lattices
            have = {score.subset for score in found}
            found = found + [s for s in scores if s.block == block and not s.subset and s.subset not in have]
        if sum(score.estimate is not None for score in found) >= MIN_LATTICE:
            drawn.append((f"{method}{', ' * bool(setting)}{setting}", lattice(found, encoders)))
    if not drawn:
        return Markup("")
    about = note(
        "A node is a subset with its accuracy in percent: all encoders above, none below; more colour is better. A line"
        " adds one encoder: the thicker, the more that changes; dashed where the score falls. Differences within the"
        " intervals above are noise."
    )
    (title, first), *more = drawn
    parts = [about, legend(encoders), f"<h3>{escaped(title)}</h3>{first}"]
    parts += [f"<details><summary>{escaped(title)}</summary>{picture}</details>" for title, picture in more]
    return Markup("".join(parts))


def categories_part(results: Results, methods: Mapping[str, str]) -> Markup:
    """A row per method, setting and subset, a column per category: means over seeds."""
    names = sorted(set(results.questions.categories))
    if len(names) < 2:
        return Markup("")
    asked = np.array(results.questions.categories)
    columns = [asked == name for name in names]
    chance_Q = 1 / np.array(results.questions.num_options)
    credits: dict[tuple[str, str, Subset], list[np.ndarray]] = {}
    members = sorted(results.answers, key=lambda member: by_size(member.subset, results.encoders))
    for member in members:
        key = (member.block, str(member.setting), member.subset)
        credits.setdefault(key, []).append(results.answers[member].credit_Q)
    settings = {setting for _, setting, subset in credits if subset}
    about = "Accuracy in percent, mean over seeds; more colour is further above chance. Few questions make much noise."
    parts: list[str] = [note(about), legend(results.encoders)]
    tables: list[tuple[str, Markup, int]] = []
    for block in BLOCKS:
        rows = []
        for (of, setting, subset), found in credits.items():
            if of == block:
                where = f" <span class='quiet'>{escaped(setting)}</span>" if len(settings) > 1 and subset else ""
                label = f"{chips(subset, results.encoders)} <span>{escaped(subset_name(subset))}</span>{where}"
                credit_Q = np.mean(found, axis=0)
                rows.append((Markup(label), [float(credit_Q[column].mean()) for column in columns]))
        if rows:
            heads = [f"{name or 'none'} ({column.sum():,})" for name, column in zip(names, columns, strict=True)]
            drawn = heat_table(heads, rows, [float(chance_Q[column].mean()) for column in columns])
            tables.append((methods[block], drawn, len(rows)))
    if len(tables) == 1 and tables[0][2] <= OPEN_ROWS:
        return Markup("".join([*parts, tables[0][1]]))
    shown = 0
    for title, drawn, number in tables:
        shown += number
        parts.append(folded(title, drawn, is_open=shown <= OPEN_ROWS))
    return Markup("".join(parts))


def curves_part(subject: Subject) -> Markup:
    """Training loss of every run; of one run also what validation gave."""
    rows = {name: read_metrics(folder) for name, folder in subject.curves.items()}
    rows = {name: found for name, found in rows.items() if found}
    if not rows:
        return note("No metrics: nothing was trained here.")
    sizes = {name: len(subject.records[name].shapes) for name in rows} if subject.is_sweep else {}
    many = len(rows) > NAMED_CURVES
    kinds = {name: f"size{min(sizes[name], LARGEST)}" if many else f"e{i}" for i, name in enumerate(rows)}
    drawn = [
        Curve(name=name, kind=kinds[name], points=[(row["step"], row.get("loss")) for row in found], is_smoothed=True)
        for name, found in rows.items()
    ]
    lost = sum(bool(row.get("skipped")) or row.get("loss") is None for found in rows.values() for row in found)
    key = size_legend(sizes.values()) if many else swatches({kind: name for name, kind in kinds.items()})
    parts = [
        note("Training loss: means of stretches of steps" + ("" if len(drawn) > 1 else "; faint, every step") + "."),
        key if len(drawn) > 1 else "",
        curves(drawn, label="Training loss over steps", x_name="step", y_text="{:g}".format),
    ]
    if lost:
        parts.append(f"<p class='warn'>{lost:,} steps changed nothing: their loss or gradient was not finite.</p>")
    for metric in sorted({name for found in rows.values() for row in found for name in row if name.startswith("val_")}):
        points = {name: [(r["step"], r[metric]) for r in found if metric in r] for name, found in rows.items()}
        drawn = [Curve(name=name, kind=kinds[name], points=found) for name, found in points.items() if found]
        if any(value is not None for curve in drawn for _, value in curve.points):
            parts += [
                f"<h3>{escaped(metric)}</h3>",
                curves(drawn, height=160, label=metric, x_name="step", y_text="{:g}".format),
            ]
    return Markup("".join(parts))


def costs_part(results: Results, scores: Sequence[Score], costs: SweepCosts) -> Markup:
    """Pareto plots of visual tokens and of FLOPs, and a table; of answers that cost what the run's settings say."""
    by_label = {(block, str(setting), subset): row.cost for (block, setting, subset), row in costs.rows.items()}
    if not by_label:
        return Markup("")
    lacking = dict.fromkeys(cost.reason for cost in by_label.values() if isinstance(cost, NotComputed))
    if costs.text_tokens is None:
        return note(f"Not counted: {', '.join(lacking)}.")
    places = {s: by_label.get((s.block, s.setting, s.subset)) for s in scores if s.estimate}
    found = {score: cost for score, cost in places.items() if isinstance(cost, Cost)}
    about = note(
        f"One forward of a sample with {costs.text_tokens:,} text tokens besides the visual ones. Encoders ran once,"
        " when the store was made, and are not counted."
    )
    counted = f"<details><summary>What is counted</summary>{note(NOT_COUNTED)}</details>"
    parts: list[str] = [about, counted, *(f"<p class='warn'>Not counted: {escaped(reason)}</p>" for reason in lacking)]
    numbers: dict[str, dict[Score, str]] = {}
    for unit, cost_of in (
        ("visual tokens", lambda cost: cost.visual_tokens),
        ("FLOPs per sample", lambda cost: cost.flops),
    ):
        points = [Costed(score=score, cost=cost_of(cost)) for score, cost in found.items()]
        free = [point.score for point in points if not point.score.subset]
        points = [point for point in points if point.score.subset]
        if len({point.cost for point in points}) < 2:
            if len(points) > 1:
                parts.append(note(f"{short(points[0].cost)} {unit} in every run with encoders: there is no plot."))
            continue
        plot, numbers[unit] = cost_plot(points, unit=unit, without=free)
        key = size_legend(len(point.score.subset) for point in points if point.score not in numbers[unit])
        parts.append(f"<h3>{escaped(f'Accuracy (%) against {unit}')}</h3>{key}{plot}")
    if numbers:
        parts.append(note("Numbered points are on the Pareto front: nothing is better for as little."))
    several = len({score.method for score in found}) > 1
    rows = [
        (
            *([score.method] if several else []),
            score.setting,
            Markup(f"{chips(score.subset, results.encoders)} {escaped(subset_name(score.subset))}"),
            f"{cost.visual_tokens:,}",
            short(cost.flops),
            short(cost.parameters),
            percent(score.estimate),
            *(numbered.get(score, "") for numbered in numbers.values()),
        )
        for score, cost in found.items()
    ]
    labels = [*(["method"] if several else []), "setting", "encoders"]
    values = ["visual tokens", "FLOPs", "parameters", "accuracy (%)", *(f"front of {unit}" for unit in numbers)]
    right = range(len(labels), len(labels) + len(values))
    parts.append(folded("Costs", table([*labels, *values], rows, right=right), is_open=not numbers))
    return Markup("".join(parts))


def section_plot(section: Section) -> Markup:
    """The plot of a table that has one: a line for each value of the columns that name lines."""
    if section.plot is None:
        return Markup("")
    names = [column.name for column in section.columns]
    x, y, *lines = (names.index(name) for name in (section.plot.x, section.plot.y, *section.plot.lines))
    points: dict[str, list[tuple[float, float]]] = {}
    for row in section.rows:
        place, cell = row[x], row[y]
        value = cell.value if isinstance(cell, Estimate) else cell
        if isinstance(value, int | float) and isinstance(place, int | float):
            points.setdefault(", ".join(str(row[index]) for index in lines), []).append((place, value))
    kinds = {name: f"e{index % NUM_COLOURS}" for index, name in enumerate(points)}
    drawn = [Curve(name=name, kind=kinds[name], points=sorted(found)) for name, found in points.items()]
    if len({place for curve in drawn for place, _ in curve.points}) < 2:
        return Markup("")
    label = f"{column_heading(section.columns[y])} against {section.plot.x}"
    shown = curves(drawn, label=label, x_name=section.plot.x, y_text="{:g}".format, has_marks=True)
    key = swatches({kind: name for name, kind in kinds.items()})
    return Markup(f"{note(label[0].upper() + label[1:] + '.')}{key}{shown}")


def folded(title: str, content: Markup, *, is_open: bool = False) -> str:
    """Content below its title, which hides and shows it."""
    return f"<details{' open' * is_open}><summary>{escaped(title)}</summary>{content}</details>"

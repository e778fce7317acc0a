"""The figures of a report: scores with intervals, the lattice of subsets, score against cost, learning curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mervcache.page import Markup, escaped
from trainer.ablation.document import Document, Estimate
from trainer.ablation.panel import ACCURACY
from trainer.ablation.plots import TICKS, Scale, axes, figure, line, mark, scale_of, text
from trainer.ablation.results import POST_HOC, Results, Subset, subset_name
from trainer.ablation.statistics import pareto_set
from trainer.ablation.sweep import NESTED, ONE_SHOT, RETRAINED

SHAPES = {RETRAINED: "circle", POST_HOC: "diamond", ONE_SHOT: "square", NESTED: "triangle"}
KINDS = {block: f"method{index}" for index, block in enumerate(SHAPES)}  # classes of the style sheet
NUM_COLOURS = 8  # classes e0 to e7 of the style sheet
LARGEST = 5  # classes size0 to size5: so many encoders, or more
ROW, GAP = 24, 15  # pixels: a row of scores, and between the marks of two methods in it
LEVEL, NODE = 96, 58  # pixels: between two rows of the lattice, and the width of a node
MAX_ROWS = 36  # of scores that are shown unfolded
MAX_NODES = 20  # in a row of the lattice: subsets of 6 encoders; more cannot be read


@dataclass(frozen=True, kw_only=True)
class Score:
    """A row of a table of accuracies."""

    block: str
    method: str  # the block as it is shown
    setting: str
    subset: Subset
    seeds: str
    estimate: Estimate | None  # None: without answers

    @property
    def value(self) -> float:
        """The accuracy of a score that has answers."""
        assert self.estimate is not None
        return self.estimate.value

    @property
    def summary(self) -> str:
        """`dinov2+vivit, retrained: 41.3 [38.0, 44.6] %, seeds 0 1`."""
        return f"{subset_name(self.subset)}, {self.method}: {percent(self.estimate)} %, seed {self.seeds}"


def read_scores(document: Document, results: Results, methods: Mapping[str, str]) -> list[Score]:
    """All accuracies of a table, in its order; `methods` are the names of its blocks."""
    by_name = {subset_name(member.subset): member.subset for member in (*results.answers, *results.missing)}
    found = []
    for section in document.sections:
        if section.title == "Scores" and section.metric == ACCURACY.name:
            for setting, name, seeds, cell, *_ in section.rows:
                found.append(
                    Score(
                        block=section.block,
                        method=methods[section.block],
                        setting=str(setting),
                        subset=by_name[str(name)],
                        seeds=str(seeds),
                        estimate=cell if isinstance(cell, Estimate) else None,
                    )
                )
    return found


def percent(cell: Estimate | None) -> str:
    """`41.3 [38.0, 44.6]`, in percent."""
    if cell is None:
        return "–"
    interval = "" if cell.low is None or cell.high is None else f" [{100 * cell.low:.1f}, {100 * cell.high:.1f}]"
    return f"{100 * cell.value:.1f}{interval}"


def chips(subset: Iterable[str], encoders: Sequence[str]) -> Markup:
    """A square per encoder, filled where the subset has it."""
    subset, squares = set(subset), []
    for index, encoder in enumerate(encoders):
        kind = f"e{index % NUM_COLOURS}" if encoder in subset else "none"
        squares.append(f"<rect x='{12 * index + 0.5}' y='.5' width='9' height='9' rx='2' class='chip {kind}'/>")
    label = escaped(subset_name([e for e in encoders if e in subset]))
    return Markup(
        f"<svg class='chips' role='img' aria-label='{label}' width='{12 * len(encoders)}' height='10'>"
        f"{''.join(squares)}</svg>"
    )


def legend(encoders: Sequence[str], scores: Iterable[Score] = ()) -> Markup:
    """Colours of the encoders and, where scores of several methods are given, marks of these."""
    parts = []
    for index, encoder in enumerate(encoders):
        key = f"<rect x='.5' y='.5' width='9' height='9' rx='2' class='chip e{index % NUM_COLOURS}'/>"
        parts.append(f"<span><svg class='chips' width='10' height='10'>{key}</svg>{escaped(encoder)}</span>")
    methods = {score.block: score.method for score in scores}
    for block, method in methods.items() if len(methods) > 1 else ():
        key = mark("8", 7, KINDS[block], shape=SHAPES[block])
        parts.append(f"<span><svg width='16' height='14'>{key}</svg>{escaped(method)}</span>")
    return Markup(f"<p class='legend'>{''.join(parts)}</p>")


def size_legend(sizes: Iterable[int]) -> Markup:
    """Colours of subsets by their size."""
    found = sorted({min(size, LARGEST) for size in sizes})
    return swatches({f"size{n}": f"{n} encoder{'s'[: n != 1]}" if n else "text only" for n in found})


def swatches(names: Mapping[str, str]) -> Markup:
    """Class of a colour -> what it stands for."""
    found = (f"<span><i class='swatch {kind}'></i>{escaped(name)}</span>" for kind, name in names.items())
    return Markup(f"<p class='legend'>{''.join(found)}</p>")


def score_rows(
    scores: Sequence[Score], encoders: Sequence[str], *, chance: float, others: Mapping[str, float]
) -> Markup:
    """A row per subset with a mark and an interval per method, a part per setting; the dashed line is chance.

    `others` are accuracies of other runs by name.
    """
    known = [score.estimate for score in scores if score.estimate]
    x = scale_of([chance, *others.values(), *(end for cell in known for end in _ends(cell)), *(c.value for c in known)])
    settings = _by_setting(scores, encoders)
    places = [value for value in x.ticks if 0.02 < x(value) < 0.98]
    ticks = (text(x.percent(value), 12, f"{100 * value:g}", "quiet", anchor="middle") for value in places)
    axis = _row("", f"<svg width='100%' height='18'>{''.join(ticks)}</svg>", "%")
    parts = []
    for setting, by_subset in settings.items():
        rows = []
        for subset, found in by_subset.items():
            label = f"{chips(subset, encoders)}<span>{escaped(subset_name(subset))}</span>"
            bars = "".join(_interval(score, x, ROW / 2 + GAP * index) for index, score in enumerate(found))
            strip = _strip(bars, x, chance, ROW + GAP * (len(found) - 1))
            rows.append(_row(label, strip, "<br>".join(percent(score.estimate) for score in found)))
        parts.append((setting, "".join([*rows, axis]), len(rows)))
    if others:
        rows = []
        for name, value in others.items():
            dot = mark(x.percent(value), ROW / 2, "other", title=f"{name}: {100 * value:.1f} %")
            rows.append(_row(f"<span>{escaped(name)}</span>", _strip(dot, x, chance, ROW), f"{100 * value:.1f}"))
        parts.append(("other runs", "".join([*rows, axis]), len(rows)))
    if len(parts) == 1:
        return Markup(parts[0][1])
    shown, drawn = 0, []
    for setting, rows_html, number in parts:  # as many open as can be taken in
        state, shown = " open" * (shown + number <= MAX_ROWS or not shown), shown + number
        drawn.append(
            f"<details{state}><summary>{escaped(setting or 'without encoders')}</summary>{rows_html}</details>"
        )
    return Markup("".join(drawn))


def _row(label: str, strip: str, value: str) -> str:
    return f"<div class='row'><div class='who'>{label}</div>{strip}<div class='val'>{value}</div></div>"


def _by_setting(scores: Iterable[Score], encoders: Sequence[str]) -> dict[str, dict[Subset, list[Score]]]:
    """Setting -> subset -> a score per method, small subsets first.

    What has no setting, retrained without encoders, stands first by itself, or with the only setting that there is.
    """
    scores = list(scores)
    named = dict.fromkeys(score.setting for score in scores if score.setting)
    found: dict[str, dict[Subset, list[Score]]] = {}
    for score in sorted(scores, key=lambda score: by_size(score.subset, encoders)):
        setting = next(iter(named)) if len(named) == 1 else score.setting
        found.setdefault(setting, {}).setdefault(score.subset, []).append(score)
    return found


def _ends(cell: Estimate) -> list[float]:
    """The ends of an interval as they are drawn: with few seeds it reaches beyond what an accuracy can be."""
    return [] if cell.low is None or cell.high is None else [max(0.0, cell.low), min(1.0, cell.high)]


def _strip(content: str, x: Scale, chance: float, height: int) -> str:
    """The plot of one row; rows without a gap make lines that go through."""
    grid = "".join(line(x.percent(value), 0, x.percent(value), height, "grid") for value in x.ticks)
    low = line(x.percent(chance), 0, x.percent(chance), height, "chance")
    return f"<svg width='100%' height='{height}'>{grid}{low}{content}</svg>"


def _interval(score: Score, x: Scale, y: float) -> str:
    if score.estimate is None:
        return text("2", y + 4, "no answers", "quiet")
    cell, parts = score.estimate, ""
    if ends := _ends(cell):
        parts = line(x.percent(ends[0]), y, x.percent(ends[1]), y, f"whisker {KINDS[score.block]}")
    return parts + mark(x.percent(cell.value), y, KINDS[score.block], shape=SHAPES[score.block], title=score.summary)


def lattice(scores: Iterable[Score], encoders: Sequence[str]) -> Markup:
    """All subsets by size, all encoders above and none below; edges add an encoder.

    A node has the more colour the higher its score, an edge is the thicker the more the encoder changes it. Text where
    there are too many nodes to be read.
    """
    values = {score.subset: score for score in scores if score.estimate}
    n = len(encoders)
    levels = [[subset for subset in _subsets(encoders) if len(subset) == size] for size in range(n, -1, -1)]
    widest = max(map(len, levels))
    if widest > MAX_NODES:
        return Markup(f"<p class='quiet'>Not drawn: {2**n:,} subsets of {n} encoders; the tables list them.</p>")
    place = {
        subset: (f"{100 * (index + 0.5) / len(level):.2f}%", 26 + LEVEL * row)
        for row, level in enumerate(levels)
        for index, subset in enumerate(level)
    }
    known = [score.value for score in values.values()]
    low, span = min(known), (max(known) - min(known)) or 1
    edges, nodes = [], []
    steps = {
        (small, big): encoder
        for small in place
        for encoder in encoders
        if (big := _with(small, encoder, encoders)) != small
    }
    gains = {edge: values[edge[1]].value - values[edge[0]].value for edge in steps if {*edge} <= values.keys()}
    largest = max(map(abs, gains.values()), default=0) or 1
    for (small, big), gain in sorted(gains.items(), key=lambda item: abs(item[1])):
        (x1, y1), (x2, y2) = place[small], place[big]
        width = f" stroke-width='{0.6 + 5 * abs(gain) / largest:.1f}'"
        about = f"{subset_name(small)} + {steps[small, big]}: {100 * gain:+.1f} points"
        edges.append(line(x1, y1 - 20, x2, y2 + 20, "up" if gain >= 0 else "down", extra=width, title=about))
    for subset, (x, y) in place.items():
        score = values.get(subset)
        shade = 0.06 + 0.4 * (score.value - low) / span if score else 0
        about = score.summary if score else f"{subset_name(subset)}: no answers"
        nodes.append(
            f"<svg x='{x}' y='{y}' class='mark'><g><rect x='-28' y='-20' width='56' height='40' rx='6' class='back'/>"
            f"<rect x='-28' y='-20' width='56' height='40' rx='6' class='node{'' if score else ' absent'}'"
            f" fill-opacity='{shade:.2f}'/><svg x='{-6 * n + 1}' y='-14'>{chips(subset, encoders)}</svg>"
            f"{text('0', 13, f'{100 * score.value:.1f}' if score else '–', 'num', anchor='middle')}"
            f"<title>{escaped(about)}</title></g></svg>"
        )
    label = f"Lattice of the subsets of {', '.join(encoders)} with their accuracy"
    drawn = figure("".join(edges + nodes), right=0, height=52 + LEVEL * n, label=label, left=0, min_width=NODE * widest)
    return Markup(f"<div class='lattice'>{drawn}</div>")


def _subsets(encoders: Sequence[str]) -> list[Subset]:
    found = [tuple(e for i, e in enumerate(encoders) if mask >> i & 1) for mask in range(1 << len(encoders))]
    return sorted(found, key=lambda subset: by_size(subset, encoders))


def by_size(subset: Subset, encoders: Sequence[str]) -> tuple[int, list[int]]:
    """Sort key of subsets: small ones first, then in the order of the encoders."""
    return len(subset), [encoders.index(encoder) for encoder in subset]


def _with(subset: Subset, encoder: str, encoders: Sequence[str]) -> Subset:
    return tuple(e for e in encoders if e in subset or e == encoder)


@dataclass(frozen=True, kw_only=True)
class Costed:
    """A score and what it costs."""

    score: Score
    cost: float


def cost_plot(points: Sequence[Costed], *, unit: str, without: Sequence[Score]) -> tuple[Markup, dict[Score, str]]:
    """Accuracy against a cost with several values, and the numbers of points on the Pareto front; equal ones share one.

    `without` are scores that need no encoder, which would stretch the axis: a line each.
    """
    height = 280
    values = [point.score.value for point in points]
    x, y = scale_of([p.cost for p in points], log=True), scale_of([*values, *(s.value for s in without)])
    on_front = [p for p, is_on in zip(points, pareto_set([p.cost for p in points], values), strict=True) if is_on]
    places = sorted({(point.cost, point.score.value) for point in on_front})
    numbers = {p.score: str(1 + places.index((p.cost, p.score.value))) for p in on_front}
    costs = sorted({point.cost for point in points})
    ticks = costs if min(x(b) - x(a) for a, b in pairwise(costs)) > 1 / (2 * TICKS) else ()  # else they would overlap
    parts = [axes(x, y, height=height, x_text=short, y_text=lambda value: f"{100 * value:g}", x_ticks=ticks)]
    for score in without:
        level = height * (1 - y(score.value))
        parts.append(line("0", level, "100%", level, "chance", title=score.summary))
        parts.append(text("4", level - 4, subset_name(score.subset), "quiet"))
    for one, other in pairwise(places):
        (x1, y1), (x2, y2) = ((x.percent(cost), height * (1 - y(value))) for cost, value in (one, other))
        parts += [line(x1, y1, x2, y1, "front"), line(x2, y1, x2, y2, "front")]
    for point in sorted(points, key=lambda point: point.score in numbers):
        parts.append(_point(point, x, y, height, unit, numbers.get(point.score, "")))
    parts.append(text("100%", height + 34, unit, "quiet", anchor="end"))
    return figure("".join(parts), height=height + 42, label=f"Accuracy in percent against {unit}"), numbers


def _point(point: Costed, x: Scale, y: Scale, height: int, unit: str, number: str = "") -> str:
    about = f"{point.score.summary}; {point.score.setting}; {short(point.cost)} {unit}"
    place = height * (1 - y(point.score.value))
    kind = "onfront" if number else f"size{min(len(point.score.subset), LARGEST)}"
    shape = "number" if number else SHAPES[point.score.block]
    return mark(x.percent(point.cost), place, kind, shape=shape, title=about, content=number)


def short(value: float) -> str:
    """`1.5G`, `830k`, `64`."""
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def heat_table(
    columns: Sequence[str], rows: Sequence[tuple[Markup, Sequence[float | None]]], chance: Sequence[float]
) -> Markup:
    """Shares in percent, with the more colour the further they are above chance."""
    head = "".join(f"<th class='n'>{escaped(column)}</th>" for column in columns)
    top = max((v - c for _, row in rows for v, c in zip(row, chance, strict=True) if v is not None), default=0) or 1
    body = [f"<tr class='quiet'><td>chance</td>{''.join(f'<td class=n>{100 * c:.1f}</td>' for c in chance)}</tr>"]
    for label, row in rows:
        cells = []
        for value, low in zip(row, chance, strict=True):
            shade = 0 if value is None else max(0.0, min(1.0, (value - low) / top))
            shown = "–" if value is None else f"{100 * value:.1f}"
            cells.append(f"<td class='n heat' style='--shade:{100 * 0.45 * shade:.0f}%'>{shown}</td>")
        body.append(f"<tr><td class='label'>{label}</td>{''.join(cells)}</tr>")
    return Markup(f"<div class='scroll'><table class='heat'><tr><th></th>{head}</tr>{''.join(body)}</table></div>")

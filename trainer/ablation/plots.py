"""Plots as inline SVG that fills the width of its box: positions along x are percentages, text keeps its size.

No scripts: a point says its values in a `<title>`, which browsers show when it is pointed at. Colours are classes of
the page's style sheet, so that they follow light and dark. Texts are escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mervcache.page import Markup, escaped

TICKS = 5  # of an axis, about
LOG_FROM = 8  # a positive axis whose ends are further apart than this factor is logarithmic
POINTS = 240  # of a curve: more would not be seen
SMOOTHED = 40  # stretches that the mean of a curve has


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An axis: values from `low` to `high` as shares of its length."""

    low: float
    high: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(x) if self.is_log else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)

    def percent(self, value: float) -> str:
        return f"{100 * self(value):.2f}%"

    @property
    def ticks(self) -> list[float]:
        """Round values."""
        if self.is_log:
            found = [m * 10.0**e for e in range(-12, 19) for m in (1, 2, 5) if self.low <= m * 10.0**e <= self.high]
            return found[:: math.ceil(len(found) / (TICKS + 1))] if found else [self.low, self.high]
        rough = (self.high - self.low) / TICKS
        step = 10.0 ** math.floor(math.log10(rough))
        step *= next(m for m in (1, 2, 5, 10) if m * step >= 0.75 * rough)
        first = math.ceil(self.low / step - 1e-9)
        return [round(index * step, 12) for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def scale_of(values: Sequence[float], *, log: bool = False, margin: float = 0.06) -> Scale:
    """An axis that holds all values and a margin; `log` where they are positive and far apart."""
    low, high = min(values), max(values)
    if log and low > 0 and high / low >= LOG_FROM:
        spread = (high / low) ** margin
        return Scale(low=low / spread, high=high * spread, is_log=True)
    spread = margin * (high - low) if high > low else abs(high) / 2 or 0.5
    return Scale(low=low - spread, high=high + spread)


def figure(content: str, *, height: int, label: str, left: int = 44, right: int = 8, min_width: int = 0) -> Markup:
    """A figure of that height in pixels that scrolls in its box where that is narrower than `min_width`.

    `left` is the room for the labels of the vertical axis, which stand at negative positions.
    """
    style = f"padding-left:{left}px;padding-right:{right}px" + (f";min-width:{min_width}px" if min_width else "")
    return Markup(
        f"<div class='scroll'><div class='plot' style='{style}'>"
        f"<svg role='img' aria-label='{escaped(label)}' width='100%' height='{height}'>{content}</svg></div></div>"
    )


def line(x1: str, y1: float, x2: str, y2: float, kind: str, *, extra: str = "", title: str = "") -> str:
    return f"<line x1='{x1}' y1='{y1:.1f}' x2='{x2}' y2='{y2:.1f}' class='{kind}'{extra}>{_title(title)}</line>"


def text(x: str, y: float, content: str, kind: str = "", *, anchor: str = "start") -> str:
    return f"<text x='{x}' y='{y:.1f}' class='{kind}' text-anchor='{anchor}'>{escaped(content)}</text>"


def mark(x: str, y: float, kind: str, *, shape: str = "circle", title: str = "", content: str = "") -> str:
    """A point, drawn around its place by a nested SVG, which takes percentages where a transformation does not."""
    shapes = {
        "circle": "<circle r='4.5'/>",
        "diamond": "<path d='M0-6 6 0 0 6-6 0Z'/>",
        "triangle": "<path d='M0-6 6 4.5-6 4.5Z'/>",
        "square": "<rect x='-4.5' y='-4.5' width='9' height='9'/>",
        "number": "<circle r='9'/>",
    }
    inner = f"{shapes[shape]}{text('0', 4, content, 'in', anchor='middle') if content else ''}{_title(title)}"
    return f"<svg x='{x}' y='{y:.1f}' class='mark {kind}'><g>{inner}</g></svg>"


def axes(
    x: Scale,
    y: Scale,
    *,
    height: int,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    x_ticks: Sequence[float] = (),
) -> str:
    """Grid lines with their values, for a plot whose lower edge is at `height`; `x_ticks` instead of round values."""
    parts = [line("0", height, "100%", height, "axis")]
    for value in y.ticks:
        place = height * (1 - y(value))
        parts += [line("0", place, "100%", place, "grid"), text("-6", place + 4, y_text(value), "quiet", anchor="end")]
    for value in x_ticks or x.ticks:
        anchor = "start" if x(value) < 0.03 else "end" if x(value) > 0.97 else "middle"
        parts.append(text(x.percent(value), height + 16, x_text(value), "quiet", anchor=anchor))
    return "".join(parts)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over steps; None where a value was not finite, which leaves a gap."""

    name: str
    kind: str  # class of its colour
    points: Sequence[tuple[float, float | None]]
    is_smoothed: bool = False  # also draw the values themselves, faintly


def curves(
    found: Sequence[Curve],
    *,
    height: int = 240,
    label: str,
    x_name: str,
    y_text: Callable[[float], str],
    has_marks: bool = False,
) -> Markup:
    """Curves over a common axis; `has_marks`: with a mark at every point, whose places are the ticks."""
    drawn = [(curve, smooth(curve.points)) if curve.is_smoothed else (curve, list(curve.points)) for curve in found]
    shown = [p for curve, points in drawn for p in [*points, *(curve.points if len(found) == 1 else [])]]
    places = sorted({step for curve in found for step, _ in curve.points})
    x = scale_of(places, margin=0.04 if has_marks else 0)
    y = scale_of([value for _, value in shown if value is not None], log=True)
    ticks = places if has_marks else ()
    parts = [axes(x, y, height=height, x_text=lambda value: f"{value:,.0f}", y_text=y_text, x_ticks=ticks)]
    lines = []
    for curve, points in drawn:
        if curve.is_smoothed and len(found) == 1:
            lines += [_polyline(part, x, y, f"{curve.kind} faint") for part in _parts(_thinned(curve.points))]
        lines += [_polyline(part, x, y, curve.kind, curve.name) for part in _parts(points)]
    area = (
        f"<svg width='100%' height='{height}' viewBox='0 0 100 100' preserveAspectRatio='none'>{''.join(lines)}</svg>"
    )
    parts.append(area)
    for curve, points in drawn if has_marks else ():
        for step, value in points:
            if value is None:
                continue
            about = f"{curve.name}, {step:,} {x_name}: {y_text(value)}"
            parts.append(mark(x.percent(step), height * (1 - y(value)), f"{curve.kind} dot", title=about))
    parts.append(text("100%", height + 34, x_name, "quiet", anchor="end"))
    return figure("".join(parts), height=height + 42, label=label)


def smooth(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Means of stretches of equal length; None where a stretch has no finite value."""
    size = max(1, math.ceil(len(points) / SMOOTHED))
    means: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        values = [value for _, value in stretch if value is not None]
        steps = [step for step, _ in stretch]
        means.append((sum(steps) / len(steps), sum(values) / len(values) if values else None))
    return means


def _thinned(points: Sequence[tuple[float, float | None]]) -> Sequence[tuple[float, float | None]]:
    """At most POINTS of them, evenly; those that are not finite stay, so that gaps are seen."""
    size = math.ceil(len(points) / POINTS)
    return [point for index, point in enumerate(points) if index % size == 0 or point[1] is None]


def _parts(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Runs of finite values."""
    parts: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if value is None:
            parts.append([])
        else:
            parts[-1].append((step, value))
    return [part for part in parts if part]


def _polyline(points: Sequence[tuple[float, float]], x: Scale, y: Scale, kind: str, title: str = "") -> str:
    places = " ".join(f"{100 * x(step):.2f},{100 * (1 - y(value)):.2f}" for step, value in points)
    return f"<polyline points='{places}' class='curve {kind}'>{_title(title)}</polyline>"


def _title(content: str) -> str:
    return f"<title>{escaped(content)}</title>" if content else ""

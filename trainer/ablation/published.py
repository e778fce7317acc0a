"""Accuracies that the MERV paper publishes (arXiv 2501.01426), and when one stands alongside ours.

A figure is of a layout (encoders, fusion, projector, tokens per frame) and measured under conditions (benchmark,
protocol, judge, prompt, frames). It stands alongside a score that agrees with it in all of these, as the run has
recorded them; else it is named in a footnote, with what differs. What was trained is not compared: the paper's runs
train LLaMA-2-7B on the data of Video-LLaVA.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MERV_ENCODERS = ("languagebind", "dinov2", "vivit", "siglip")
GRID = "tokens_per_frame"

# Names of folders that stand for a benchmark, without what is no letter or digit.
BENCHMARKS = {
    "MSVD-QA": ("msvd", "msvdqa"),
    "MSRVTT-QA": ("msrvtt", "msrvttqa"),
    "TGIF-QA": ("tgif", "tgifqa"),
    "ActivityNet-QA": ("activitynet", "activitynetqa"),
    "Perception Test": ("perception", "perceptiontest"),
    "NExT-QA": ("next", "nextqa"),
    "TVQA": ("tvqa",),
}
# Which sets are averaged is not known: the main figures of the four open-ended sets average 57.99, the averages of the
# same model in the tables of fusions and projectors are 56.83. So no score of ours is of it.
AVERAGE = "average of open-ended sets (which is not published)"
# Its distractors are not published, nor its 12 temporal classes.
SSV2, SSV2_TEMPORAL = "SSv2-MCQ with the paper's distractors", "SSv2-MCQ, the paper's temporal classes"


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How an accuracy was measured."""

    benchmark: str
    protocol: str  # "letters", "likelihood" or "open-ended"
    judge: str | None  # model as its endpoint names it; None: compared without one
    prompt: str  # name of the template, of multiple choice or of the judge, without its ending
    frames: int | None  # that the longest sample of a video has, of which encoders may take every second

    def differences(self, other: Conditions) -> dict[str, tuple[Any, Any]]:
        """Name -> value here and there, of what the two do not share."""
        pairs = {name: (value, getattr(other, name)) for name, value in vars(self).items()}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What was trained, as far as the tables of the paper vary it."""

    encoders: frozenset[str]
    projector: str
    tokens_per_frame: int | None
    fusion: str | None = None  # None: of one encoder, where all are the same


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published accuracy, in percent."""

    table: str  # the paper's: "fusion", "projector", "tokens_per_frame" or "encoders"
    name: str  # of its row
    percent: float
    layout: Layout
    conditions: Conditions

    @property
    def key(self) -> Any:
        """The row's value on the axis that its table varies."""
        return "+".join(sorted(self.layout.encoders)) if self.table == "encoders" else getattr(self.layout, self.table)


@dataclass(frozen=True, kw_only=True)
class OwnScore:
    """A score of ours: what was trained, and how it was measured."""

    layout: Layout
    conditions: Conditions


def benchmark_name(source: str) -> str:
    """The name by which the paper calls a benchmark, of the folder of its questions; the folder's where it has none.

    >>> benchmark_name("NExT_QA"), benchmark_name("mine")
    ('NExT-QA', 'mine')
    """
    plain = re.sub(r"[^a-z0-9]", "", source.lower())
    return next((name for name, known in BENCHMARKS.items() if plain in known), source)


def sampled_frames(rules: Iterable[str]) -> int | None:
    """Frames of the longest sample, by the encoders' frame rules; None where they do not say.

    >>> sampled_frames(["linspace-32/2", "linspace-32"]), sampled_frames(["linspace-16"]), sampled_frames([])
    (32, 16, None)
    """
    found = [int(match[1]) for rule in rules if (match := re.match(r"linspace-(\d+)", rule))]
    return max(found, default=None)


def alongside(score: OwnScore) -> list[Published]:
    """The published figures that stand alongside a score: of the same layout, measured under the same conditions."""
    layout = score.layout
    return [
        row
        for row in PUBLISHED
        if row.layout in (layout, _without_fusion(layout)) and not row.conditions.differences(score.conditions)
    ]


def footnotes(shown: Mapping[str, Collection[Any]], scores: Sequence[OwnScore]) -> list[str]:
    """Published figures of shown rows that stand alongside no score, and why: a line per table and benchmark.

    `shown` are the values of each axis, of "encoders" sorted names joined by "+".
    """
    lines: dict[tuple[str, str, str], list[Published]] = {}
    agreeing = [row for score in scores for row in alongside(score)]
    for row in PUBLISHED:
        if row.key in shown.get(row.table, ()) and row not in agreeing:
            reason = _why_not(row, scores)
            lines.setdefault((row.table, row.conditions.benchmark, reason), []).append(row)
    return [
        f"Published (arXiv 2501.01426), {table.replace('_', ' ')} on {benchmark}:"
        f" {', '.join(f'{row.name} {row.percent:.2f}' for row in rows)}. Not alongside: {reason}."
        for (table, benchmark, reason), rows in lines.items()
    ]


def _why_not(row: Published, scores: Sequence[OwnScore]) -> str:
    """What differs from the scores that are closest."""
    same = [score for score in scores if score.conditions.benchmark == row.conditions.benchmark]
    if not same:
        return "there are no scores on it here"
    differing = min((row.conditions.differences(score.conditions) for score in same), key=len)
    if not differing:
        return "no run here has its encoders, fusion, projector and tokens per frame"
    parts = (f"{name} {_named(there)}, here {_named(here)}" for name, (there, here) in differing.items())
    return "; ".join(parts)


def _named(value: Any) -> str:
    return "none" if value is None else str(value)


def _without_fusion(layout: Layout) -> Layout | None:
    """The layout as the paper's tables of single encoders have it."""
    if len(layout.encoders) != 1:
        return None
    return Layout(
        encoders=layout.encoders, projector=layout.projector, tokens_per_frame=layout.tokens_per_frame, fusion=None
    )


def _open_ended(benchmark: str, frames: int = 32) -> Conditions:
    return Conditions(
        benchmark=benchmark, protocol="open-ended", judge="gpt-3.5-turbo-0613", prompt="video-chatgpt", frames=frames
    )


def _letters(benchmark: str) -> Conditions:
    return Conditions(benchmark=benchmark, protocol="letters", judge=None, prompt="merv-letters", frames=32)


def _merv(**changes: Any) -> Layout:
    """The paper's model, but for what a row varies."""
    default = {"fusion": "cross_attention", "projector": "2d-average", GRID: 64}
    return Layout(encoders=frozenset(MERV_ENCODERS), **{**default, **changes})


def _alone(encoder: str, projector: str = "2d-average", tokens: int | None = 64) -> Layout:
    return Layout(encoders=frozenset((encoder,)), projector=projector, tokens_per_frame=tokens)


def _figures(table: str, rows: Iterable[tuple[str, float, Layout, Conditions]]) -> list[Published]:
    return [
        Published(table=table, name=name, percent=percent, layout=layout, conditions=conditions)
        for name, percent, layout, conditions in rows
    ]


_TOKENS = {
    "MSVD-QA": {1: 61.94, 4: 64.47, 16: 67.23, 64: 69.08, 100: 68.38, 144: 68.65, 256: 68.46},
    "MSRVTT-QA": {1: 54.64, 4: 55.72, 16: 56.44, 64: 58.00, 100: 57.47, 144: 57.73},
}
_MAIN = {
    "MSVD-QA": 70.97,
    "MSRVTT-QA": 59.03,
    "TGIF-QA": 51.1,
    "ActivityNet-QA": 50.87,
    "Perception Test": 46.21,
    "NExT-QA": 63.09,
    "TVQA": 42.28,
}
_OPEN_ENDED_SETS = ("MSVD-QA", "MSRVTT-QA", "TGIF-QA", "ActivityNet-QA")

PUBLISHED = (
    *_figures(
        "fusion",
        (
            (name, percent, _merv(fusion=fusion), _open_ended(AVERAGE))
            for fusion, name, percent in (
                ("cross_attention", "Cross-Attn", 56.83),
                ("concat_sequence", "Concat (Seq.)", 54.45),
                ("concat_channel", "Concat (Ch.)", 56.64),
                ("learnable_weights", "Learnable W", 55.01),
                ("equal_mix", "25%-Mixed", 54.19),
            )
        ),
    ),
    *_figures(
        "projector",
        (
            (name, percent, _alone("languagebind", projector, tokens), _open_ended(AVERAGE, frames))
            for projector, name, tokens, percent, frames in (
                ("all-tokens", "257 tok", None, 54.76, 8),
                ("class-token", "class tok", None, 52.05, 8),
                ("2d-average", "2D Avg", 64, 54.96, 8),
                ("2d-average", "2D Avg*", 64, 55.86, 16),
                ("2d-attention", "2D Attn", 64, 52.12, 8),
                ("2d-convolution", "2D Conv", 64, 54.23, 8),
                ("3d-average", "3D Avg*", 64, 55.09, 16),
                ("3d-convolution", "3D Conv", 64, 55.42, 8),
            )
        ),
    ),
    *_figures(
        GRID,
        (
            (f"{tokens} tokens per frame", percent, _merv(tokens_per_frame=tokens), _open_ended(benchmark))
            for benchmark, found in _TOKENS.items()
            for tokens, percent in found.items()
        ),
    ),
    *_figures(
        "encoders",
        (
            (
                "MERV (frozen)",
                percent,
                _merv(),
                _open_ended(benchmark) if benchmark in _OPEN_ENDED_SETS else _letters(benchmark),
            )
            for benchmark, percent in _MAIN.items()
        ),
    ),
    *_figures(
        "encoders",
        (
            ("MERV", 42.0, _merv(), _letters(SSV2)),
            ("ViViT", 26.8, _alone("vivit"), _letters(SSV2)),
            ("ViViT", 39.77, _alone("vivit"), _letters(SSV2_TEMPORAL)),
        ),
    ),
)

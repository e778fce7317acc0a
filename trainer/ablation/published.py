"""Figures of the MERV paper (arXiv 2501.01426), and the conditions under which they stand alongside ours.

Scores of another benchmark, judge, prompt, protocol or number of frames are other quantities: they are named in a
footnote, with what differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CONDITIONS = ("benchmark", "protocol", "judge", "prompt", "frames")  # entries of sweep.json, where it names them
MERV_ENCODERS = ("languagebind", "dinov2", "vivit", "siglip")

OPEN_ENDED = {"protocol": "open-ended", "judge": "gpt-3.5-turbo-0613", "prompt": "video-chatgpt"}
LETTERS = {"protocol": "letters", "judge": None, "prompt": "merv-letters"}
AVERAGE = "average of the open-ended sets"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published accuracy, in percent."""

    layout: str  # the axis of the table it is in, or "encoders"
    key: Any  # our value on that axis; of "encoders": the encoders joined by "+"
    name: str  # as the paper calls it
    percent: float
    conditions: Mapping[str, Any]

    def differences(self, record: Mapping[str, Any]) -> list[str]:
        """The conditions that a sweep does not share, or does not name."""
        return [name for name in CONDITIONS if name not in record or record[name] != self.conditions[name]]


def _rows(layout: str, conditions: Mapping[str, Any], rows: Iterable[tuple[Any, str, float, int]]) -> list[Published]:
    return [
        Published(layout=layout, key=key, name=name, percent=percent, conditions={**conditions, "frames": frames})
        for key, name, percent, frames in rows
    ]


_ALL = "+".join(MERV_ENCODERS)
PUBLISHED = (
    *_rows(
        "fusion",
        {**OPEN_ENDED, "benchmark": AVERAGE},
        [
            ("cross_attention", "Cross-Attn", 56.83, 32),
            ("concat_sequence", "Concat (Seq.)", 54.45, 32),
            ("concat_channel", "Concat (Ch.)", 56.64, 32),
            ("learnable_weights", "Learnable W", 55.01, 32),
            ("equal_mix", "25%-Mixed", 54.19, 32),
        ],
    ),
    *_rows(  # of LanguageBind alone
        "projector",
        {**OPEN_ENDED, "benchmark": AVERAGE},
        [
            ("all-tokens", "257 tok", 54.76, 8),
            ("class-token", "class tok", 52.05, 8),
            ("2d-average", "2D Avg", 54.96, 8),
            ("2d-average", "2D Avg*", 55.86, 16),
            ("2d-attention", "2D Attn", 52.12, 8),
            ("2d-convolution", "2D Conv", 54.23, 8),
            ("3d-average", "3D Avg*", 55.09, 16),
            ("3d-convolution", "3D Conv", 55.42, 8),
        ],
    ),
    *_rows(
        "tokens_per_frame",
        {**OPEN_ENDED, "benchmark": "MSVD-QA"},
        [
            (count, str(count), percent, 32)
            for count, percent in {1: 61.94, 4: 64.47, 16: 67.23, 64: 69.08, 100: 68.38, 144: 68.65, 256: 68.46}.items()
        ],
    ),
    *_rows(
        "tokens_per_frame",
        {**OPEN_ENDED, "benchmark": "MSRVTT-QA"},
        [
            (count, str(count), percent, 32)
            for count, percent in {1: 54.64, 4: 55.72, 16: 56.44, 64: 58.00, 100: 57.47, 144: 57.73}.items()
        ],
    ),
    *(
        row
        for benchmark, percent in {
            "MSVD-QA": 70.97,
            "MSRVTT-QA": 59.03,
            "TGIF-QA": 51.1,
            "ActivityNet-QA": 50.87,
        }.items()
        for row in _rows("encoders", {**OPEN_ENDED, "benchmark": benchmark}, [(_ALL, "MERV (frozen)", percent, 32)])
    ),
    *(
        row
        for benchmark, percent in {"Perception Test": 46.21, "NExT-QA": 63.09, "TVQA": 42.28}.items()
        for row in _rows("encoders", {**LETTERS, "benchmark": benchmark}, [(_ALL, "MERV (frozen)", percent, 32)])
    ),
    *_rows(
        "encoders",
        {**LETTERS, "benchmark": "SSv2-MCQ"},
        [(_ALL, "MERV", 42.0, 32), ("vivit", "ViViT", 26.8, 32)],
    ),
    *_rows("encoders", {**LETTERS, "benchmark": "SSv2-MCQ, temporal subset"}, [("vivit", "ViViT", 39.77, 32)]),
)


def alongside(layout: str, record: Mapping[str, Any]) -> dict[Any, float]:
    """Our value on an axis -> published share, of the figures that agree with the sweep in every condition."""
    return {row.key: row.percent / 100 for row in PUBLISHED if row.layout == layout and not row.differences(record)}


def footnotes(layouts: Mapping[str, Iterable[Any]], record: Mapping[str, Any]) -> list[str]:
    """Published figures of the shown rows that do not stand alongside ours, and why; a line per table and benchmark."""
    lines: dict[tuple[str, str], list[Published]] = {}
    for row in PUBLISHED:
        if row.key in set(layouts.get(row.layout, ())) and row.differences(record):
            lines.setdefault((row.layout, row.conditions["benchmark"]), []).append(row)
    notes = []
    for (layout, benchmark), rows in lines.items():
        first, names = rows[0], dict.fromkeys(name for row in rows for name in row.differences(record))
        differing = ", ".join(
            f"{name} {_named(first.conditions[name], name)} ({_here(record, name)})" for name in names
        )
        figures = ", ".join(f"{row.name} {row.percent:.2f}" for row in rows)
        notes.append(
            f"Published (arXiv 2501.01426), {layout.replace('_', ' ')} on {benchmark}: {figures}. Not comparable with"
            f" this sweep, and so not alongside: {differing}."
        )
    return notes


def _named(value: Any, name: str) -> str:
    return "as in that row" if name == "frames" else "none" if value is None else str(value)


def _here(record: Mapping[str, Any], name: str) -> str:
    return f"here {record[name]}" if name in record else "not named in sweep.json"

"""The table of a sweep: encoder importance, settings and agreement of methods, in blocks that never mix.

Statistics are those of `statistics.py`, over accuracy and, apart from it, over log-likelihood margins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.ablation.benchmark_table import read_benchmarks
from trainer.ablation.comparisons import agreement, axis, token_matched
from trainer.ablation.document import Cell, Column, Document, Estimate, Section
from trainer.ablation.importance import ENCODERS, importance, scores
from trainer.ablation.panel import METRICS, Study
from trainer.ablation.published import footnotes
from trainer.ablation.results import (
    BLOCKS,
    POST_HOC,
    RETRAINED,
    Results,
    subset_name,
)
from trainer.ablation.statistics import DRAWS, LEVEL, Resampling, holm
from trainer.ablation.sweep import NESTED
from trainer.ablation.wall_time import time_section

if TYPE_CHECKING:
    from trainer.ablation.costs_table import SweepCosts  # imports torch

SHOWN_SUBSETS = 4  # of those that a run lacks, by name


def make_table(
    results: Results,
    *,
    folders: Mapping[str, Path] | None = None,
    costs: SweepCosts | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Document:
    """Every statistic that the answers allow, and what the runs cost; the same arguments give the same table.

    `folders` are those of the runs by name, by default those of a sweep.
    """
    videos = np.unique(results.questions.videos, return_inverse=True)[1]
    study = Study(results=results, resampling=Resampling(videos, draws=draws, seed=seed))
    sections: list[Section] = []
    shown: dict[str, set[Any]] = {"encoders": {"+".join(sorted(results.encoders)), *results.encoders}}
    benchmarks = read_benchmarks(results, folders)
    for block in BLOCKS:
        for metric in METRICS:
            panels = study.panels(block, metric)
            if not any(panel.values for panel in panels.values()):
                continue
            found = [scores(study, block, metric, panels), *importance(study, block, metric, panels)]
            if block != POST_HOC:  # the settings of masked runs are compared by their own, retrained answers
                for name in dict.fromkeys(name for setting in panels for name, _ in setting.values):
                    if section := axis(study, metric, panels, name):
                        found.append(section)
                        shown.setdefault(name, set()).update(setting.get(name) for setting in panels)
            if costs and block == RETRAINED:
                tokens = costs.visual_tokens(block)
                found += filter(None, [token_matched(study, block, metric, panels, tokens)])
            sections += _adjust([replace(s, block=block, metric=metric.name) for s in found if s.rows])
        if block == RETRAINED:
            sections += filter(None, [benchmarks.section()])
        sections += costs.sections(block) if costs else []
    sections += [section for metric in METRICS if (section := agreement(study, metric)).rows]
    times = time_section(results.folder)
    sections += [times] if times else []
    notes = list(results.notes)
    if not any(section.title == ENCODERS for section in sections):
        notes.append(
            "The importance of encoders is not computed: no setting has several subsets of them; merv-train sweep"
            " --subsets all adds the others."
        )
    return Document(
        title=f"Ablation {results.folder.resolve().name}",
        facts=_facts(results, study.resampling, draws, seed),
        methods=_methods(draws),
        sections=tuple(sections),
        missing=_missing(results),
        footnotes=(*_frame_rules(results), *footnotes(shown, benchmarks.own()), *notes),
        questions=_questions(results),
    )


def _adjust(sections: list[Section]) -> list[Section]:
    """Holm's correction over all tests of these sections."""
    cells = [cell for s in sections for row in s.rows for cell in row if isinstance(cell, Estimate)]
    adjusted = iter(holm([cell.p for cell in cells if cell.p is not None]))

    def change(cell: Cell) -> Cell:
        if isinstance(cell, Estimate) and cell.p is not None:
            return replace(cell, p_holm=next(adjusted))
        return cell

    return [section.map_cells(change) for section in sections]


def _facts(results: Results, resampling: Resampling, draws: int, seed: int) -> dict[str, str]:
    record = results.record
    margins = sum(answers.margin_Q is not None for answers in results.answers.values())
    return {
        "encoders": ", ".join(results.encoders),
        "questions": f"{len(results.questions):,} of split {record['split']} about {resampling.num_videos:,} videos",
        "protocol": str(record["protocol"]),
        "sets of answers": f"{len(results.answers)}, {margins} of them with log-likelihoods",
        "snapshot": str(record.get("snapshot", "")),
        "samples digest": str(record.get("samples_digest", "")),
        "questions digest": str(record.get("questions_digest", "")),
        "bootstrap": f"{draws:,} draws, seed {seed}",
    }


def _methods(draws: int) -> tuple[str, ...]:
    return (
        f"Intervals: {LEVEL:.0%} percentile intervals of {draws:,} bootstrap draws. A video is resampled with all its"
        " questions; seeds enter as Student's t deviations with one degree of freedom less than there are seeds. Both"
        " are drawn independently, and the same for all runs, so that differences are paired. With one seed, intervals"
        " cover videos only.",
        "p: two-sided, by the draws, after Holm's correction over all tests of one block and one metric. Intervals are"
        " not corrected.",
        "Capacity: the score of one encoder alone. Necessity: the score of all encoders minus the score without one"
        " (arXiv 2606.03879). CUR: (all - without) / all. Information Gap: largest minus smallest CUR (arXiv"
        " 2507.03262); it is above 0 for equal encoders too, so its interval and p are against that null.",
        "Shapley values are over all subsets, text-only included; they sum to the score of all minus text-only. Shapley"
        " interaction index (Grabisch and Roubens 1999): above 0 where two encoders are worth more together.",
        "Accuracy: an answer that ties with k - 1 others counts 1/k where one of them is right; an unreadable answer"
        " counts as wrong. Log-likelihood margin: mean log-likelihood per token of the right option minus that of the"
        " best other one.",
    )


def _missing(results: Results) -> tuple[str, ...]:
    """A line per run and reason, then the next command."""
    lacking: dict[tuple[str, str, str], list[str]] = {}
    for member, reason in results.missing.items():
        tokens = f"{member.setting.get('tokens_per_frame')} tokens per frame"
        which = tokens if member.block == NESTED else subset_name(member.subset)
        lacking.setdefault((member.block, member.run, reason), []).append(which)
    lines = []
    for (block, run, reason), places in lacking.items():
        more, kind = ", ..." if len(places) > SHOWN_SUBSETS else "", "grids" if block == NESTED else "subsets"
        which = "" if block == RETRAINED else f" of {len(places)} {kind} ({', '.join(places[:SHOWN_SUBSETS])}{more})"
        lines.append(f"{block}: {run} has no answers{which}: {reason}")
    return (*lines, f"Next: {results.resume}") if lines else ()


def _frame_rules(results: Results) -> list[str]:
    if not results.frame_rules:
        return []
    rules = "; ".join(f"{name} {rule}" for name, rule in results.frame_rules.items())
    return [
        f"An encoder alone sees the same frames as with the others: {rules}. The released single-encoder models of 16"
        " frames sample 16 frames directly, and so see other ones."
    ]


def _questions(results: Results) -> Section:
    """A row per question, a column per run: what a question was worth to it."""
    asked, answers = results.questions, results.answers
    columns = [Column(name=name) for name in ("question", "video", "category")]
    columns.append(Column(name="right option", unit="count"))
    columns += [Column(name=f"{member.block}: {member}", unit="number") for member in answers]
    credit_QR = np.stack([found.credit_Q for found in answers.values()], axis=1).tolist()
    labels = zip(asked.sample_ids, asked.videos, asked.categories, asked.correct, strict=True)
    rows = tuple((*label, *credit) for label, credit in zip(labels, credit_QR, strict=True))
    return Section(title="Credit by question and run", columns=tuple(columns), rows=rows)

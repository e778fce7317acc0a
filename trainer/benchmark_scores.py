"""Scores of an evaluation by benchmark: rows of multiple choice, and of open-ended answers with their judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.answering import RunAnswers
from trainer.judge import Judge, Verdict, judge_answers, one_version
from trainer.model import multiple_choice, open_ended
from trainer.model.open_ended import NORMALISATION, OpenAnswer

Verdicts = Mapping[str, Sequence[Verdict]]  # by benchmark, in the order of the answers


def by_benchmark(answers: RunAnswers, baselines: Mapping[str, RunAnswers]) -> dict[str, Any]:
    """Benchmark -> rows of multiple choice by category, of the run and of each baseline."""

    def rows(of: RunAnswers, name: str) -> list[dict[str, Any]]:
        return [asdict(score) for score in multiple_choice.summarise(of.choices[name])]

    return {
        name: {
            "scores": rows(answers, name),
            "beside": {other: rows(found, name) for other, found in baselines.items()},
        }
        for name in answers.choices
    }


def open_report(
    answers: RunAnswers,
    baselines: Mapping[str, RunAnswers],
    judge: Judge | None,
    *,
    max_new_tokens: int,
    folders: Mapping[str, Path | None],  # run -> where the judge's answers are kept; "" is the run itself
) -> dict[str, Any]:
    """JSON of all open-ended answers. Raises UserError where a judge changed its version on the way."""
    runs = {"": answers, **baselines}
    verdicts: dict[str, Verdicts | None] = dict.fromkeys(runs)
    identity = None
    if judge is not None:
        judged = {run: _judged(found, judge, folders[run]) for run, found in runs.items()}
        verdicts |= judged
        given = [verdict for of_run in judged.values() for part in of_run.values() for verdict in part]
        identity = {**judge.facts, "version": one_version(given, judge)}
    tables = {
        run: {name: _rows(texts, (verdicts[run] or {}).get(name)) for name, texts in found.texts.items()}
        for run, found in runs.items()
    }
    own = verdicts[""]
    return {
        "max_new_tokens": max_new_tokens,
        "normalisation": NORMALISATION,
        "judge": identity,
        "scores": tables.pop(""),
        "beside": tables,
        "answers": [
            {
                "benchmark": name,
                **asdict(answer),
                "exact": answer.is_exact,
                "normalised": answer.is_match,
                "verdict": own and asdict(own[name][number]),
            }
            for name, texts in answers.texts.items()
            for number, answer in enumerate(texts)
        ],
    }


def _judged(found: RunAnswers, judge: Judge, folder: Path | None) -> Verdicts:
    """Verdicts on all answers of a run, requested together."""
    texts = [answer for answers in found.texts.values() for answer in answers]
    verdicts = iter(judge_answers(judge, texts, folder))
    return {name: [next(verdicts) for _ in answers] for name, answers in found.texts.items()}


def _rows(answers: Sequence[OpenAnswer], verdicts: Sequence[Verdict] | None) -> list[dict[str, Any]]:
    rows = [asdict(score) for score in open_ended.summarise(answers)]
    if verdicts is None:
        return rows
    for row in rows:
        of_row = [
            verdict
            for answer, verdict in zip(answers, verdicts, strict=True)
            if row["category"] in (open_ended.OVERALL, answer.category)
        ]
        row["judge_accuracy"] = sum(bool(verdict.is_match) for verdict in of_row) / len(of_row)
        row["judge_score"] = sum(verdict.score or 0 for verdict in of_row) / len(of_row)
        row["judge_unreadable"] = sum(verdict.is_match is None for verdict in of_row)
    return rows

"""What a run has answered and how its fusion weighs encoders, read from the run's folder as `merv-eval` leaves it.

RUN/predictions/*.jsonl are answers: a line of conditions, then a record per question, keyed by the sample's digest.
RUN/atlas/*.parquet has a row per clip with columns weight_ENCODER and norm_ENCODER; the newest file counts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from featurestore.clips import Sample
from mervcache.errors import StoreDamagedError, UserError

KEY = "question"  # of a record: digest of the sample


@dataclass(frozen=True, kw_only=True)
class RunAnswer:
    """One answer to one question."""

    by: str  # benchmark and protocol
    record: Mapping[str, Any]  # as the run wrote it
    credit: float  # 1 right, 1/k where it is one of k equally good options, 0 wrong

    def text(self, sample: Sample) -> str:
        """What was answered, in words."""
        if not sample.options:
            return self.record["text"]
        chosen = self.record["predicted"]
        return "unreadable: " + (self.record["text"] or "") if chosen is None else sample.options[chosen]


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """Answers by sample digest, and fusion weights and norms by clip."""

    name: str
    answers: Mapping[str, list[RunAnswer]]
    fusion: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)  # clip -> encoder -> name

    @property
    def right_by_sample(self) -> dict[str, float]:
        """The credit of each question's first answer."""
        return {digest: found[0].credit for digest, found in self.answers.items()}

    @classmethod
    def read(cls, run: Path) -> RunResults:
        """Read a run's folder; UserError where it has neither answers nor an atlas."""
        if not run.is_dir():
            raise UserError(f"there is no run at {run}")
        answers, fusion = _read_answers(run), _read_fusion(run)
        if not answers and not fusion:
            raise UserError(
                f"{run} has no answers and no fusion weights: `merv-eval run --checkpoint {run}` and `merv-eval atlas"
                f" {run}` make them"
            )
        return cls(name=run.name, answers=answers, fusion=fusion)


def _read_answers(run: Path) -> dict[str, list[RunAnswer]]:
    found: dict[str, list[RunAnswer]] = defaultdict(list)
    for path in sorted((run / "predictions").glob("*.jsonl")):
        lines = path.read_text().splitlines()
        try:
            head, *records = map(json.loads, lines)
            if "protocol" not in head:  # verdicts of a judge
                continue
            for record in records:
                answer = record["answer"]
                by = f"{head['benchmark']}, {head['protocol']}, step {head['step']}"
                found[record[KEY]].append(RunAnswer(by=by, record=answer, credit=_credit(answer)))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreDamagedError(f"{path} holds no answers that can be read ({error!r}); remove it") from error
    return dict(found)


def _credit(answer: Mapping[str, Any]) -> float:
    if "predicted" not in answer:
        return float(answer["text"].strip().lower() == answer["correct"].strip().lower())
    equal = (answer["predicted"], *answer["tied"])
    return (answer["correct"] in equal) / len(equal)


def _read_fusion(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    paths = sorted((run / "atlas").glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    if not paths:
        return {}
    table = pq.read_table(paths[-1])
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in table.to_pylist():
        values: dict[str, dict[str, float]] = defaultdict(dict)
        for column, value in row.items():
            name, _, encoder = column.partition("_")
            if name in ("weight", "norm") and encoder and value is not None:
                values[encoder][name] = round(value, 4)
        found[row["clip_id"]] = dict(values)
    return found

"""Scores of a sweep's runs by benchmark, with the published figures that were measured in the same way.

Read from all that merv-eval run has recorded of a run at its last step: multiple choice by letters or likelihood, and
open-ended answers, matched or judged. Scores by different protocols, prompts or judges are different rows. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mervcache.errors import UserError
from mervcache.files import load_json
from trainer.ablation.document import Cell, Column, Section
from trainer.ablation.importance import SETTING
from trainer.ablation.panel import seeds_text
from trainer.ablation.published import (
    BENCHMARKS,
    Conditions,
    Layout,
    OwnScore,
    alongside,
    benchmark_name,
    sampled_frames,
)
from trainer.ablation.results import RETRAINED, Member, Results, Setting, Subset, subset_name
from trainer.ablation.sweep import run_folder
from trainer.config import RECORD_FILE
from trainer.runs.score_files import FIRST_PROTOCOL, GRIDS, MASKED, OPEN_ENDED_FOLDER, SCORES_FOLDER
from trainer.runs.stage_folders import last_stage

OPEN_ENDED = "open-ended"


@dataclass(frozen=True, kw_only=True)
class BenchmarkScore:
    """Of one run on one benchmark."""

    conditions: Conditions
    questions: int
    accuracy: float
    judge_score: float | None = None  # 0 to 5


@dataclass(frozen=True, kw_only=True)
class BenchmarkScores:
    """Of all runs: a list per setting, subset and conditions, in the order of the seeds."""

    rows: Mapping[tuple[Setting, Subset, Conditions], Mapping[int, BenchmarkScore]]
    grids: Mapping[tuple[Setting, Subset], int | None]  # tokens per frame, also where they are the stored ones

    def own(self) -> list[OwnScore]:
        """Layout and conditions of every row."""
        return [self._own(*place) for place in self.rows]

    def _own(self, setting: Setting, subset: Subset, conditions: Conditions) -> OwnScore:
        layout = Layout(
            encoders=frozenset(subset),
            fusion=setting.get("fusion"),
            projector=setting.get("projector"),
            tokens_per_frame=self.grids[setting, subset],
        )
        return OwnScore(layout=layout, conditions=conditions)

    def section(self) -> Section | None:
        """A row per setting, subset and conditions; None where it would repeat the table of scores."""
        kinds = {(each.benchmark, _scored_by(each)) for _, _, each in self.rows}
        if len(kinds) < 2 and not any(benchmark in BENCHMARKS for benchmark, _ in kinds):
            return None
        found = {place: alongside(self._own(*place)) for place in self.rows}
        has_judge = any(score.judge_score is not None for scores in self.rows.values() for score in scores.values())
        columns = [SETTING, Column(name="encoders"), Column(name="seeds"), Column(name="benchmark")]
        columns += [
            Column(name="scored by"),
            Column(name="questions", unit="count"),
            Column(name="accuracy", unit="share"),
        ]
        columns += [Column(name="judge's score", unit="number")] if has_judge else []
        is_published = any(found.values())
        columns += [Column(name="published", unit="share"), Column(name="row of the paper")] if is_published else []
        rows = []
        for (setting, subset, measured), by_seed in self.rows.items():
            scores = list(by_seed.values())
            row: list[Cell] = [str(setting), subset_name(subset), seeds_text(by_seed), measured.benchmark]
            row += [_scored_by(measured), scores[0].questions, sum(s.accuracy for s in scores) / len(scores)]
            if has_judge:
                judged = [s.judge_score for s in scores if s.judge_score is not None]
                row.append(sum(judged) / len(judged) if judged else None)
            if not is_published:
                rows.append(tuple(row))
                continue
            for figure in found[setting, subset, measured] or [None]:
                same = (None, "") if figure is None else (figure.percent / 100, f"{figure.name} ({figure.table})")
                rows.append((*row, *same))
        notes = ["Accuracy: mean over seeds."]
        if is_published:
            notes.append(
                "Published (arXiv 2501.01426): of the same encoders, fusion, projector and tokens per frame, measured"
                " by the same protocol, prompt and judge on as many frames. Prompts are compared by the names of their"
                " files. What was trained, and on which data, is not compared."
            )
        return Section(
            title="Scores by benchmark", block=RETRAINED, columns=tuple(columns), rows=tuple(rows), notes=tuple(notes)
        )


def _scored_by(conditions: Conditions) -> str:
    if conditions.protocol == OPEN_ENDED:
        by = f"judge {conditions.judge}, prompt {conditions.prompt}" if conditions.judge else "normalised match"
        return f"open-ended, {by}"
    return f"{conditions.protocol}{f', prompt {conditions.prompt}' * bool(conditions.prompt)}"


def read_benchmarks(results: Results, folders: Mapping[str, Path] | None = None) -> BenchmarkScores:
    """Scores by benchmark of all retrained runs that are finished; UserError for files that hold none."""
    rows: dict[tuple[Setting, Subset, Conditions], dict[int, BenchmarkScore]] = {}
    grids: dict[tuple[Setting, Subset], int | None] = {}
    for member in sorted(results.answers, key=lambda member: member.seed):
        if member.block != RETRAINED:
            continue
        if not member.subset or (folders and member.run not in folders):
            continue
        folder = folders[member.run] if folders else last_stage(run_folder(results.folder, member.run))
        path = folder / RECORD_FILE
        if not path.is_file():
            continue
        record = load_json(path.read_bytes(), str(path))
        grids[member.setting, member.subset] = _tokens_per_frame(member, record)
        for score in _scores_of(folder, record, results.record["split"]):
            rows.setdefault((member.setting, member.subset, score.conditions), {})[member.seed] = score
    return BenchmarkScores(rows=rows, grids=grids)


def _tokens_per_frame(member: Member, record: Mapping[str, Any]) -> int | None:
    """As the run sets it, else those of a grid that all its encoders are stored at."""
    if (tokens := member.setting.get("tokens_per_frame")) is not None:
        return tokens
    stored = {shape["grid"][1] * shape["grid"][2] for shape in (record.get("shapes") or {}).values()}
    return stored.pop() if len(stored) == 1 else None


def _scores_of(folder: Path, record: Mapping[str, Any], split: str) -> Iterator[BenchmarkScore]:
    """All scores of a run at its last step, on all questions of the split."""
    identities = [facts.get("identity") or {} for facts in (record.get("encoders") or {}).values()]
    frames = sampled_frames(str(identity.get("frame_rule", "")) for identity in identities)
    scores = folder / SCORES_FOLDER
    choices = [path for path in sorted(scores.glob("*.json")) if not path.name.endswith((MASKED, GRIDS))]
    for path in [*choices, *sorted((scores / OPEN_ENDED_FOLDER).glob("*.json"))]:
        found = load_json(path.read_bytes(), str(path))
        try:
            if (found["split"], found["limit"], found["step"]) == (split, None, record["num_steps"]):
                yield from _open(found, frames) if path.parent.name == OPEN_ENDED_FOLDER else _choices(found, frames)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"{path} holds no scores of this version ({error}); remove it, or evaluate again"
            ) from error


def _choices(record: Mapping[str, Any], frames: int | None) -> Iterator[BenchmarkScore]:
    template = record.get("template")
    for source, found in record.get("benchmarks", {}).items():
        if not found["scores"]:
            continue
        yield BenchmarkScore(
            conditions=Conditions(
                benchmark=benchmark_name(source),
                protocol=record.get("protocol", FIRST_PROTOCOL),
                judge=None,
                prompt=Path(template["name"]).stem if template else "",
                frames=frames,
            ),
            questions=found["scores"][0]["questions"],
            accuracy=found["scores"][0]["accuracy"],
        )


def _open(record: Mapping[str, Any], frames: int | None) -> Iterator[BenchmarkScore]:
    judge = record["judge"]
    for source, found in record["scores"].items():
        yield BenchmarkScore(
            conditions=Conditions(
                benchmark=benchmark_name(source),
                protocol=OPEN_ENDED,
                judge=judge and judge["version"],
                prompt=Path(judge["template"]["name"]).stem if judge else "",
                frames=frames,
            ),
            questions=found[0]["questions"],
            accuracy=found[0]["judge_accuracy" if judge else "normalised"],
            judge_score=found[0].get("judge_score"),
        )

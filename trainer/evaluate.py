"""Evaluate: a run answers questions, by category, beside chance and beside runs that answer the same ones.

Comes in: a run's folder and an `EvaluationRequest`. Goes out: the scores as JSON, which the run's folder keeps too. A
text-only run, trained the same way without visual tokens (`merv-train --mode text-only`), is the one to stand beside:
what it gets right, the words alone give away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from featurestore.clips import Sample
from mervcache.console import ProgressLine, echo
from mervcache.errors import UserError
from trainer.config import LISTING, LiveRequest
from trainer.data.tokens import TokenSource
from trainer.model.multiple_choice import Answer, answer_all, questions, showable, summarise
from trainer.runs.load import LoadedRun, load_run
from trainer.runs.run_record import RunRecord, ScoreSource, write_scores
from trainer.runs.stage_folders import last_stage
from trainer.sources import TokenPlace, opened_for


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """Which questions are asked, and how; without a place, those of the one that the run was trained on."""

    store: str | None = None  # of the questions' clips
    dataset: str | None = None  # whose clips are decoded and encoded now, instead of a store
    root: str | None = None  # folder of the dataset's media and annotations
    weights: tuple[str, ...] = ()  # SPEC or NAME=SPEC: where the weights of encoders that run now are
    split: str = "heldout"
    limit: int | None = None  # questions, at most; None: all
    batch_size: int = 16  # questions at once, with all their options
    best: bool = False  # of every run the best checkpoint by validation, instead of the newest

    def __post_init__(self) -> None:
        if self.store is not None and self.media:
            raise UserError(
                f"tokens are read from a store or made on the spot: give --store or --{', --'.join(self.media)},"
                " not both"
            )

    @property
    def media(self) -> dict[str, str]:
        """What is said of a dataset, in the words of an extraction."""
        given = {"dataset": self.dataset, "root": self.root}
        return {name: value for name, value in given.items() if value is not None}


def evaluate_run(run: Path, request: EvaluationRequest, beside: Sequence[Path] = ()) -> dict[str, Any]:
    """Answer questions with a run, and the same questions with every run beside it; the run keeps its scores."""
    loaded = load_run(run, best=request.best)
    place = questions_place(run, loaded, request)
    with opened_for(loaded, place, request.weights, _device()) as (samples, source):
        has_visual = loaded.built.model.has_visual
        asked = questions(samples, source, split=request.split, has_visual=has_visual)[: request.limit]
        answers = _answers(loaded, asked, source, request)
        state = source.snapshot if isinstance(place, str) else f"live-{_digest(asked, source)[:12]}"
    others = {str(path): _answers_beside(path, asked, place, request) for path in beside}
    result = report(loaded, answers, others)
    named = place if isinstance(place, str) else place.settings["dataset"]
    _keep_scores(run, result, ScoreSource(split=request.split, limit=request.limit, store=named, snapshot=state))
    return result


def questions_place(run: Path, loaded: LoadedRun, request: EvaluationRequest) -> TokenPlace:
    """Where the questions are and their clips' tokens come from: as asked, else as in the run's training."""
    if request.store is not None:
        return request.store
    record, media = loaded.record, request.media
    if record.store and not media and not loaded.built.config.train_encoders:
        return record.store
    known = _listed(record)
    if media.get("dataset", known.get("dataset")) != known.get("dataset"):
        known = {}
    if "dataset" not in {**known, **media}:
        raise UserError(
            f"{run} names no store of its own; give the one that holds the questions with --store, or --dataset and"
            " --root to decode and encode their clips now"
        )
    return LiveRequest(settings={**known, **media})


def report(run: LoadedRun, answers: Sequence[Answer], beside: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """JSON of an evaluation; `beside` holds the answers of other runs to the same questions, by name."""
    return {
        "data_digest": run.record.data_digest,
        "step": run.step,
        "scores": [asdict(score) for score in summarise(answers)],
        "beside": {name: [asdict(score) for score in summarise(other)] for name, other in beside.items()},
        "answers": [asdict(answer) for answer in answers],
    }


def _answers(run: LoadedRun, asked: Sequence[Sample], source: TokenSource, request: EvaluationRequest) -> list[Answer]:
    with ProgressLine("score", total=len(asked), unit="questions") as line:
        answers = answer_all(run.built, asked, source, batch_size=request.batch_size, device=_device())
        return list(line.over(answers))


def _answers_beside(path: Path, asked: Sequence[Sample], place: TokenPlace, request: EvaluationRequest) -> list[Answer]:
    """Another run's answers to questions whose place the first run decided."""
    other = load_run(path, best=request.best)
    with opened_for(other, _place_beside(other, place, request), request.weights, _device()) as (_, source):
        _check_asked(path, other, asked, source)
        return _answers(other, asked, source, request)


def _place_beside(other: LoadedRun, place: TokenPlace, request: EvaluationRequest) -> TokenPlace:
    """Where another run finds the clips of the same questions."""
    if not isinstance(place, str):
        return place
    if other.built.config.train_encoders and other.record.live:
        return LiveRequest(settings=_listed(other.record))
    is_theirs = request.store is None and other.built.model.has_visual
    return other.record.store or place if is_theirs else place


def _listed(record: RunRecord) -> dict[str, Any]:
    """What decides the listing of the dataset that a live run was trained on."""
    return {name: value for name, value in (record.live or {}).items() if name in LISTING}


def _check_asked(path: Path, other: LoadedRun, asked: Sequence[Sample], source: TokenSource) -> None:
    found = showable(asked, source, has_visual=other.built.model.has_visual)
    if missing := len(asked) - len(found):
        raise UserError(
            f"{path} cannot be asked the same questions: it has no tokens of the clips of {missing} of {len(asked)};"
            " name one place for all runs, with --store or with --dataset and --root"
        )


def _digest(asked: Sequence[Sample], source: TokenSource) -> str:
    """Names what was asked about, and the media where they were looked at."""
    return source.data_digest({sample.clip_id for sample in asked if sample.clip_id is not None}, asked)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _keep_scores(run: Path, result: Mapping[str, Any], source: ScoreSource) -> None:
    try:
        write_scores(last_stage(run), result, source)
    except OSError as error:
        echo(f"the scores were not kept in {run}: {error.strerror}")

"""Score a run on multiple-choice questions, by category, next to chance and to baseline runs.

A text-only run trained the same way (`merv-train --mode text-only`) is the baseline to compare with: it shows what the
question text alone gives away. Scores are saved in the run's folder as JSON.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from featurestore.clips import Sample
from mervcache.console import ProgressLine
from mervcache.errors import UserError
from trainer.config import LISTING, LiveRequest
from trainer.data.tokens import TokenSource
from trainer.model.llm import LoadedLLM
from trainer.model.multiple_choice import Answer, answer_all, questions, showable, summarise
from trainer.runs.load import LoadedRun, load_run
from trainer.runs.run_record import RunRecord, ScoreSource, write_scores
from trainer.runs.stage_folders import last_stage
from trainer.sources import TokenPlace, opened_for

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """Questions to ask and where their clips are; by default the store or dataset that the run was trained on."""

    store: str | None = None  # of the questions' clips
    dataset: str | None = None  # its clips are decoded and encoded live, instead of read from a store
    root: str | None = None  # folder of the dataset's media and annotations
    weights: tuple[str, ...] = ()  # SPEC or NAME=SPEC: where the weights of encoders that run now are
    split: str = "heldout"
    limit: int | None = None  # questions, at most; None: all
    batch_size: int = 16  # questions at once, with all their options
    best: bool = False  # of every run the best checkpoint by validation, instead of the newest

    def __post_init__(self) -> None:
        if self.store is not None and self.media:
            raise UserError(
                f"tokens come from a store or are computed live: give --store or --{', --'.join(self.media)}, not both"
            )

    @property
    def media(self) -> dict[str, str]:
        """The given settings of a live extraction."""
        given = {"dataset": self.dataset, "root": self.root}
        return {name: value for name, value in given.items() if value is not None}


def evaluate_run(
    run: Path, request: EvaluationRequest, baselines: Sequence[Path] = (), *, llm: LoadedLLM | None = None
) -> dict[str, Any]:
    """Score `run`, and every baseline on the same questions; scores are saved in the run's folder.

    `llm` is the run's LLM where it is loaded already and was not trained.
    """
    loaded = load_run(run, best=request.best, llm=llm)
    place = questions_place(run, loaded, request)
    with opened_for(loaded, place, request.weights, _device()) as (samples, source):
        # A text-only run of a sweep answers the questions that the other runs see clips of.
        by_clip = loaded.built.model.has_visual or bool(loaded.built.config.clips_with)
        samples = questions(samples, source, split=request.split, has_visual=by_clip)[: request.limit]
        answers = _answers(loaded, samples, source, request)
        state = source.snapshot if isinstance(place, str) else f"live-{_digest(samples, source)[:12]}"
    others = {str(path): _baseline_answers(path, samples, place, request) for path in baselines}
    result = report(loaded, answers, others)
    named = place if isinstance(place, str) else place.settings["dataset"]
    _save_scores(run, result, ScoreSource(split=request.split, limit=request.limit, store=named, snapshot=state))
    return result


def questions_place(run: Path, loaded: LoadedRun, request: EvaluationRequest) -> TokenPlace:
    """Source of the questions and of their clips' tokens: as given, else as in training."""
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


def report(run: LoadedRun, answers: Sequence[Answer], baselines: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """JSON of an evaluation; `baselines` are other runs' answers to the same questions, by name."""
    return {
        "data_digest": run.record.data_digest,
        "step": run.step,
        "scores": [asdict(score) for score in summarise(answers)],
        "beside": {name: [asdict(score) for score in summarise(other)] for name, other in baselines.items()},
        "answers": [asdict(answer) for answer in answers],
    }


def _answers(
    run: LoadedRun, samples: Sequence[Sample], source: TokenSource, request: EvaluationRequest
) -> list[Answer]:
    with ProgressLine("score", total=len(samples), unit="questions") as line:
        answers = answer_all(run.built, samples, source, batch_size=request.batch_size, device=_device())
        return list(line.over(answers))


def _baseline_answers(
    path: Path, samples: Sequence[Sample], place: TokenPlace, request: EvaluationRequest
) -> list[Answer]:
    """A baseline's answers to the same questions."""
    other = load_run(path, best=request.best)
    with opened_for(other, _baseline_place(other, place, request), request.weights, _device()) as (_, source):
        _check_same_questions(path, other, samples, source)
        return _answers(other, samples, source, request)


def _baseline_place(other: LoadedRun, place: TokenPlace, request: EvaluationRequest) -> TokenPlace:
    """Where a baseline reads the clips of the same questions."""
    if not isinstance(place, str):
        return place
    if other.built.config.train_encoders and other.record.live:
        return LiveRequest(settings=_listed(other.record))
    if request.store is None and other.built.model.has_visual:
        return other.record.store or place
    return place


def _listed(record: RunRecord) -> dict[str, Any]:
    """The settings that list the dataset of a live run."""
    return {name: value for name, value in (record.live or {}).items() if name in LISTING}


def _check_same_questions(path: Path, other: LoadedRun, samples: Sequence[Sample], source: TokenSource) -> None:
    found = showable(samples, source, has_visual=other.built.model.has_visual)
    if missing := len(samples) - len(found):
        raise UserError(
            f"{path} cannot answer the same questions: it has no tokens for the clips of {missing} of {len(samples)};"
            " name one place for all runs, with --store or with --dataset and --root"
        )


def _digest(samples: Sequence[Sample], source: TokenSource) -> str:
    """Digest of the questions and of their clips' tokens or media."""
    return source.data_digest({sample.clip_id for sample in samples if sample.clip_id is not None}, samples)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _save_scores(run: Path, result: Mapping[str, Any], source: ScoreSource) -> None:
    try:
        write_scores(last_stage(run), result, source)
    except OSError as error:
        log.warning("the scores were not saved in %s: %s", run, error.strerror)

"""Score a run on the questions of benchmarks, by category, next to chance and to baseline runs.

Multiple choice by a protocol of `trainer/model/multiple_choice.py`; open-ended questions of benchmarks by generation,
compared with the right answer as `trainer/model/open_ended.py` says and, on request, by a judge (`trainer/judge.py`).

A text-only run trained the same way (`merv-train --mode text-only`) is the baseline to compare with: it shows what the
question text alone gives away. All runs of an evaluation are scored by one protocol, which every result names. Scores
are saved in the run's folder as JSON.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch

from featurestore.clips import Sample
from mervcache.errors import UserError
from mervcache.reprs import changed_fields
from trainer.answering import OPEN_ENDED, Asking, RunAnswers, answer_questions, meet
from trainer.benchmark_scores import by_benchmark, open_report
from trainer.config import LISTING, LiveRequest, Protocol, read_config
from trainer.data.tokens import TokenSource
from trainer.judge import Judge
from trainer.loop.launch import is_first_rank
from trainer.model.letters import Template
from trainer.model.llm import LoadedLLM
from trainer.model.multiple_choice import (
    WITHOUT_TOKENS,
    Answer,
    coverage,
    default_protocol,
    questions,
    showable,
    summarise,
)
from trainer.model.open_ended import MAX_NEW_TOKENS, is_open_question
from trainer.model.video_llm import Built
from trainer.runs.load import LoadedRun, load_run
from trainer.runs.predictions import PREDICTIONS_FOLDER
from trainer.runs.run_record import RunRecord, ScoreSource, write_answers, write_open_scores, write_scores
from trainer.runs.score_files import grid_scores_file, masked_scores_file
from trainer.runs.stage_folders import lacks_llm, last_stage
from trainer.sources import TokenPlace, opened_for

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """Questions to ask and where their clips are; by default the store or dataset that the run was trained on."""

    store: str | None = None  # of the questions' clips
    dataset: str | None = None  # its clips are decoded and encoded live, instead of read from a store
    root: str | None = None  # folder of the dataset's media and annotations
    options: Mapping[str, Any] = field(default_factory=dict)  # of the dataset, over those of the training
    weights: tuple[str, ...] = ()  # SPEC or NAME=SPEC: where the weights of encoders that run now are
    llm: str | None = None  # where the LLM is, if it has moved since training and is not in the run's folder
    split: str = "heldout"
    limit: int | None = None  # questions, at most; None: all
    protocol: Protocol | None = None  # None: that of the run's settings, see `default_protocol`
    letters_template: Path | None = None  # of protocol letters; None: that of the run's settings
    open_ended: bool | None = None  # ask open-ended questions: None those of benchmarks, True those of every stage
    max_new_tokens: int = MAX_NEW_TOKENS  # of an open-ended answer
    judge: Judge | None = None  # of open-ended answers
    batch_size: int = 16  # questions at once, with all their options
    best: bool = False  # of every run the best checkpoint by validation, instead of the newest
    resumes: bool = True  # reads the answers that an earlier evaluation under the same conditions has kept

    def __post_init__(self) -> None:
        if self.store is not None and self.media:
            given = ", ".join({"options": "--option"}.get(name, f"--{name}") for name in self.media)
            raise UserError(f"tokens come from a store or are computed live: give --store or {given}, not both")

    __repr__ = changed_fields

    @property
    def media(self) -> dict[str, Any]:
        """The given settings of a live extraction."""
        given = {"dataset": self.dataset, "root": self.root, "options": dict(self.options) or None}
        return {name: value for name, value in given.items() if value is not None}


def evaluate_run(
    run: Path, request: EvaluationRequest, baselines: Sequence[Path] = (), *, llm: LoadedLLM | None = None
) -> dict[str, Any]:
    """Score a run, and every baseline on the same questions.

    Predictions and scores are also saved in the run's folder.

    Parameters
    ----------
    run
        Folder of a run or an export.
    request
        Questions, and where their clips are.
    baselines
        Folders of runs that answer the same questions.
    llm
        The run's LLM where it is loaded already and was not trained.

    Returns
    -------
    dict
        What `merv-eval run --json` prints: scores by category with chance, those of the baselines, answers, and the
        number of questions without tokens.
    """
    template = _template(run, baselines, request)
    meet()
    loaded = load_run(run, best=request.best, llm=llm or request.llm)
    place = questions_place(run, loaded, request)
    is_asked = _asked(loaded, request)
    with opened_for(loaded, place, request.weights, default_device()) as (held, source):
        # A text-only run of a sweep answers the questions that the other runs see clips of.
        by_clip = loaded.built.model.has_visual or bool(loaded.built.config.clips_with)
        found = questions(held, source, split=request.split, has_visual=by_clip, is_asked=is_asked)
        samples = found[: request.limit]
        state = _state(place, samples, source)
        answers = _answers(run, loaded, samples, source, request, template, state)
    others = {path: _baseline_answers(path, samples, place, request, template) for path in baselines}
    asked = coverage(held, found, samples, request.split, is_asked=is_asked)
    result = report(loaded, answers.all_choices, {str(path): other.all_choices for path, other in others.items()}) | {
        "split": request.split,
        "questions": asked,
        "lost": sum(outcomes.get(WITHOUT_TOKENS, 0) for outcomes in asked.values()),
        "template": template and asdict(template),
        "benchmarks": by_benchmark(answers, {str(path): other for path, other in others.items()}),
    }
    if answers.texts and is_first_rank():
        folders = {"": run, **{str(path): path for path in baselines}}
        result["open_ended"] = open_report(
            answers,
            {str(path): other for path, other in others.items()},
            request.judge,
            max_new_tokens=request.max_new_tokens,
            folders={name: last_stage(path) / PREDICTIONS_FOLDER for name, path in folders.items()},
        )
    named = place if isinstance(place, str) else place.settings["dataset"]
    if is_first_rank():
        _save_scores(run, result, ScoreSource(split=request.split, limit=request.limit, store=named, snapshot=state))
    return result


def evaluate_masked(
    run: Path, request: EvaluationRequest, subsets: Sequence[Sequence[str]], *, llm: LoadedLLM | None = None
) -> dict[str, Any]:
    """Answers of one checkpoint with only some of its encoders shown, for each of `subsets`; saved in the run's folder.

    The empty subset is the model without visual tokens. The method is "one-shot" for a run that was trained with
    `mask_encoders`, else "post-hoc": such a run has never seen a subset before.
    """
    loaded = load_run(run, best=request.best, llm=llm or request.llm)
    if not loaded.built.model.has_visual:
        raise UserError(f"{run} is a text-only run: it has no encoders to mask")
    views = {"+".join(subset): replace(loaded.built, shown=tuple(subset)) for subset in subsets}
    method = "post-hoc" if loaded.built.config.mask_encoders == "none" else "one-shot"
    result = _evaluate_views(run, loaded, request, views, "subsets") | {"method": method}
    _write_views(run, masked_scores_file, result)
    return result


def evaluate_grids(
    run: Path, request: EvaluationRequest, grids: Sequence[int] = (), *, llm: LoadedLLM | None = None
) -> dict[str, Any]:
    """Answers of one checkpoint at each of its nested grids, or at some of them; saved in the run's folder."""
    loaded = load_run(run, best=request.best, llm=llm or request.llm)
    known = loaded.built.config.projector.nested_grids
    if not known or not loaded.built.model.has_visual:
        raise UserError(f"{run} was trained at one grid: a run of several has the setting projector.nested_grids")
    if unknown := [tokens for tokens in grids if tokens not in known]:
        raise UserError(f"{run} was trained at {', '.join(map(str, known))} tokens per frame, not at {unknown[0]}")
    views = {str(tokens): replace(loaded.built, tokens_per_frame=tokens) for tokens in grids or known}
    result = _evaluate_views(run, loaded, request, views, "grids") | {"method": "one-shot"}
    _write_views(run, grid_scores_file, result)
    return result


def _evaluate_views(
    run: Path, loaded: LoadedRun, request: EvaluationRequest, views: Mapping[str, Built], key: str
) -> dict[str, Any]:
    """Answers to the same questions by several views of one model, under `key` by the names of the views."""
    template, place = _template(run, (), request), questions_place(run, loaded, request)
    with opened_for(loaded, place, request.weights, default_device()) as (held, source):
        samples = questions(held, source, split=request.split, has_visual=True)[: request.limit]
        state = _state(place, samples, source)
        answers = {
            name: _answers(run, replace(loaded, built=built), samples, source, request, template, state).all_choices
            for name, built in views.items()
        }
    return {
        "split": request.split,
        "limit": request.limit,
        "snapshot": source.snapshot,
        "step": loaded.step,
        "protocol": next(iter(answers.values()))[0].protocol,
        "template": template and asdict(template),
        key: {
            name: [{**asdict(answer), "credit": answer.credit} for answer in found] for name, found in answers.items()
        },
    }


def _write_views(run: Path, file: Callable[..., Path], result: Mapping[str, Any]) -> None:
    conditions = {"protocol": result["protocol"], "limit": result["limit"]}
    write_answers(file(last_stage(run), result["split"], **conditions), result)


def _template(run: Path, baselines: Sequence[Path], request: EvaluationRequest) -> Template | None:
    """The prompt of protocol letters; None for likelihood. Refuses runs that would be scored by different protocols."""
    configs = {path: read_config(last_stage(path)) for path in (run, *baselines)}
    protocols = {path: request.protocol or default_protocol(config) for path, config in configs.items()}
    if len(set(protocols.values())) > 1:
        named = "; ".join(f"{path} by {protocol}" for path, protocol in protocols.items())
        raise UserError(
            f"these runs are scored by different protocols unless one is named, and their scores are not comparable:"
            f" {named}; give --protocol {' or --protocol '.join(get_args(Protocol))}"
        )
    if protocols[run] == "likelihood":
        if request.letters_template is not None:
            raise UserError("--letters-template is the prompt of protocol letters, and the protocol is likelihood")
        return None
    return Template.read(request.letters_template or configs[run].letters_template)


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
    return LiveRequest(settings={**known, **media, "options": {**known.get("options", {}), **request.options}})


def report(run: LoadedRun, answers: Sequence[Answer], baselines: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """JSON of an evaluation; `baselines` are other runs' answers to the same questions, by name.

    Raises UserError for answers by different protocols.
    """
    protocols = {answer.protocol for other in (answers, *baselines.values()) for answer in other}
    if len(protocols) > 1:
        raise UserError(
            f"scores by {' and '.join(sorted(protocols))} are not comparable; score all runs by one protocol"
        )
    return {
        "data_digest": run.record.data_digest,
        "step": run.step,
        "protocol": next(iter(protocols), OPEN_ENDED),
        "scores": [asdict(score) for score in summarise(answers)] if answers else [],
        "beside": {name: [asdict(score) for score in summarise(other)] for name, other in baselines.items() if other},
        "answers": [{**asdict(answer), "credit": answer.credit} for answer in answers],
    }


def _asked(run: LoadedRun, request: EvaluationRequest) -> Callable[[Sample], bool]:
    """Which samples are asked: those with options, and open-ended questions of benchmarks by default."""
    asks_open = run.built.config.prompt != "caption" if request.open_ended is None else request.open_ended
    return lambda sample: bool(sample.options) or (asks_open and is_open_question(sample, bool(request.open_ended)))


def _answers(
    path: Path,
    run: LoadedRun,
    samples: Sequence[Sample],
    source: TokenSource,
    request: EvaluationRequest,
    template: Template | None,
    state: str,
) -> RunAnswers:
    """Answers of the run in the folder `path`, which keeps them; `state` names the state of the tokens."""
    asking = Asking(
        template=template,
        batch_size=request.batch_size,
        max_new_tokens=request.max_new_tokens,
        device=default_device(),
        facts={"split": request.split, "snapshot": state},
        resumes=request.resumes,
    )
    return answer_questions(last_stage(path), run, samples, source, asking, name=str(path))


def _baseline_answers(
    path: Path,
    samples: Sequence[Sample],
    place: TokenPlace,
    request: EvaluationRequest,
    template: Template | None,
) -> RunAnswers:
    """A baseline's answers to the same questions."""
    other = load_run(path, best=request.best, llm=request.llm if lacks_llm(last_stage(path)) else None)
    own_place = _baseline_place(other, place, request)
    with opened_for(other, own_place, request.weights, default_device()) as (_, source):
        _check_same_questions(path, other, samples, source)
        return _answers(path, other, samples, source, request, template, _state(own_place, samples, source))


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


def _state(place: TokenPlace, samples: Sequence[Sample], source: TokenSource) -> str:
    """Names the tokens: the snapshot of a store, else a digest of the questions and of their clips' media."""
    if isinstance(place, str):
        return source.snapshot
    clips = {sample.clip_id for sample in samples if sample.clip_id is not None}
    return f"live-{source.data_digest(clips, samples)[:12]}"


def default_device() -> str:
    """The device that runs are scored on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _save_scores(run: Path, result: Mapping[str, Any], source: ScoreSource) -> None:
    choices = {name: value for name, value in result.items() if name != "open_ended"}
    try:
        if result["scores"]:
            write_scores(last_stage(run), choices, source)
        if "open_ended" in result:
            write_open_scores(last_stage(run), {"step": result["step"], **result["open_ended"]}, source)
    except OSError as error:
        log.warning("the scores were not saved in %s: %s", run, error.strerror)

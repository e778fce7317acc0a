"""Answers of a run to the questions of benchmarks, a benchmark at a time, kept line by line in the run's folder.

Batches follow from the questions alone. A killed evaluation goes on with the batches that lack an answer, and several
processes take turns at them, so that each question is computed in the same batch however the work was cut.
"""

from __future__ import annotations

import atexit
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import PartialState

from featurestore.clips import Sample
from mervcache.console import ProgressLine
from mervcache.errors import UserError
from mervcache.files import record_digest
from trainer.config import TrainConfig
from trainer.data.prompts import Rendered
from trainer.data.tokens import TokenSource
from trainer.loop.distributed import leave_group
from trainer.model import letters, multiple_choice, open_ended
from trainer.model.letters import Template
from trainer.model.multiple_choice import Answer
from trainer.model.open_ended import OpenAnswer
from trainer.paths import PATH_SETTINGS
from trainer.runs.load import LoadedRun
from trainer.runs.predictions import PREDICTIONS_FOLDER, RecordLog, log_path
from trainer.runs.run_record import software_versions

OPEN_ENDED = "open-ended"
LONGEST_WAIT = timedelta(days=1)  # for the process that has the longest answers
KEY = "question"  # of a line: digest of the sample

AnyAnswer = TypeVar("AnyAnswer", Answer, OpenAnswer)


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How questions are asked."""

    template: Template | None  # of multiple choice by letters; None: by likelihood
    batch_size: int
    max_new_tokens: int
    device: str
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else decides answers: split, place and snapshot
    resumes: bool = True  # reads what an earlier evaluation has answered


@dataclass(frozen=True, kw_only=True)
class RunAnswers:
    """Answers of one run by benchmark, in the order of the questions."""

    choices: Mapping[str, list[Answer]]
    texts: Mapping[str, list[OpenAnswer]]

    @property
    def all_choices(self) -> list[Answer]:
        """Of every benchmark."""
        return [answer for answers in self.choices.values() for answer in answers]


@dataclass(frozen=True, kw_only=True)
class _Kind(Generic[AnyAnswer]):
    """One of the two kinds of question."""

    protocol: str
    answer: Callable[[Sequence[Sample]], list[AnyAnswer]]  # in one batch
    prompt: Callable[[Sample], Rendered]
    parse: Callable[[dict[str, Any]], AnyAnswer]
    has_visual: bool  # the model reads clips
    facts: Mapping[str, Any]


def answer_questions(
    path: Path | None, run: LoadedRun, samples: Sequence[Sample], source: TokenSource, asking: Asking, *, name: str
) -> RunAnswers:
    """Answer all samples, by benchmark and kind; predictions are kept in `path`, the folder of the run, if given.

    `name` is that of the run in messages. Raises UserError for questions that the model cannot read whole, before any
    is asked, and for output that is not finite.
    """
    by_kind: dict[bool, dict[str, list[Sample]]] = {True: defaultdict(list), False: defaultdict(list)}
    for sample in samples:
        by_kind[bool(sample.options)][sample.source].append(sample)
    built = run.built
    multiple_choice.check_whole(built, [sample for sample in samples if sample.options], asking.template)
    open_ended.check_fits(built, [sample for sample in samples if not sample.options])
    built.model.to(asking.device).eval()
    kinds = {True: _choice_kind(run, source, asking, name), False: _open_kind(run, source, asking, name)}
    found: dict[bool, dict[str, list]] = {True: {}, False: {}}
    with ProgressLine("score", total=len(samples), unit="questions") as line:
        for has_options, benchmarks in by_kind.items():
            kind = kinds[has_options]
            for benchmark, asked in benchmarks.items():
                conditions, file = _conditions(run, benchmark, kind, asking), None
                if path is not None:
                    label = f"{benchmark}-{kind.protocol}-step{run.step}"
                    file = log_path(path / PREDICTIONS_FOLDER, label, conditions)
                found[has_options][benchmark] = _answered(file, conditions, kind, asked, source, asking, line)
    return RunAnswers(choices=found[True], texts=found[False])


def ranks() -> tuple[int, int]:
    """Number of this process and how many answer together; (0, 1) where it was not launched with others."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _conditions(run: LoadedRun, benchmark: str, kind: _Kind, asking: Asking) -> dict[str, Any]:
    """All that decides the answers, but not how they are computed in batches and by how many processes."""
    return {
        "benchmark": benchmark,
        "protocol": kind.protocol,
        **kind.facts,
        "step": run.step,
        "weights": run.weights_digest,
        "settings": record_digest(_without_folders(run.built.config).to_yaml())[:32],
        "shown": None if run.built.shown is None else list(run.built.shown),
        "tokens_per_frame": run.built.tokens_per_frame,
        **asking.facts,
        "versions": software_versions(),
    }


def _without_folders(config: TrainConfig) -> TrainConfig:
    """The settings with paths cut to their names: a run that has moved goes on with the answers it has."""
    paths = {name: value for name in PATH_SETTINGS if (value := getattr(config, name)) is not None}
    return replace(config, **{name: Path(value).name for name, value in paths.items()})


def _choice_kind(run: LoadedRun, source: TokenSource, asking: Asking, name: str) -> _Kind[Answer]:
    built, template = run.built, asking.template
    options = {"device": asking.device, "template": template, "run": name}

    def prompt(sample: Sample) -> Rendered:
        if template is not None:
            return letters.render(built, sample, template)
        return built.renderer.question(sample.turns, has_clip=sample.clip_id is not None)

    def parse(record: dict[str, Any]) -> Answer:
        return Answer(**{**record, "tied": tuple(record["tied"]), "scores": tuple(record["scores"])})

    return _Kind(
        protocol="likelihood" if template is None else "letters",
        answer=lambda part: multiple_choice.answer_part(built, part, source, **options),
        prompt=prompt,
        parse=parse,
        has_visual=built.model.has_visual,
        facts={"template": template and asdict(template)},
    )


def _open_kind(run: LoadedRun, source: TokenSource, asking: Asking, name: str) -> _Kind[OpenAnswer]:
    built, limit = run.built, asking.max_new_tokens

    def answer(part: Sequence[Sample]) -> list[OpenAnswer]:
        return open_ended.answer_batch(built, part, source, asking.device, max_new_tokens=limit, run=name)

    return _Kind(
        protocol=OPEN_ENDED,
        answer=answer,
        prompt=lambda sample: open_ended.render(built, sample),
        parse=lambda record: OpenAnswer(**record),
        has_visual=built.model.has_visual,
        facts={"template": None, "max_new_tokens": limit},
    )


def _answered(
    file: Path | None,
    conditions: Mapping[str, Any],
    kind: _Kind[AnyAnswer],
    samples: Sequence[Sample],
    source: TokenSource,
    asking: Asking,
    line: ProgressLine,
) -> list[AnyAnswer]:
    """Answers in the order of the samples; those in the file are not computed again."""
    rank, num_ranks = ranks()
    records = RecordLog(file, conditions, key=KEY, rank=rank, starts_anew=not asking.resumes)
    meet()  # nobody writes before all have read: so all share out the same missing batches
    keyed = [(sample.digest, sample) for sample in samples]
    batches = [keyed[start : start + asking.batch_size] for start in range(0, len(keyed), asking.batch_size)]
    missing = [part for part in batches if any(key not in records.records for key, _ in part)]
    line.advance(len(samples) - sum(map(len, missing)))
    own = missing[rank::num_ranks]
    with records:
        if num_ranks > 1 and not records.is_kept:
            raise UserError(f"{num_ranks} processes answer together through files, and {file} cannot be written")
        for index, part in enumerate(own):
            coming = [sample.clip_id for _, sample in (*part, *(own[index + 1] if index + 1 < len(own) else ()))]
            source.expect(clip_id for clip_id in coming if clip_id is not None and kind.has_visual)
            answers = kind.answer([sample for _, sample in part])
            records.add(
                _record(key, sample, kind, answer)
                for (key, sample), answer in zip(part, answers, strict=True)
                if key not in records.records
            )
            line.advance(len(part))
    meet()
    if num_ranks > 1:
        records.read()
        meet()
    if rank == 0:
        records.merge([key for key, _ in keyed])
    meet()
    return [kind.parse(records.records[key]["answer"]) for key, _ in keyed]


def _record(key: str, sample: Sample, kind: _Kind[AnyAnswer], answer: AnyAnswer) -> dict[str, Any]:
    prompt = kind.prompt(sample)
    return {
        KEY: key,
        "prompt_sha256": record_digest([prompt.visual_at, list(prompt.input_ids)]),
        "answer": asdict(answer),
    }


def meet() -> None:
    """Wait for the processes that answer together; the first time each takes its device."""
    num_ranks = ranks()[1]
    if num_ranks > 1:
        # Without `cpu` accelerate leaves processes on a machine without a GPU alone, and each would answer everything.
        atexit.register(leave_group)
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
        if state.num_processes != num_ranks:
            raise UserError(f"WORLD_SIZE is {num_ranks}, and accelerate sees {state.num_processes} processes")
        state.wait_for_everyone()

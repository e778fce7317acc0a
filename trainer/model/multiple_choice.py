"""Multiple choice: questions of a split, answered by one of two protocols, and accuracy by category.

`likelihood`: an option's score is the mean log-likelihood of its tokens with EOS, in the prompt format of the training;
the best one is the answer, and of k equally good ones each is 1/k of it. `letters`: see `trainer/model/letters.py`.
Chance is the mean of 1 / number of options. Scores of the two protocols are not comparable.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from featurestore.clips import Sample, Turn
from mervcache.errors import UserError
from trainer.config import TRAINED_SPLIT, Protocol, TrainConfig
from trainer.data.collate import Batch, make_batch
from trainer.data.prompts import Rendered
from trainer.data.tokens import TokenSource
from trainer.model import letters, shared_prefix
from trainer.model.letters import Template
from trainer.model.video_llm import Built, shown_to

OVERALL = "all"  # category of the line over all samples
UNNAMED = "no category"  # that of samples which name none
FIRST_CLIPS = "it keeps a dataset's first clips, often none of the held-out ones"  # a limit of an extraction
# Scores that differ by less are equal: the same value for options of unlike length, as float32 sums round it.
TIE_TOLERANCE = 1e-6
BENCHMARK_STAGE = "eval"  # of the samples that a benchmark gives
CAPTION_STAGE = "align"  # its samples ask nothing
# What became of a split's questions.
SCORED, OPEN_ENDED = "scored", "open-ended, which are not scored"
WITHOUT_TOKENS, BEYOND_LIMIT = "without tokens of their clips", "beyond --limit"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question answered."""

    sample_id: str
    category: str
    num_options: int
    predicted: int | None  # index of the chosen option, of tied ones the first; None: nothing that can be read
    correct: int
    protocol: Protocol = "likelihood"
    tied: tuple[int, ...] = ()  # further options that are as good as the predicted one
    scores: tuple[float, ...] = ()  # likelihood: mean log-likelihood of each option
    text: str | None = None  # letters: what the model wrote
    clip_id: str | None = None  # what the question is about; None: text alone

    @property
    def credit(self) -> float:
        """1 for the right option, 1/k where it is one of k equally good ones, else 0; NaN where scores are."""
        if not all(math.isfinite(score) for score in self.scores):
            return math.nan
        return (self.correct in (self.predicted, *self.tied)) / (1 + len(self.tied))


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy on the questions of one category."""

    category: str
    protocol: Protocol
    questions: int
    accuracy: float
    chance: float
    tied: int  # questions whose best options are equally good
    unreadable: int  # questions whose answer is no letter of theirs; they count as wrong


def default_protocol(config: TrainConfig) -> Protocol:
    """The protocol of a run's scores: letters, but a fresh LLM has never read an instruction."""
    return config.protocol or ("likelihood" if config.has_fresh_llm else "letters")


def questions(
    samples: Sequence[Sample],
    source: TokenSource,
    *,
    split: str,
    has_visual: bool,
    is_asked: Callable[[Sample], bool] = lambda sample: bool(sample.options),
) -> list[Sample]:
    """Samples of that split that are asked, by default those with options, with tokens where clips are shown."""
    found = [sample for sample in samples if sample.split == split and is_asked(sample)]
    found = showable(found, source, has_visual=has_visual)
    if not found:
        raise UserError(_no_question(samples, split, is_asked))
    return found


def coverage(
    samples: Sequence[Sample],
    answerable: Sequence[Sample],
    scored: Sequence[Sample],
    split: str,
    *,
    is_asked: Callable[[Sample], bool] = lambda sample: bool(sample.options),
) -> dict[str, dict[str, int]]:
    """Benchmark -> how many of the split's questions were scored, and how many not, by reason."""
    has_tokens = {(sample.source, sample.sample_id) for sample in answerable}
    is_scored = {(sample.source, sample.sample_id) for sample in scored}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        if sample.split != split or sample.stage == CAPTION_STAGE:
            continue
        key = sample.source, sample.sample_id
        if not is_asked(sample):
            outcome = OPEN_ENDED
        elif key not in has_tokens:
            outcome = WITHOUT_TOKENS
        else:
            outcome = SCORED if key in is_scored else BEYOND_LIMIT
        counts[sample.source].update([outcome])
    order = (SCORED, OPEN_ENDED, WITHOUT_TOKENS, BEYOND_LIMIT)
    return {name: {o: counts[name][o] for o in order if counts[name][o] or o == SCORED} for name in sorted(counts)}


def showable(samples: Sequence[Sample], source: TokenSource, *, has_visual: bool) -> list[Sample]:
    """Those whose clip has tokens, where the model reads clips; text-only samples always."""
    if not has_visual:
        return list(samples)
    known = source.available({sample.clip_id for sample in samples if sample.clip_id is not None})
    return [sample for sample in samples if sample.clip_id is None or sample.clip_id in known]


def _no_question(samples: Sequence[Sample], split: str, is_asked: Callable[[Sample], bool]) -> str:
    """Which questions there are, so that the next command is the right one."""
    counts = Counter(sample.split for sample in samples if sample.options)
    held = ", ".join(f"{count} of split {name!r}" for name, count in counts.items()) or "none"
    for name, outcomes in coverage(samples, (), (), split, is_asked=is_asked).items():
        if outcomes.get(OPEN_ENDED):
            held += f"; {name} has {outcomes[OPEN_ENDED]} open-ended of split {split!r}, which are not scored"
    others = [name for name in counts if name not in (split, TRAINED_SPLIT)]
    silent = CAPTION_STAGE, BENCHMARK_STAGE
    conversations = Counter(one.split for one in samples if not one.options and one.stage not in silent)
    if others:
        advice = f"Use --split {others[0]}"
    elif conversations:
        name = split if conversations[split] else next(iter(conversations))
        known = "which the run was trained on, " if name == TRAINED_SPLIT else ""
        advice = (
            f"Its {conversations[name]:,} conversations of split {name!r}, {known}are asked with --split {name}"
            " --open-ended: answers are generated and compared with their own"
        )
    else:
        advice = (
            f"To measure a run, extract again without --limit if the store was made with it ({FIRST_CLIPS}), or"
            " add questions with `merv-pipeline extract --dataset eval --root DIR --store STORE` and the settings the"
            " store was made with"
        )
    return (
        f"no multiple-choice question of split {split!r} has tokens of every encoder; the store holds {held}. {advice}"
    )


def answer_all(
    built: Built,
    samples: Sequence[Sample],
    source: TokenSource,
    *,
    batch_size: int = 16,
    device: str = "cpu",
    template: Template | None = None,
    run: str = "the run",
) -> Iterator[Answer]:
    """Answer questions, `batch_size` at a time: by letters with a template, else by the likelihood of all options.

    Raises UserError that names `run` and the question where the output of the model is not finite.
    """
    check_whole(built, samples, template)
    built.model.to(device).eval()
    for start in range(0, len(samples), batch_size):
        if built.model.has_visual:
            coming = samples[start : start + 2 * batch_size]
            source.expect(sample.clip_id for sample in coming if sample.clip_id is not None)
        part = samples[start : start + batch_size]
        yield from answer_part(built, part, source, device=device, template=template, run=run)


def answer_part(
    built: Built,
    samples: Sequence[Sample],
    source: TokenSource,
    *,
    device: str = "cpu",
    template: Template | None = None,
    run: str = "the run",
) -> list[Answer]:
    """`answer_all` of one batch, by a model that is on the device, of questions that `check_whole` has seen."""
    if template is None:
        answers = answer_batch(built, samples, source, device, shares_prompt=True)
    else:
        texts = letters.generate_answers(built, samples, source, template, device)
        answers = [_lettered(sample, text) for sample, text in zip(samples, texts, strict=True)]
    for answer in answers:
        if math.isnan(answer.credit):
            raise UserError(
                f"{run}: the model's output is not finite (NaN or infinite) at question {answer.sample_id}, so it"
                " has no score; look for such values in the run's metrics, and score an older checkpoint"
            )
    return answers


def answer_batch(
    built: Built,
    samples: Sequence[Sample],
    source: TokenSource,
    device: torch.device | str,
    *,
    shares_prompt: bool = False,
) -> list[Answer]:
    """Answer questions by likelihood with the current weights, in one forward of all options as whole sequences.

    With `shares_prompt` a question's prompt is read once for all of its options where the LLM can, see
    `trainer.model.shared_prefix`: not where ranks must all compute alike. Options that the model reads as the same
    tokens are scored once, so that they are equally good to the bit.
    """
    choices: list[Sample] = []
    places: dict[tuple[int, tuple[int, ...]], int] = {}  # question and tokens -> place among the choices
    options: list[list[int]] = []  # of each question
    for number, sample in enumerate(samples):
        options.append([])
        for option in sample.options:
            choice = with_answer(sample, option)
            place = places.setdefault((number, built.renderer(choice.turns).input_ids), len(choices))
            if place == len(choices):
                choices.append(choice)
            options[-1].append(place)
    owners = [number for number, _ in places]
    scores = _shared_scores(built, samples, choices, owners, source, device) if shares_prompt else None
    if scores is None:
        batch = batch_of(built, choices, source).to(device)
        with built.autocast(device):
            scores = built.model.score(batch).tolist()
    return [
        _answer(sample, tuple(scores[place] for place in found)) for sample, found in zip(samples, options, strict=True)
    ]


def _shared_scores(
    built: Built,
    samples: Sequence[Sample],
    choices: Sequence[Sample],
    owners: Sequence[int],
    source: TokenSource,
    device: torch.device | str,
) -> list[float] | None:
    """Scores of the choices, of which `owners` are the questions in order; None where prompts cannot be shared."""
    if not shared_prefix.can_share(built.model):
        return None
    renderings: list[list[Rendered]] = [[] for _ in samples]
    for choice, owner in zip(choices, owners, strict=True):
        renderings[owner].append(_rendered(built, choice))
    split = [shared_prefix.split(found) for found in renderings]
    questions = [each for each in split if each is not None]
    if len(questions) < len(split):
        return None
    prefixes = _batch([one.prefix for one in questions], built, samples, source)
    with built.autocast(device):
        found = shared_prefix.score_shared(built.model, prefixes.to(device), questions)
    return None if found is None else [score for of_question in found for score in of_question]


def is_whole(built: Built, sample: Sample) -> bool:
    """Whether the model can read every option of a question to its end."""
    has_clip = sample.clip_id is not None
    choices = (with_answer(sample, option).turns for option in sample.options)
    return not any(built.renderer(turns, has_clip=has_clip).is_cut for turns in choices)


def check_whole(built: Built, samples: Sequence[Sample], template: Template | None) -> None:
    """A prompt or an option that is cut off has no score; said before hours of other questions."""
    cut = [
        sample.sample_id
        for sample in samples
        if not (is_whole(built, sample) if template is None else letters.fits(built, sample, template))
    ]
    if cut:
        raise UserError(
            f"{len(cut)} of {len(samples)} questions are longer than the {built.renderer.max_tokens:,} tokens of text"
            f" that the run reads, which would cut their options off: {', '.join(cut[:5])}; leave them out of"
            " the samples, or score a run with a larger max_text_tokens or an LLM with a longer context"
        )


def batch_of(built: Built, samples: Sequence[Sample], source: TokenSource) -> Batch:
    """Samples as the model reads them: rendered, and with their clips' tokens where it looks at clips."""
    return _batch([_rendered(built, sample) for sample in samples], built, samples, source)


def _rendered(built: Built, sample: Sample) -> Rendered:
    return built.renderer(sample.turns, has_clip=sample.clip_id is not None)


def _batch(rendered: Sequence[Rendered], built: Built, samples: Sequence[Sample], source: TokenSource) -> Batch:
    model = built.model
    return make_batch(
        rendered,
        [sample.clip_id if model.has_visual else None for sample in samples],
        source,
        model.num_visual_tokens_at(built.tokens_per_frame),
        model.context,
        **shown_to(built, len(samples)),
    )


def with_answer(sample: Sample, option: str) -> Sample:
    """The sample with `option` as its last answer."""
    return replace(sample, turns=(*sample.turns[:-1], Turn(role="gpt", text=option)))


def summarise(answers: Sequence[Answer]) -> list[Score]:
    """Overall first, then by category in alphabetical order; where none is named, all is said by the first line."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.category].append(answer)
    if set(groups) == {UNNAMED}:
        groups.clear()
    return [_score(OVERALL, answers), *(_score(name, groups[name]) for name in sorted(groups))]


def _answer(sample: Sample, scores: tuple[float, ...]) -> Answer:
    """The answer that scores give; without a prediction where one of them is not finite."""
    if not all(math.isfinite(score) for score in scores):
        return replace(_unanswered(sample), scores=scores)
    best = max(scores)
    tied = [index for index, score in enumerate(scores) if math.isclose(score, best, rel_tol=TIE_TOLERANCE)]
    return replace(_unanswered(sample), predicted=tied[0], tied=tuple(tied[1:]), scores=scores)


def _lettered(sample: Sample, text: str | None) -> Answer:
    """The answer that a text gives; None stands for output that is not finite."""
    answer = replace(_unanswered(sample), protocol="letters")
    if text is None:
        return replace(answer, scores=(math.nan,))
    return replace(answer, predicted=letters.read_letter(text, len(sample.options)), text=text)


def _unanswered(sample: Sample) -> Answer:
    return Answer(
        sample_id=sample.sample_id,
        category=sample.category or UNNAMED,
        num_options=len(sample.options),
        predicted=None,
        correct=cast("int", sample.answer_index),  # a sample with options has it
        clip_id=sample.clip_id,
    )


def _score(category: str, answers: Sequence[Answer]) -> Score:
    protocols: list[Protocol] = sorted({answer.protocol for answer in answers})
    if len(protocols) > 1:
        raise ValueError(f"answers of protocols {', '.join(protocols)} have no common score")
    return Score(
        category=category,
        protocol=protocols[0],
        questions=len(answers),
        accuracy=sum(answer.credit for answer in answers) / len(answers),
        chance=sum(1 / answer.num_options for answer in answers) / len(answers),
        tied=sum(bool(answer.tied) for answer in answers),
        unreadable=sum(answer.predicted is None for answer in answers),
    )

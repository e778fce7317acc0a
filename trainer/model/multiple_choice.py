"""Multiple choice: options scored by likelihood, and accuracy by category.

An option's score is the mean log-likelihood of its tokens with EOS, in the prompt format of the training; the best one
is the answer. Chance is the mean of 1 / number of options.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from featurestore.clips import Sample, Turn
from mervcache.errors import UserError
from trainer.data.batches import Batch, make_batch
from trainer.data.tokens import TokenSource
from trainer.model.video_llm import Built

OVERALL = "all"  # category of the line over all samples
UNNAMED = "no category"  # that of samples which name none
TRAINED_SPLIT = "train"  # its questions measure nothing
FIRST_CLIPS = "it keeps a dataset's first clips, often none of the held-out ones"  # a limit of an extraction


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question answered."""

    sample_id: str
    category: str
    num_options: int
    predicted: int  # index of the option with the best score
    correct: int
    scores: tuple[float, ...]  # mean log-likelihood of each option


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy on the questions of one category."""

    category: str
    questions: int
    accuracy: float
    chance: float


def questions(samples: Sequence[Sample], source: TokenSource, *, split: str, has_visual: bool) -> list[Sample]:
    """Samples of that split that have options and, where clips are shown, tokens."""
    found = [sample for sample in samples if sample.options and sample.split == split]
    found = showable(found, source, has_visual=has_visual)
    if not found:
        raise UserError(_no_question(samples, split))
    return found


def showable(samples: Sequence[Sample], source: TokenSource, *, has_visual: bool) -> list[Sample]:
    """Those whose clip has tokens, where the model reads clips; text-only samples always."""
    if not has_visual:
        return list(samples)
    known = source.available({sample.clip_id for sample in samples if sample.clip_id is not None})
    return [sample for sample in samples if sample.clip_id is None or sample.clip_id in known]


def _no_question(samples: Sequence[Sample], split: str) -> str:
    """Which questions there are, so that the next command is the right one."""
    counts = Counter(sample.split for sample in samples if sample.options)
    held = ", ".join(f"{count} of split {name!r}" for name, count in counts.items()) or "none"
    others = [name for name in counts if name not in (split, TRAINED_SPLIT)]
    if others:
        advice = f"Use --split {others[0]}"
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
    built: Built, samples: Sequence[Sample], source: TokenSource, *, batch_size: int = 16, device: str = "cpu"
) -> Iterator[Answer]:
    """Answer questions, `batch_size` at a time with all their options."""
    _check_whole(built, samples)
    built.model.to(device).eval()
    for start in range(0, len(samples), batch_size):
        if built.model.has_visual:
            coming = samples[start : start + 2 * batch_size]
            source.expect(sample.clip_id for sample in coming if sample.clip_id is not None)
        yield from answer_batch(built, samples[start : start + batch_size], source, device)


def answer_batch(
    built: Built, samples: Sequence[Sample], source: TokenSource, device: torch.device | str
) -> list[Answer]:
    """Answer questions in one forward, with the current weights."""
    choices = [with_answer(sample, option) for sample in samples for option in sample.options]
    batch = batch_of(built, choices, source).to(device)
    with built.autocast(device):
        scores = iter(built.model.score(batch).tolist())
    return [_answer(sample, tuple(next(scores) for _ in sample.options)) for sample in samples]


def is_whole(built: Built, sample: Sample) -> bool:
    """Whether the model can read every option of a question to its end."""
    has_clip = sample.clip_id is not None
    choices = (with_answer(sample, option).turns for option in sample.options)
    return not any(built.renderer(turns, has_clip=has_clip).is_cut for turns in choices)


def _check_whole(built: Built, samples: Sequence[Sample]) -> None:
    """An option that is cut off has no score; said before hours of other questions."""
    if cut := [sample.sample_id for sample in samples if not is_whole(built, sample)]:
        raise UserError(
            f"{len(cut)} of {len(samples)} questions are longer than the {built.renderer.max_tokens:,} tokens of text"
            f" that the run reads, which would cut their options off: {', '.join(cut[:5])}; leave them out of"
            " the samples, or score a run with a larger max_text_tokens or an LLM with a longer context"
        )


def batch_of(built: Built, samples: Sequence[Sample], source: TokenSource) -> Batch:
    """Samples as the model reads them: rendered, and with their clips' tokens where it looks at clips."""
    model = built.model
    return make_batch(
        [built.renderer(sample.turns, has_clip=sample.clip_id is not None) for sample in samples],
        [sample.clip_id if model.has_visual else None for sample in samples],
        source,
        model.num_visual_tokens,
        model.context,
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
    return Answer(
        sample_id=sample.sample_id,
        category=sample.category or UNNAMED,
        num_options=len(sample.options),
        predicted=int(torch.tensor(scores).argmax()),
        correct=sample.answer_index,
        scores=scores,
    )


def _score(category: str, answers: Sequence[Answer]) -> Score:
    return Score(
        category=category,
        questions=len(answers),
        accuracy=sum(answer.predicted == answer.correct for answer in answers) / len(answers),
        chance=sum(1 / answer.num_options for answer in answers) / len(answers),
    )

"""Open-ended questions: the bare question is the prompt, and the generated answer is compared with the right one.

`exact` is equality of the texts, `normalised` equality after `normalise`. Both are computed offline and stricter than a
judge (`trainer.judge`), so neither compares with a figure that a judge gave.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from featurestore.clips import Sample, without_outer_placeholders
from mervcache.errors import UserError
from trainer.data.collate import make_batch
from trainer.data.prompts import Rendered
from trainer.data.tokens import TokenSource
from trainer.model.generate import generate
from trainer.model.multiple_choice import BENCHMARK_STAGE, CAPTION_STAGE, OVERALL, UNNAMED
from trainer.model.video_llm import Built, shown_to

MAX_NEW_TOKENS = 512  # of the published evaluation
NORMALISATION = (
    "lower case, Unicode NFKC, apostrophes removed, other punctuation to blanks (not the point within a number),"
    " zero to ten as digits, no articles (a, an, the), single blanks"
)
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_APOSTROPHES = re.compile("['\u2018\u2019\u02bc`]")
_POINT = re.compile(r"(?<=\d)\.(?=\d)")


@dataclass(frozen=True, kw_only=True)
class OpenAnswer:
    """One open-ended question answered."""

    sample_id: str
    category: str
    question: str
    correct: str
    text: str  # what the model wrote
    is_finished: bool  # False: cut at the limit of new tokens
    clip_id: str | None = None  # what the question is about; None: text alone

    @property
    def is_exact(self) -> bool:
        """Whether the texts are equal but for blanks at their ends."""
        return self.text.strip() == self.correct.strip()

    @property
    def is_match(self) -> bool:
        """Whether the normalised texts are equal; an empty one matches nothing."""
        text = normalise(self.text)
        return bool(text) and text == normalise(self.correct)


@dataclass(frozen=True, kw_only=True)
class OpenScore:
    """Matches on the questions of one category."""

    category: str
    questions: int
    exact: float
    normalised: float
    unfinished: int  # answers that were cut at the limit of new tokens


def normalise(text: str) -> str:
    """The text as `NORMALISATION` says.

    >>> normalise("The man's  two dogs!"), normalise("2.5 a.m.")
    ('mans 2 dogs', '2.5 m')
    """
    text = _APOSTROPHES.sub("", unicodedata.normalize("NFKC", text).lower())
    point = "\0"
    text = _POINT.sub(point, text)
    text = "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text).replace(point, ".")
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def is_open_question(sample: Sample, every_stage: bool = False) -> bool:
    """Whether a sample is an open-ended question of a benchmark, or with `every_stage` of any stage that asks."""
    return not sample.options and (sample.stage == BENCHMARK_STAGE or (every_stage and sample.stage != CAPTION_STAGE))


def render(built: Built, sample: Sample) -> Rendered:
    """The prompt of a question in the run's prompt format."""
    if built.config.prompt == "caption":
        raise UserError("the run was trained with prompt caption, which shows no question: give --no-open-ended")
    return built.renderer.question(sample.turns, has_clip=sample.clip_id is not None)


def check_fits(built: Built, samples: Sequence[Sample]) -> None:
    """UserError for questions that the model cannot read to their end, before any of them is asked."""
    model, cut = built.model, []
    for sample in samples:
        length = len(render(built, sample).input_ids)
        has_room = model.context is None or built.most_visual_tokens + length < model.context
        if not has_room or length > built.renderer.max_tokens:
            cut.append(sample.sample_id)
    if cut:
        raise UserError(
            f"{len(cut)} of {len(samples)} open-ended questions are longer than the {built.renderer.max_tokens:,}"
            f" tokens of text that the run reads: {', '.join(cut[:5])}; leave them out of the samples, or score a run"
            " with a larger max_text_tokens or an LLM with a longer context"
        )


def answer_batch(
    built: Built,
    samples: Sequence[Sample],
    source: TokenSource,
    device: torch.device | str,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    run: str = "the run",
) -> list[OpenAnswer]:
    """Answers to questions in one batch. Raises UserError where the model's output is not finite."""
    model = built.model
    batch = make_batch(
        [render(built, sample) for sample in samples],
        [sample.clip_id if model.has_visual else None for sample in samples],
        source,
        model.num_visual_tokens_at(built.tokens_per_frame),
        model.context,
        **shown_to(built, len(samples)),
    )
    answers = []
    found = generate(built, batch, max_new_tokens=max_new_tokens, device=device)
    for sample, generated in zip(samples, found, strict=True):
        if generated is None:
            raise UserError(
                f"{run}: the model's output is not finite (NaN or infinite) at question {sample.sample_id}, so it has"
                " no answer; look for such values in the run's metrics, and score an older checkpoint"
            )
        answers.append(
            OpenAnswer(
                sample_id=sample.sample_id,
                category=sample.category or UNNAMED,
                question=without_outer_placeholders(sample.turns[-2].text),
                correct=sample.turns[-1].text,
                text=generated.text,
                is_finished=generated.is_finished,
                clip_id=sample.clip_id,
            )
        )
    return answers


def summarise(answers: Sequence[OpenAnswer]) -> list[OpenScore]:
    """Overall first, then by category in alphabetical order, as `multiple_choice.summarise`."""
    groups: dict[str, list[OpenAnswer]] = defaultdict(list)
    for answer in answers:
        groups[answer.category].append(answer)
    if set(groups) == {UNNAMED}:
        groups.clear()
    return [_score(OVERALL, answers), *(_score(name, groups[name]) for name in sorted(groups))]


def _score(category: str, answers: Sequence[OpenAnswer]) -> OpenScore:
    number = len(answers)
    return OpenScore(
        category=category,
        questions=number,
        exact=sum(answer.is_exact for answer in answers) / number,
        normalised=sum(answer.is_match for answer in answers) / number,
        unfinished=sum(not answer.is_finished for answer in answers),
    )

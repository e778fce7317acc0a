"""Answers to the requests of lmms-eval: generation, and the likelihood of continuations.

The requests are the argument tuples of lmms-eval 0.7 (`Instance.args`), for models that its registry calls simple. This
module does not import lmms-eval; `trainer.lmms` does, and is what lmms-eval loads.

    generate_until              context, settings, doc_to_visual, doc id, task, split
    generate_until_multi_round  context, settings, doc_to_visual, doc_to_text, doc id, task, split
    loglikelihood               context, option or doc_to_target, doc_to_visual, doc id, task, split
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from featurestore.clips import Sample, Turn
from mervcache.console import ProgressLine, plural
from mervcache.errors import UserError
from trainer.data.collate import make_batch
from trainer.data.tokens import MemoryTokens, TokenSource
from trainer.media_tokens import WHOLE, MediaTokens, Span
from trainer.model.generate import generate_texts
from trainer.model.multiple_choice import batch_of
from trainer.model.video_llm import shown_to
from trainer.runs.load import load_run

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 512  # where a task names no number: that of the published evaluation
LENGTHS = ("max_new_tokens", "max_gen_toks")  # names of it in the settings of tasks
READ_SETTINGS = {*LENGTHS, "until", "do_sample", "temperature", "top_p", "top_k", "num_beams"}
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # modes of PIL that a PNG file keeps as they are

Docs = Mapping[str, Mapping[str, Sequence[Any]]]  # task -> split -> documents
Arguments = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A text about a clip, or about none."""

    text: str
    clip_id: str | None
    name: str  # task and document, for messages
    answer: str = ""  # whose likelihood is wanted
    max_new_tokens: int = MAX_NEW_TOKENS
    stops: tuple[str, ...] = ()

    @property
    def turns(self) -> tuple[Turn, Turn]:
        return Turn(role="human", text=self.text), Turn(role="gpt", text=self.answer)


class Requests:
    """A run that answers requests, `batch_size` at a time; results are in the order of the requests."""

    def __init__(
        self,
        checkpoint: str,
        *,
        store: str | None = None,
        root: str | None = None,
        weights: Sequence[str] = (),
        best: bool = False,
        device: str | None = None,
        batch_size: int = 1,
    ) -> None:
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._checkpoint, self._batch_size = checkpoint, batch_size
        run = load_run(Path(checkpoint), best=best)
        self._built, self._model = run.built, run.built.model.to(self._device).eval()
        self._tokens: MediaTokens | None = None  # a run that was trained on text alone looks at nothing
        if self._model.has_visual:
            folder = Path(root) if root else None
            self._tokens = MediaTokens(run, store=store, root=folder, weights=weights, device=self._device)
        self._counts = _Counts()
        self._pictures = tempfile.TemporaryDirectory(prefix="merv-lmms-")  # of documents that hold no files

    def generate_until(self, requests: Sequence[Arguments], docs: Docs) -> list[str]:
        """A greedy answer to each request, cut at the first of its stop strings."""
        return self._generate([self._open_question(request, docs) for request in requests])

    def generate_until_multi_round(self, requests: Sequence[Arguments], docs: Docs) -> list[list[str]]:
        """The answers of every round to each request; a task's doc_to_text makes the next round's question."""
        answers: list[list[str]] = [[] for _ in requests]
        infos: list[Any] = [None] * len(requests)
        asked = {place: self._open_question(_without_text(request), docs) for place, request in enumerate(requests)}
        number = 0
        while asked:
            for place, text in zip(asked, self._generate(list(asked.values())), strict=True):
                answers[place].append(text)
            number, following = number + 1, {}
            for place in asked:
                _, settings, _, doc_to_text, doc_id, task, split = requests[place]
                visuals, text, is_last, given, infos[place] = doc_to_text(
                    docs[task][split][doc_id],
                    previous_output=list(answers[place]),
                    round_idx=number,
                    previous_round_info=infos[place],
                )
                answers[place] = list(given)
                if not is_last:
                    request = (text, settings, lambda _, visuals=visuals: visuals, doc_id, task, split)
                    following[place] = self._open_question(request, docs)
            asked = following
        return answers

    @property
    def _source(self) -> TokenSource:
        return MemoryTokens([], {}) if self._tokens is None else self._tokens

    def loglikelihood(self, requests: Sequence[Arguments], docs: Docs) -> list[tuple[float, bool]]:
        """How likely each continuation is, with its end token, and whether the model would write it.

        The options of multiple choice come as texts, and lmms-eval 0.7 takes the option with the lowest number, as its
        own models return mean losses: so here they get the loss per token, by which `merv-eval` ranks them too. A
        single continuation comes as a function of the document, and gets its log-likelihood.
        """
        questions = [self._closed_question(request, docs) for request in requests]
        found: dict[int, tuple[float, bool]] = {}
        for part in self._batches(questions, "score"):
            samples = [_sample(questions[place]) for place in part]
            batch = batch_of(self._built, samples, self._source).to(self._device)
            with self._built.autocast(self._device):
                sums_B, is_greedy_B = self._model.likelihood(batch)
            means = (sums_B / batch.supervised_B).tolist()
            for place, total, mean, is_greedy in zip(part, sums_B.tolist(), means, is_greedy_B.tolist(), strict=True):
                if not math.isfinite(total):
                    raise UserError(self._not_finite(questions[place]))
                is_option = isinstance(requests[place][1], str)
                found[place] = (-mean if is_option else total, is_greedy)
        return [found[place] for place in range(len(requests))]

    def summary(self) -> str:
        """Where the tokens of the clips came from."""
        if self._tokens is None:
            return f"{self._checkpoint} was trained on text alone: it answered without looking"
        tokens, parts = self._tokens, []
        if tokens.from_store or tokens.by_path:
            parts.append(f"{plural(len(tokens.from_store | tokens.by_path), 'clip')} read from {tokens.store}")
        if tokens.by_path:
            parts[-1] += f" ({len(tokens.by_path)} by path alone: the files are not there to compare)"
        parts.append(f"{plural(len(tokens.encoded), 'clip')} encoded now")
        if self._counts.without_clip:
            parts.append(f"{plural(self._counts.without_clip, 'request')} without a clip")
        if self._counts.unread:
            parts.append(f"settings not used: {', '.join(sorted(self._counts.unread))}")
        return "; ".join(parts)

    def close(self) -> None:
        """Stop the decode process and release the encoders."""
        if self._tokens is not None:
            self._tokens.close()
        self._pictures.cleanup()

    def _open_question(self, request: Arguments, docs: Docs) -> Question:
        text, settings, doc_to_visual, doc_id, task, split = request
        name = f"document {doc_id} of {task}"
        self._counts.unread |= set(settings) - READ_SETTINGS
        if reason := _not_greedy(settings):
            raise UserError(
                f"{name} wants {reason}, and a run answers greedily: add --gen_kwargs do_sample=False,temperature=0"
            )
        if self._built.config.prompt == "caption":
            raise UserError(f"{name}: the run was trained with prompt caption, which shows no question")
        until = settings.get("until") or ()
        question = Question(
            text=text,
            clip_id=self._clip_of(doc_to_visual, docs[task][split][doc_id], name),
            name=name,
            max_new_tokens=next((int(settings[key]) for key in LENGTHS if settings.get(key)), MAX_NEW_TOKENS),
            stops=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        )
        rendered = self._built.renderer.question(question.turns, has_clip=question.clip_id is not None)
        self._check_length(question, is_cut=len(rendered.input_ids) > self._built.renderer.max_tokens)
        return question

    def _closed_question(self, request: Arguments, docs: Docs) -> Question:
        if len(request) == 2:
            raise UserError(
                "acc_mutual_info wants the likelihood of options without their question, and lmms-eval 0.7 pairs those"
                " numbers with other options; leave the metric out of the task"
            )
        text, continuation, doc_to_visual, doc_id, task, split = request
        doc, name = docs[task][split][doc_id], f"document {doc_id} of {task}"
        continuation = continuation if isinstance(continuation, str) else str(continuation(doc))
        clip_id = self._clip_of(doc_to_visual, doc, name)
        # The blank between a question and its answer is the prompt format's.
        question = Question(text=text, clip_id=clip_id, name=name, answer=continuation.strip())
        rendered = self._built.renderer(question.turns, has_clip=clip_id is not None)
        self._check_length(question, is_cut=rendered.is_cut)
        return question

    def _check_length(self, question: Question, *, is_cut: bool) -> None:
        if is_cut:
            raise UserError(
                f"{question.name} is longer than the {self._built.renderer.max_tokens:,} tokens of text that the run"
                " reads; shorten it, or use a run with a larger max_text_tokens or an LLM with a longer context"
            )

    def _generate(self, questions: Sequence[Question]) -> list[str]:
        built, model, found = self._built, self._model, {}
        for part in self._batches(questions, "answer"):
            batch = [questions[place] for place in part]
            rendered = [built.renderer.question(each.turns, has_clip=each.clip_id is not None) for each in batch]
            clips = [each.clip_id if model.has_visual else None for each in batch]
            made = make_batch(
                rendered, clips, self._source, model.num_visual_tokens, model.context, **shown_to(built, len(batch))
            )
            texts = generate_texts(built, made, max_new_tokens=batch[0].max_new_tokens, device=self._device)
            for place, question, text in zip(part, batch, texts, strict=True):
                if text is None:
                    raise UserError(self._not_finite(question))
                found[place] = _cut(text, question.stops)
        return [found[place] for place in range(len(questions))]

    def _batches(self, questions: Sequence[Question], verb: str) -> Iterator[list[int]]:
        """Places of the questions of each batch: of one clip side by side, so that it is encoded once."""
        first: dict[tuple[int, str | None], int] = {}
        keys = [
            (question.max_new_tokens, first.setdefault((question.max_new_tokens, question.clip_id), place))
            for place, question in enumerate(questions)
        ]
        order = sorted(range(len(questions)), key=lambda place: (*keys[place], place))
        parts: list[list[int]] = []
        for place in order:
            is_full = not parts or len(parts[-1]) == self._batch_size
            if is_full or questions[parts[-1][0]].max_new_tokens != questions[place].max_new_tokens:
                parts.append([])
            parts[-1].append(place)
        with ProgressLine(verb, total=len(questions), unit="requests") as line:
            for number, part in enumerate(parts):
                if self._tokens is not None:
                    coming = dict.fromkeys(
                        questions[place].clip_id for each in parts[number : number + 2] for place in each
                    )
                    self._tokens.expect(clip_id for clip_id in coming if clip_id is not None)
                yield part
                line.advance(len(part))

    def _clip_of(self, doc_to_visual: Callable[[Any], Any] | None, doc: Any, name: str) -> str | None:
        """The clip of a document: its one file, picture, or part of a video; None where it shows nothing."""
        visuals = doc_to_visual(doc) if callable(doc_to_visual) else doc_to_visual
        found = [visual for visual in _flat(visuals) if visual is not None]
        if len(found) > 1:
            raise UserError(f"{name} shows {len(found)} videos or images, and a run looks at one")
        if not found:
            self._counts.without_clip += 1
            return None
        if self._tokens is None:
            return "unseen"  # as `merv-eval` renders the question of a run without eyes
        visual, span = found[0], WHOLE
        if isinstance(visual, Image.Image):
            return self._tokens.find(self._saved(visual), kind="image")
        if isinstance(visual, Mapping):
            visual, span = _described(visual)
        if not isinstance(visual, str | Path):
            raise UserError(f"{name} shows a {type(found[0]).__name__}; a run reads paths of media files, and images")
        return self._tokens.find(visual, span)

    def _saved(self, picture: Image.Image) -> Path:
        """A lossless file of a picture that a document holds."""
        data = io.BytesIO()
        (picture if picture.mode in PNG_MODES else picture.convert("RGB")).save(data, "PNG")
        path = Path(self._pictures.name) / f"{hashlib.sha256(data.getvalue()).hexdigest()}.png"
        path.write_bytes(data.getvalue())
        return path

    def _not_finite(self, question: Question) -> str:
        return (
            f"{self._checkpoint}: the model's output is not finite (NaN or infinite) at {question.name}, so it has no"
            " answer; use an older checkpoint"
        )


@dataclass
class _Counts:
    without_clip: int = 0
    unread: set[str] = field(default_factory=set)


def _without_text(request: Arguments) -> Arguments:
    """A request of several rounds as one of a single round."""
    return (*request[:3], *request[4:])


def _sample(question: Question) -> Sample:
    return Sample(
        sample_id=question.name, clip_id=question.clip_id, turns=question.turns, stage="eval", source="lmms-eval"
    )


def _not_greedy(settings: Mapping[str, Any]) -> str | None:
    """What a task wants that is no greedy answer."""
    temperature = float(settings.get("temperature") or 0)
    if settings.get("do_sample", temperature > 0) and temperature != 0:
        return f"sampling at temperature {temperature:g}"
    if settings.get("do_sample") and "temperature" not in settings:
        return "sampling"
    if (beams := int(settings.get("num_beams") or 1)) > 1:
        return f"a search with {beams} beams"
    return None


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min([len(text), *(place for stop in stops if (place := text.find(stop)) >= 0)])]


def _flat(visuals: Any) -> list[Any]:
    """The visuals of a document, which may be one, none, or lists of them."""
    if isinstance(visuals, list | tuple):
        return [each for visual in visuals for each in _flat(visual)]
    return [visuals]


def _described(visual: Mapping[str, Any]) -> tuple[Any, Span]:
    """File and span of a video that a task describes by `path` or `url`, `video_start` and `video_end`."""
    start, end = (None if visual.get(key) is None else float(visual[key]) for key in ("video_start", "video_end"))
    return visual.get("path") or visual.get("url"), (start, end)

"""Prompt formats: a conversation -> token ids, and labels that supervise the answers and their EOS only.

A format cuts a conversation into pieces that are tokenised separately, as princetonvisualai/merv does, so an answer has
the same ids in training as after a prompt at inference. A clip's placeholder ("<video>", "<image>") is removed from its
question: visual tokens have their own position, and evaluation questions hold no placeholder. In answers and in
text-only samples these are words and stay. With position "placeholder" visual tokens take its place, and its question
is tokenised in two parts, before and behind it, as LLaVA does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from featurestore.clips import PLACEHOLDERS, Sample, Turn, without_outer_placeholders
from mervcache.errors import UserError, unknown_name
from trainer.config import PlaceholderRule, PromptName, VisualPosition
from trainer.data.chat_templates import DEFAULT_DATE, ChatTemplate
from trainer.data.released_prompts import LLAMA2_SYSTEM, RELEASED_PROMPTS, VICUNA_SYSTEM, ReleasedPrompt

IGNORE_INDEX = -100  # label of a position without supervision, torch's default
MARK = "\ue003"  # the place of visual tokens while a conversation is rendered; a private-use character


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Text that is tokenised in one go."""

    text: str
    is_answer: bool = False  # supervised
    opens: bool = False  # preceded by BOS, if the tokenizer adds one to plain text
    closes: bool = False  # followed by EOS
    begins_word: bool = False  # preceded by a space, if the tokenizer writes none by itself


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """One conversation in tokens; labels are `IGNORE_INDEX` or the id at the same place."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    visual_at: int  # visual tokens are inserted before this text position: 0, 1 after a BOS, or that of the placeholder
    is_cut: bool = False  # there was more text

    @property
    def num_supervised(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels)


def pure(turns: Sequence[Turn], tokenizer: Any) -> list[Piece]:
    """`In: question`, newline, `Out: answer</s>`."""
    return _pieces(turns, lambda index, text: Piece(text=f"In: {text}\nOut:", opens=index == 0))


def vicuna(turns: Sequence[Turn], tokenizer: Any) -> list[Piece]:
    """Vicuna v1.5: system sentence, then `USER: question ASSISTANT: answer</s>`."""

    def question(index: int, text: str) -> Piece:
        system = f"{VICUNA_SYSTEM} " if index == 0 else ""
        return Piece(text=f"{system}USER: {text} ASSISTANT:", opens=index == 0)

    return _pieces(turns, question)


def llama2_chat(turns: Sequence[Turn], tokenizer: Any) -> list[Piece]:
    """LLaMA-2 chat: `<s>[INST] question [/INST] answer</s>`, the system text inside the first instruction.

    Every instruction has its own BOS, as the model was tuned; the released MERV code has one, and `<<SYS>`.
    """

    def question(index: int, text: str) -> Piece:
        system = f"<<SYS>>\n{LLAMA2_SYSTEM}\n<</SYS>>\n\n" if index == 0 else ""
        return Piece(text=f"[INST] {system}{text} [/INST]", opens=True)

    return _pieces(turns, question)


def chat_template(turns: Sequence[Turn], tokenizer: Any, template: ChatTemplate | None = None) -> list[Piece]:
    """The tokenizer's own template, cut where each answer begins and behind its end token."""
    pieces = (template or ChatTemplate(tokenizer)).pieces(turns)
    return [Piece(text=text, is_answer=is_answer) for text, is_answer in pieces]


def caption(turns: Sequence[Turn], tokenizer: Any) -> list[Piece]:
    """Stage 1 of princetonvisualai/merv: `caption</s>` behind the visual tokens; the question is not read."""
    if reason := reason_to_refuse("caption", turns):
        raise UserError(f"{reason}; choose another prompt for conversations")
    return [Piece(text="", opens=True), _answer(turns[1].text)]


def released(prompt: ReleasedPrompt, turns: Sequence[Turn], tokenizer: Any) -> list[Piece]:
    """A format of princetonvisualai/merv, as its training renders it."""
    texts = enumerate(prompt.training(turns))
    return [Piece(text=text, is_answer=is_answer, opens=index == 0) for index, (text, is_answer) in texts]


PROMPTS: dict[PromptName, Callable[[Sequence[Turn], Any], list[Piece]]] = {
    "pure": pure,
    "vicuna": vicuna,
    "llama2_chat": llama2_chat,
    "chat_template": chat_template,
    "caption": caption,
    **{name: partial(released, prompt) for name, prompt in RELEASED_PROMPTS.items()},
}


class Renderer:
    """A prompt format bound to a tokenizer: what the collator and the evaluation call."""

    def __init__(
        self,
        prompt: PromptName,
        tokenizer: Any,
        *,
        position: VisualPosition = "after_bos",
        placeholder: PlaceholderRule = "removed",
        max_tokens: int = 2048,
        template_date: str = DEFAULT_DATE,
        end_ids: Iterable[int] = (),
        num_embeddings: int | None = None,
    ) -> None:
        """`template_date` is today for chat templates, `end_ids` end a generation by the LLM's own settings.

        `num_embeddings` are the ids that the LLM can read; None: all that the tokenizer makes.
        """
        if prompt not in PROMPTS:
            raise UserError(unknown_name("prompt", prompt, list(PROMPTS)))
        self.format, self.tokenizer = PROMPTS[prompt], tokenizer
        self.prompt, self.placeholder, self.released = prompt, placeholder, RELEASED_PROMPTS.get(prompt)
        self.position, self.max_tokens, self.template_date = position, max_tokens, template_date
        self.bos_id = tokenizer.bos_token_id if adds_bos(tokenizer) else None
        self.blank = " " if words_hold_blanks(tokenizer) else ""
        if tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no end token, so answers could not end")
        ends = {tokenizer.eos_token_id, *end_ids}
        if prompt == "chat_template":
            template = ChatTemplate(tokenizer, day=template_date, end_ids=ends)
            self.format = partial(chat_template, template=template)
            ends.add(template.end_id)
        self.end_ids = tuple(sorted(ends))  # what ends a generated answer
        self.num_embeddings = num_embeddings

    def __call__(self, turns: Sequence[Turn], *, has_clip: bool = True) -> Rendered:
        """Ids and labels of a whole conversation, cut at `max_tokens`; without a clip no text is a placeholder."""
        ids, labels, place = self._tokens(self.format(self._prepared(turns, has_clip), self.tokenizer))
        is_cut = len(ids) > self.max_tokens
        ids, labels = ids[: self.max_tokens], labels[: self.max_tokens]
        visual_at = self._visual_at(ids) if place is None else min(place, len(ids))
        return Rendered(input_ids=tuple(ids), labels=tuple(labels), visual_at=visual_at, is_cut=is_cut)

    def question(self, turns: Sequence[Turn], *, has_clip: bool = True) -> Rendered:
        """Ids up to where the last answer begins; nothing is supervised. The last turn's text is not read."""
        prepared = self._prepared([*turns[:-1], Turn(role="gpt", text="")], has_clip)
        if self.released is not None:
            pieces = [Piece(text=self.released.inference(prepared[:-1]), opens=True)]
        else:
            pieces = self.format(prepared, self.tokenizer)
            pieces = pieces[: max(index for index, piece in enumerate(pieces) if piece.is_answer)]
        ids, _, place = self._tokens(pieces)
        visual_at = self._visual_at(ids) if place is None else place
        return Rendered(input_ids=tuple(ids), labels=(IGNORE_INDEX,) * len(ids), visual_at=visual_at)

    def check_readable(self, samples: Iterable[Sample]) -> None:
        """UserError where a text holds a token for which the LLM has no embedding, before the first step.

        Only tokens added to a tokenizer can be such ones, and a text makes one where it spells it out.
        """
        vocabulary = self.tokenizer.get_vocab().items()
        beyond = [
            word.casefold() for word, i in vocabulary if self.num_embeddings is not None and i >= self.num_embeddings
        ]
        if not beyond:
            return
        self.question((Turn(role="human", text="a"), Turn(role="gpt", text="")))  # the format's own words
        for sample in samples:
            for text in (*(turn.text for turn in sample.turns), *sample.options):
                folded = text.casefold()
                if any(word in folded for word in beyond):
                    self._check_ids(self.tokenizer(text, add_special_tokens=False)["input_ids"], sample.sample_id)

    def _tokens(self, pieces: Iterable[Piece]) -> tuple[list[int], list[int], int | None]:
        """Ids, labels, and the position of the placeholder's mark, where the texts hold one."""
        ids: list[int] = []
        labels: list[int] = []
        place = None
        for piece in pieces:
            before, mark, behind = piece.text.partition(MARK)
            piece_ids = self._tokenise(replace(piece, text=before, closes=piece.closes and not mark))
            if mark:
                place = len(ids) + len(piece_ids)
                piece_ids += self._tokenise(replace(piece, text=behind, opens=False, begins_word=False))
            ids += piece_ids
            labels += piece_ids if piece.is_answer else [IGNORE_INDEX] * len(piece_ids)
        self._check_ids(ids)
        return ids, labels, place

    def _check_ids(self, ids: Sequence[int], sample_id: str = "") -> None:
        if self.num_embeddings is None or max(ids, default=0) < self.num_embeddings:
            return
        beyond = {index: self.tokenizer.convert_ids_to_tokens(index) for index in ids if index >= self.num_embeddings}
        where = f"sample {sample_id!r}" if sample_id else "a text"
        reason = beyond_embeddings(beyond, len(self.tokenizer), self.num_embeddings)
        raise UserError(f"{where} cannot be read by the LLM: {reason}")

    def _prepared(self, turns: Sequence[Turn], has_clip: bool) -> list[Turn]:
        if self.position == "placeholder" and has_clip:
            return with_mark(turns)
        if self.released is not None:
            return list(turns)  # these formats keep and remove placeholders by themselves
        if self.placeholder != "removed":
            return as_released(turns, cast("PromptName", self.prompt))
        return without_placeholder(turns, has_clip)

    def _tokenise(self, piece: Piece) -> list[int]:
        blank = self.blank if piece.begins_word and piece.text else ""
        ids = self.tokenizer(blank + piece.text, add_special_tokens=False)["input_ids"]
        before = [self.bos_id] if piece.opens and self.bos_id is not None else []
        return [*before, *ids, *([self.tokenizer.eos_token_id] if piece.closes else [])]

    def _visual_at(self, ids: Sequence[int]) -> int:
        """After a lone BOS.

        Where the tokenizer does not add its BOS to plain text, a BOS at the start belongs to a chat header (SmolLM2:
        "<|im_start|>user") and must stay with it.
        """
        has_bos = self.bos_id is not None and bool(ids) and ids[0] == self.bos_id
        return int(self.position != "first" and has_bos)


def reason_to_refuse(
    prompt: PromptName, turns: Sequence[Turn], position: VisualPosition = "after_bos", *, has_clip: bool = True
) -> str | None:
    """Why a conversation cannot be rendered in this format; None if it can."""
    if prompt == "caption":
        if len(turns) != 2:
            return "caption prompt: not one question and one answer"
        if any(placeholder in turns[1].text for placeholder in PLACEHOLDERS):
            return "caption prompt: the answer holds a media placeholder"
    elif position == "placeholder" and has_clip and num_placeholders(turns) > 1:
        return "visual_position placeholder: several media placeholders in the questions"
    return None


def num_placeholders(turns: Sequence[Turn]) -> int:
    """How often the questions hold a media placeholder."""
    return sum(turn.text.count(name) for turn in turns if turn.role == "human" for name in PLACEHOLDERS)


def beyond_embeddings(beyond: Mapping[int, str], num_tokens: int, num_embeddings: int) -> str:
    """What is wrong with tokens of these ids, and the next step."""
    named = ", ".join(f"{beyond[index]!r} ({index})" for index in sorted(beyond)[:5])
    return (
        f"its tokenizer has {num_tokens:,} tokens and its model {num_embeddings:,} embeddings, none for {named}"
        f"{', ...' if len(beyond) > 5 else ''}; give the tokenizer that the model was trained with, or add rows with"
        " transformers (`model.resize_token_embeddings(len(tokenizer))`, `save_pretrained`) and train them with"
        " train_llm: full"
    )


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins plain text with its BOS."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def words_hold_blanks(tokenizer: Any) -> bool:
    """Whether a word behind a blank is another token than at the start of a text: so in byte-level BPE.

    "Out:" and "red" tokenised apart are then "Out:red", which such an LLM has hardly ever read; with "Out:" and " red"
    the answers of videollava_mini cost SmolLM2-135M 3.39 per token instead of 3.78. LLaMA's tokenizer writes the blank
    itself.
    """
    bare, behind_blank = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", " a"))
    return len(bare) == len(behind_blank) and bare != behind_blank


def without_placeholder(turns: Sequence[Turn], has_clip: bool) -> list[Turn]:
    """The conversation with stripped texts, and its questions without the placeholder of the clip.

    It is removed at the start or the end of every question; where no question has one there, the first one within a
    question is removed.
    """
    texts = [turn.text.strip() for turn in turns]
    questions = [index for index, turn in enumerate(turns) if turn.role == "human" and has_clip]
    for index in questions:
        texts[index] = without_outer_placeholders(texts[index])
    if all(texts[index] == turns[index].text.strip() for index in questions):
        for index in questions:
            if found := [place for name in PLACEHOLDERS if (place := texts[index].find(name)) >= 0]:
                before, after = texts[index][: min(found)], texts[index][min(found) :]
                texts[index] = before + after[after.index(">") + 1 :]
                break
    return [Turn(role=turn.role, text=text) for turn, text in zip(turns, texts, strict=True)]


def with_mark(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation with stripped texts, and `MARK` in the place of the one placeholder in its questions.

    A first question without one is read as if it began with one and a newline, as data and Video-LLaVA's inference
    write it: questions about a single file hold none.
    """
    if (found := num_placeholders(turns)) > 1:
        raise UserError(
            f"visual_position: placeholder takes one <video> or <image> in a conversation, its questions hold {found};"
            " choose another visual_position, or leave the sample out"
        )
    texts = [turn.text.strip() for turn in turns]
    first = next(index for index, turn in enumerate(turns) if turn.role == "human")
    if not found:
        texts[first] = f"{MARK}\n{texts[first]}"
    for index, turn in enumerate(turns):
        if turn.role == "human":
            for name in PLACEHOLDERS:
                texts[index] = texts[index].replace(name, MARK)
    return [Turn(role=turn.role, text=text) for turn, text in zip(turns, texts, strict=True)]


def as_released(turns: Sequence[Turn], prompt: PromptName) -> list[Turn]:
    """As princetonvisualai/merv: "<video>" stays, and "<image>" is deleted from every turn.

    Its builders for the chat headers of LLaMA 3.1 and Qwen 2.5 delete neither.
    """
    deleted = "" if prompt == "chat_template" else "<image>"
    return [
        Turn(role=turn.role, text=turn.text.replace(deleted, "").strip() if deleted else turn.text) for turn in turns
    ]


def _pieces(turns: Iterable[Turn], question: Callable[[int, str], Piece]) -> list[Piece]:
    return [
        question(index, turn.text) if turn.role == "human" else _answer(turn.text, begins_word=True)
        for index, turn in enumerate(turns)
    ]


def _answer(text: str, *, begins_word: bool = False) -> Piece:
    return Piece(text=text, is_answer=True, closes=True, begins_word=begins_word)

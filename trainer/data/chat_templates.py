"""A tokenizer's own chat template: a conversation as text, cut where every answer begins and ends.

A template is a program, so what it writes is found by rendering probes in the place of answers, not by searching for
their text. Every turn is written as the template writes the newest one: Qwen 3 writes `<think>` blocks into the newest
answer alone, and every answer that is trained is generated as the newest. (TRL's training templates do the same.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date, datetime
from functools import cached_property
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from featurestore.clips import Turn
from mervcache.errors import UserError

PROBE = "\ue000answer {}\ue001"  # private-use characters, which no text should hold
ROLES = {"human": "user", "gpt": "assistant"}
DEFAULT_DATE = "2024-07-26"
# `strftime_now` of transformers, with the day of the run. Values given to a template are plain data, so it is a macro
# in front of it. Jinja drops the newline behind the last tag.
DATE_MACRO = """\
{% macro strftime_now(format) %}{% set made = namespace(text=format) %}\
{% for directive, value in date_directives %}{% set made.text = made.text | replace(directive, value) %}{% endfor %}\
{{ made.text }}{% endmacro %}
"""
DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRsSTuUVwWxXyYzZf"


class ChatTemplate:
    """The chat template of a tokenizer, which reads `day` as today; `end_ids` are tokens known to end an answer."""

    def __init__(self, tokenizer: Any, *, day: str = DEFAULT_DATE, end_ids: Iterable[int] = ()) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no chat template; choose another prompt")
        self.tokenizer = tokenizer
        try:
            self.text = tokenizer.get_chat_template()
        except ValueError as error:  # several, none of them the default
            raise self._error(f"cannot be chosen: {error}") from error
        self.options: dict[str, Any] = {}
        if "strftime_now" in self.text:
            self.text = DATE_MACRO + self.text
            self.options = {"date_directives": date_directives(date.fromisoformat(day))}
        known = [*tokenizer.all_special_tokens, *tokenizer.convert_ids_to_tokens(list(end_ids))]
        added = tokenizer.added_tokens_decoder.values()  # blank ones (Gemma has some) end nothing
        # Token -> whether it takes the blanks that follow it, as those of Phi 3 do.
        self.ends = dict.fromkeys(filter(None, known), False)
        self.ends |= {token.content: token.rstrip for token in added if token.content.strip()}

    def pieces(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """Text and whether it is an answer, with its end token: what generation makes behind the text before it.

        What the template writes between its generation prompt and an answer, such as an empty `<think>` block, belongs
        to the prompt.
        """
        messages = [{"role": ROLES[turn.role], "content": turn.text} for turn in turns]
        probed = [
            {**message, "content": PROBE.format(index)} if message["role"] == "assistant" else message
            for index, message in enumerate(messages)
        ]
        made: list[tuple[str, bool]] = []
        before = ""  # text between the previous answer and this one
        end = rest = ""  # of the previous answer: its end token, and what follows in a conversation that stops there
        for index in range(1, len(messages), 2):
            start, after, prompt = self._around(probed, index)
            answer, text = self._answer(probed[:index], messages[index], start, after, prompt)
            before = text.rpartition(PROBE.format(index - 2))[2] if index > 1 else text
            if not before.startswith(end):
                raise self._error(f"ends answers by {end!r} or not, by the turns that follow")
            made += [(part, False) for part in _split_at(before[len(end) :], rest) if part]
            end, rest = self._cut_end(after)
            made.append((answer + end, True))
        return [*made, (rest, False)] if rest else made

    @cached_property
    def end_id(self) -> int:
        """The token that the template ends an answer with."""
        answer, _ = next(
            piece for piece in self.pieces((Turn(role="human", text="a"), Turn(role="gpt", text="a"))) if piece[1]
        )
        return self.tokenizer(answer, add_special_tokens=False)["input_ids"][-1]

    def _around(self, probed: list[dict[str, str]], index: int) -> tuple[str, str, str]:
        """Text before the answer `index` and behind it where it is the newest, and the template's generation prompt."""
        whole = self._render(probed[: index + 1])
        if any(whole.count(PROBE.format(answer)) != 1 for answer in range(1, index + 1, 2)):
            raise self._error("does not write every answer once")
        start, _, after = whole.partition(PROBE.format(index))
        prompt = self._render(probed[:index], add_generation_prompt=True)
        if not start.startswith(prompt):
            raise self._error("rewrites earlier turns, or has another generation prompt than its answers follow")
        return start, after, prompt

    def _answer(
        self, earlier: list[dict[str, str]], message: dict[str, str], start: str, after: str, prompt: str
    ) -> tuple[str, str]:
        """The newest answer as the template writes it, and all text before it."""
        if not message["content"]:
            start, blank = self._with_blank(start, prompt)
            return blank, start
        whole = self._render([*earlier, message])
        if not whole.endswith(after):
            raise self._error(f"does not end the answer {message['content'][:60]!r} as it ends others")
        if not whole.startswith(start):  # it reads the answer: Qwen 3 takes reasoning out of it
            same = takewhile(lambda pair: pair[0] == pair[1], zip(start, whole, strict=False))
            start = start[: sum(1 for _ in same)]
            if len(start) < len(prompt):
                raise self._error(f"rewrites the text before the answer {message['content'][:60]!r}")
        answer = whole[len(start) : len(whole) - len(after)]
        start, blank = self._with_blank(start, prompt)
        return blank + answer, start

    def _with_blank(self, start: str, prompt: str) -> tuple[str, str]:
        """The prompt, and the blanks at its end which belong to the answer: byte-level words begin with their blank."""
        shortest = start.rstrip() if not start[len(prompt) :].strip() else start.rstrip(" ")
        end = max(len(prompt), len(shortest))
        return start[:end], start[end:]

    def _cut_end(self, after: str) -> tuple[str, str]:
        """What follows an answer: its end token with what is before it, and the rest."""
        found = [
            (after.find(token), -len(token), takes_blanks)
            for token, takes_blanks in self.ends.items()
            if token in after
        ]
        if not found:
            raise self._error("writes no end token behind an answer")
        start, length, takes_blanks = min(found)
        end, rest = after[: start - length], after[start - length :]
        blanks = len(rest) - len(rest.lstrip()) if takes_blanks else 0
        return end + rest[:blanks], rest[blanks:]

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.options,
            )
        except TemplateError as error:
            raise self._error(f"fails: {error}") from error

    def _error(self, reason: str) -> UserError:
        return UserError(
            f"the chat template of {self.tokenizer.name_or_path!r} {reason}, so answers cannot be separated from"
            " prompts; choose another prompt"
        )


def date_directives(day: date) -> list[tuple[str, str]]:
    """Directives of strftime and their values at the first second of a day, in the order in which to replace them."""
    moment, kept = datetime(day.year, day.month, day.day), "\ue002"
    values = [(f"%{flag}{letter}", moment.strftime(f"%{flag}{letter}")) for flag in ("", "-") for letter in DIRECTIVES]
    return [("%%", kept), *values, (kept, "%")]


def _split_at(text: str, start: str) -> tuple[str, str]:
    """`start` apart, where the text begins with it: it is tokenised as at the end of a shorter conversation."""
    return (start, text[len(start) :]) if text.startswith(start) else (text, "")

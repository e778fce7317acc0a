"""Multiple choice by letters: the options are listed in the prompt, and the first character of the answer is compared.

The protocol of the published evaluation of princetonvisualai/merv. The prompt is a template, a text file with
`{question}`, `{letters}` ("A, B, C") and `{options}` ("A. red", a line each); `letters.txt` beside this module has the
structure of the released one in words of its own. To reproduce a published figure, name a file with the wording that it
was measured with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase

import torch

from featurestore.clips import Sample, Turn
from mervcache.errors import UserError, unknown_name
from mervcache.files import sha256_hex
from trainer.data.collate import make_batch
from trainer.data.prompts import Rendered
from trainer.data.tokens import TokenSource
from trainer.model.generate import generate_texts
from trainer.model.video_llm import Built, shown_to

DEFAULT_TEMPLATE = Path(__file__).with_name("letters.txt")
PLACES = ("question", "letters", "options")  # of a template; it may do without the letters
NEEDED = ("question", "options")
# The first character is all that is compared; a few more tokens show in the results what a model says instead.
MAX_NEW_TOKENS = 8
_PLACE = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, kw_only=True)
class Template:
    """The prompt of a multiple-choice question."""

    name: str  # of its file
    text: str

    @classmethod
    def read(cls, path: str | Path | None = None) -> Template:
        """The template in a file, by default the one that comes with the package."""
        path = DEFAULT_TEMPLATE if path is None else Path(path)
        try:
            text = path.read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the template {path} cannot be read: {error}") from error
        found = _PLACE.findall(text)
        for name in found:
            if name not in PLACES:
                raise UserError(f"template {path}: {unknown_name('place', name, PLACES)}")
        if missing := [f"{{{name}}}" for name in NEEDED if name not in found]:
            raise UserError(f"template {path} has no {' and no '.join(missing)}, so it could not show them")
        return cls(name=path.name, text=text)

    @cached_property
    def sha256(self) -> str:
        return sha256_hex(self.text.encode())

    def fill(self, question: str, options: Sequence[str]) -> str:
        """The prompt of one question."""
        if len(options) > len(ascii_uppercase):
            raise UserError(f"a question has {len(options)} options, and there are {len(ascii_uppercase)} letters")
        letters = ascii_uppercase[: len(options)]
        lines = (f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
        values = {"question": question, "letters": ", ".join(letters), "options": "\n".join(lines)}
        return _PLACE.sub(lambda place: values[place[1]], self.text)  # in one pass: a question may hold "{options}"


def read_letter(text: str, num_options: int) -> int | None:
    """The option that an answer names by its first character; None if it is none of the letters.

    >>> read_letter("b) green", 3), read_letter("The answer is B", 3), read_letter("d", 3)
    (1, None, None)
    """
    place = ascii_uppercase.find(text[:1].upper()) if text else -1
    return place if 0 <= place < num_options else None


def render(built: Built, sample: Sample, template: Template) -> Rendered:
    """The open question with its options listed, in the run's prompt format."""
    if built.config.prompt == "caption":
        raise UserError("the run was trained with prompt caption, which shows no question: give --protocol likelihood")
    asked = Turn(role="human", text=template.fill(sample.turns[-2].text, sample.options))
    return built.renderer.question((*sample.turns[:-2], asked, Turn(role="gpt", text="")))


def fits(built: Built, sample: Sample, template: Template) -> bool:
    """Whether the model reads the whole prompt and has room for an answer."""
    length, model = len(render(built, sample, template).input_ids), built.model
    has_room = model.context is None or built.most_visual_tokens + length < model.context
    return has_room and length <= built.renderer.max_tokens


def generate_answers(
    built: Built, samples: Sequence[Sample], source: TokenSource, template: Template, device: torch.device | str
) -> list[str | None]:
    """What the model writes behind each question; None where its output is not finite."""
    model = built.model
    batch = make_batch(
        [render(built, sample, template) for sample in samples],
        [sample.clip_id if model.has_visual else None for sample in samples],
        source,
        model.num_visual_tokens_at(built.tokens_per_frame),
        model.context,
        **shown_to(built, len(samples)),
    )
    return generate_texts(built, batch, max_new_tokens=MAX_NEW_TOKENS, device=device)

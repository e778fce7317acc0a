"""`Clip`: a media file with a span or an end frame, or a still image. `Sample`: a conversation about a clip.

A clip's id is made from dataset, path and span, not from its bytes, because ids must exist before any media is read;
equality of content is the receipt's `media_sha256`. Evaluation questions are samples of two turns with options.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mervcache.errors import UserError
from mervcache.files import record_digest
from mervcache.reprs import brief, changed_fields

Kind = Literal["video", "image"]
KINDS: tuple[Kind, ...] = ("video", "image")
PLACEHOLDERS = ("<video>", "<image>")  # where a question about a clip names it; in an answer they are words like any
MAX_PATH_LENGTH = 1024  # characters; POSIX PATH_MAX is 4096 bytes
# Patterns, not loops over characters: a million clips are checked when a store is planned (3 s instead of 12).
_FORBIDDEN_CHARACTER = re.compile(r"[\x00-\x1f\\]")
_AMBIGUOUS_PART = re.compile(r"(?:^|/)\.{0,2}(?:/|\Z)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One thing to encode; hashable, checked when it is made."""

    dataset: str  # name of the dataset that lists it
    path: str  # POSIX path relative to the dataset's root; a tar member is "shard.tar/member"
    kind: Kind
    start_s: float | None = None  # span in seconds; None is the start of the file
    end_s: float | None = None  # None is the end of the file
    end_frame: int | None = None  # last frame index; overrides the span (as in princetonvisualai/merv)

    def __post_init__(self) -> None:
        check_relative_path(self.path)
        if self.kind not in KINDS:
            raise UserError(f"clip kind must be one of {', '.join(KINDS)}, got {self.kind!r} for {self.path}")
        if not self.dataset or "/" in self.dataset:
            raise UserError(f"dataset name must be non-empty and without '/', got {self.dataset!r}")
        for name, seconds in (("start_s", self.start_s), ("end_s", self.end_s)):
            if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
                raise UserError(f"{name} must be a finite number of seconds >= 0, got {seconds} for {self.path}")
        if self.start_s is not None and self.end_s is not None and self.end_s <= self.start_s:
            raise UserError(f"span must end after it starts, got {self.start_s}..{self.end_s} s for {self.path}")
        if self.end_frame is not None and self.end_frame < 0:
            raise UserError(f"end_frame must be >= 0, got {self.end_frame} for {self.path}")

    __repr__ = changed_fields

    @property
    def clip_id(self) -> str:
        """`dataset/path`, then a fragment for the span: unique in a store and readable.

        >>> Clip(dataset="eval", path="tvqa/a.mp4", kind="video", start_s=1.5, end_s=4.0).clip_id
        'eval/tvqa/a.mp4#t=1.5,4.0'
        """
        quoted = self.path
        if "%" in quoted or "#" in quoted:
            quoted = quoted.replace("%", "%25").replace("#", "%23")
        fragment = ""
        if self.end_frame is not None:
            fragment = f"#end_frame={self.end_frame}"
        elif self.start_s is not None or self.end_s is not None:
            start, end = ("" if s is None else repr(float(s)) for s in (self.start_s, self.end_s))
            fragment = f"#t={start},{end}"
        return f"{self.dataset}/{quoted}{fragment}"


def check_relative_path(path: str) -> None:
    """UserError for a path that is absolute, climbs out of its root, or could mean two things."""
    problem = None
    if not path or len(path) > MAX_PATH_LENGTH:
        problem = f"its length must be 1..{MAX_PATH_LENGTH} characters"
    elif _FORBIDDEN_CHARACTER.search(path):
        problem = "it holds a control character or a backslash"
    elif path.startswith("/") or path[1:3] == ":/":
        problem = "it is absolute"
    elif _AMBIGUOUS_PART.search(path):
        problem = "it holds an empty, '.' or '..' part"
    if problem:
        raise UserError(f"media path {path[:200]!r} is refused: {problem}; paths are relative to the dataset's root")


Role = Literal["human", "gpt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Role
    text: str


def without_outer_placeholders(text: str) -> str:
    """The text stripped, without the placeholders at its start or, where there is none, at its end.

    >>> without_outer_placeholders("<video>\\nWhat is a <video> tag?"), without_outer_placeholders("What?\\n<image> ")
    ('What is a <video> tag?', 'What?')
    """
    text = text.strip()
    start, end = 0, len(text)
    while text.startswith(PLACEHOLDERS, start):
        start = text.index(">", start) + 1
        while start < end and text[start].isspace():
            start += 1
    while start == 0 and text.endswith(PLACEHOLDERS, 0, end):
        end = text.rindex("<", 0, end)
        while end and text[end - 1].isspace():
            end -= 1
    return text[start:end]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A clip and the conversation about it."""

    sample_id: str
    clip_id: str | None  # None: text only
    turns: tuple[Turn, ...]  # alternate human, gpt, human, ...
    stage: str  # "align" (stage 1 captions), "finetune" (stage 2) or "eval"
    split: str = "train"  # "train" or "heldout"
    source: str  # what a mix is weighted by: "videochatgpt", "llava_image", "text", a benchmark's name
    category: str | None = None  # kind of question where known: "colour", "direction", ...
    options: tuple[str, ...] = ()  # multiple choice; empty: open-ended
    answer_index: int | None = None  # 0-based index into options

    def __post_init__(self) -> None:
        expected = ("human", "gpt")
        roles = tuple([turn.role for turn in self.turns])
        if not roles or roles != expected * (len(roles) // 2):
            raise UserError(f"sample {self.sample_id!r}: turns must alternate human, gpt, got {list(roles)}")
        texts: list[Any] = [turn.text for turn in self.turns]  # of a file, and so of any type
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"sample {self.sample_id!r} has a turn without text")
        if self.options and not (self.answer_index is not None and 0 <= self.answer_index < len(self.options)):
            raise UserError(
                f"sample {self.sample_id!r}: answer_index {self.answer_index} is not one of {len(self.options)} options"
            )

    def __repr__(self) -> str:
        first = self.turns[0].text
        shown = first if len(first) <= 60 else first[:57] + "..."
        where = f"{self.stage}, {self.split}, of {self.source}"
        return brief(self, f"{self.sample_id} on {self.clip_id or 'no clip'}: {shown!r} ({where})")

    @property
    def digest(self) -> str:
        """32 hex digits over every field: part of a run's data digest."""
        return record_digest(self.to_record())[:32]

    def to_record(self) -> dict[str, Any]:
        """Plain values by column."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        record["turns"] = [{"role": turn.role, "text": turn.text} for turn in self.turns]
        record["options"] = list(self.options)
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Sample:
        """Inverse of `to_record`; checks the sample of the `record` again."""
        turns = tuple(Turn(**turn) for turn in record["turns"])
        values: dict[str, Any] = {**record, "turns": turns, "options": tuple(record["options"] or ())}
        return cls(**values)

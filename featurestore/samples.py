"""Samples: a conversation about a clip (or about nothing, for text-only records), as training reads it.

Comes in: annotation records, already parsed by a dataset. Goes out: `Sample` values; their Parquet columns stand in
`columns.py`. Evaluation questions are samples too: one human turn, one gpt turn, and options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from featurestore.digests import record_digest
from featurestore.errors import UserError

Role = Literal["human", "gpt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Role
    text: str


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
        roles = tuple(turn.role for turn in self.turns)
        if not roles or len(roles) % 2 or any(role != expected[i % 2] for i, role in enumerate(roles)):
            raise UserError(f"sample {self.sample_id!r}: turns must alternate human, gpt, got {list(roles)}")
        if not all(isinstance(turn.text, str) for turn in self.turns):
            raise UserError(f"sample {self.sample_id!r} has a turn without text")
        if self.options and not (self.answer_index is not None and 0 <= self.answer_index < len(self.options)):
            raise UserError(
                f"sample {self.sample_id!r}: answer_index {self.answer_index} is not one of {len(self.options)} options"
            )

    @property
    def digest(self) -> str:
        """32 hex digits over every field: part of a run's data digest."""
        return record_digest(self.to_record())[:32]

    def to_record(self) -> dict:
        """Plain values by column."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        record["turns"] = [{"role": turn.role, "text": turn.text} for turn in self.turns]
        record["options"] = list(self.options)
        return record

    @classmethod
    def from_record(cls, record: dict) -> Sample:
        """Inverse of `to_record`; every sample is checked anew."""
        turns = tuple(Turn(**turn) for turn in record["turns"])
        return cls(**{**record, "turns": turns, "options": tuple(record["options"] or ())})

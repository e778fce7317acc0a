"""Samples: a conversation about a clip (or about nothing, for text-only records), as training reads it.

Comes in: annotation records, already parsed by a dataset. Goes out: `Sample` values and the Parquet columns of
`samples/NAME.parquet`. Evaluation questions are samples too: one human turn, one gpt turn, and options.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from featurestore.errors import UserError

Role = Literal["human", "gpt"]

SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("clip_id", pa.string()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("category", pa.string()),
        pa.field(
            "turns",
            pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("text", pa.string())])),
            nullable=False,
        ),
        pa.field("options", pa.list_(pa.string()), nullable=False),
        pa.field("answer_index", pa.int64()),
    ]
)


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
        if self.options and not (self.answer_index is not None and 0 <= self.answer_index < len(self.options)):
            raise UserError(
                f"sample {self.sample_id!r}: answer_index {self.answer_index} is not one of {len(self.options)} options"
            )

    @property
    def digest(self) -> str:
        """32 hex digits over every field: part of a run's data digest."""
        text = json.dumps(self.to_record(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def to_record(self) -> dict:
        """The row of `SAMPLE_SCHEMA`."""
        record = {name: getattr(self, name) for name in SAMPLE_SCHEMA.names}
        record["turns"] = [{"role": turn.role, "text": turn.text} for turn in self.turns]
        record["options"] = list(self.options)
        return record

    @classmethod
    def from_record(cls, record: dict) -> Sample:
        """Inverse of `to_record`; every sample is checked anew."""
        turns = tuple(Turn(**turn) for turn in record["turns"])
        return cls(**{**record, "turns": turns, "options": tuple(record["options"] or ())})


def samples_to_table(samples: Iterable[Sample]) -> pa.Table:
    """Samples -> a table of `SAMPLE_SCHEMA`, in the order given."""
    return pa.Table.from_pylist([sample.to_record() for sample in samples], schema=SAMPLE_SCHEMA)


def table_to_samples(table: pa.Table) -> list[Sample]:
    """A table of `SAMPLE_SCHEMA` -> samples."""
    return [Sample.from_record(record) for record in table.to_pylist()]

"""A question of a benchmark, and what the formats of annotation files share: tables, spans, options."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mervcache.errors import UserError
from pipeline.datasets.base import RecordError, check_text, is_absent, number_or_text, whole_number

MAX_FRAME = 2**31  # 2 years of video at 30 frames per second; columns of stores hold 64 bits


@dataclass(frozen=True, kw_only=True)
class Span:
    """Part of a video: seconds, or an end frame in their place."""

    start_s: float | None = None
    end_s: float | None = None
    end_frame: int | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question as its annotations give it."""

    question_id: str
    videos: tuple[str, ...]  # names of its video, with or without extension: the first that there is
    text: str
    answer: str
    options: tuple[str, ...] = ()  # empty: open-ended
    answer_index: int | None = None
    category: str | None = None
    span: Span = Span()


def choice(options: tuple[str, ...], index: object) -> dict[str, Any]:
    """The fields of a multiple-choice question, of the right option's 0-based index."""
    number = whole_number(index)
    if isinstance(index, str) and index.strip().isdecimal():
        number = int(index)
    if number is None or not 0 <= number < len(options):
        raise RecordError("answer is not the index of an option")
    return {"options": options, "answer_index": number, "answer": options[number]}


def texts(values: object) -> tuple[str, ...]:
    """Options as a list of texts or whole numbers."""
    if not isinstance(values, list | tuple) or not values or any(is_absent(value) for value in values):
        raise RecordError("options are not a list of texts")
    return tuple(number_or_text(value) for value in values)


def required(row: dict[str, Any], name: str) -> Any:
    """A field that a record must have."""
    if is_absent(value := row.get(name)):
        raise RecordError(f"row has no {name}")
    return value


def category_of(value: object) -> str | None:
    """A category's name, None where there is none."""
    return None if is_absent(value) else number_or_text(value)


def span_of(time: object, end_frame: object) -> Span:
    """`[start, end]` in seconds, NaN or null at the start being 0, at the end the file's; 0 or more end_frame wins."""
    if not is_absent(end_frame):
        last = whole_number(end_frame)
        if last is None or last > MAX_FRAME:
            raise RecordError("end_frame is not a frame's number")
        if last >= 0:
            return Span(end_frame=last)
    if time is None or (isinstance(time, float) and math.isnan(time)):
        return Span()
    if not isinstance(time, list) or len(time) != 2:
        raise RecordError("time is not [start, end] in seconds")
    start, end = (seconds(value) for value in time)
    return Span(start_s=0.0 if start is None else start, end_s=end)


def seconds(value: object) -> float | None:
    """Seconds; None for NaN and null."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError("time is not [start, end] in seconds")
    try:
        return None if math.isnan(value) else float(value)
    except OverflowError:  # a whole number of more than 308 digits
        raise RecordError("span is not possible") from None


def seconds_of_text(text: object) -> float | None:
    """Seconds as a table writes them; None for an empty cell and for NaN."""
    if is_absent(text):
        return None
    try:
        return seconds(float(text) if isinstance(text, str) else text)
    except ValueError:
        raise RecordError("time is not [start, end] in seconds") from None


def read_table(path: Path, delimiter: str, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows of a CSV file with a header that has these columns, every value a text."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter=delimiter)
            if missing := [name for name in columns if name not in (rows.fieldnames or ())]:
                raise UserError(
                    f"annotation file {path} has no column {', '.join(missing)}; its columns are"
                    f" {', '.join(rows.fieldnames or ())[:300] or 'none'}"
                )
            yield from rows
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"annotation file {path} cannot be read: {error}") from error


def check_row(row: dict[str, Any]) -> None:
    """Refuse a row of another length than the header, which csv marks by None."""
    if None in row or None in row.values():
        raise RecordError("row has another number of fields than the header")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object by names."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"annotation file {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"annotation file {path} must hold a JSON object, got {type(value).__name__}")
    return value


def question_text(value: object) -> str:
    """The text of a question."""
    if is_absent(value):
        raise RecordError("row has no question")
    return check_text(value)

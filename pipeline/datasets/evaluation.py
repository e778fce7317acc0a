"""Evaluation sets in the layout of princetonvisualai/merv: one folder per benchmark.

A folder holds `test_q.json`, `test_a.json` and the videos: `videos/NAME.*` (a file, or a folder of frames) or, if there
is a `videos.txt` (NAME, TAB, path), the paths in it. NAME may have its extension. Each benchmark gives one set of
held-out samples, with a span or end frame in the clip, and options and answer index where it is multiple choice. A span
may hold NaN: at the start it means 0, at the end the end of the file. An `end_frame` of 0 or more replaces the span.
Tables leave traces in JSON: 3.0 is 3, and null, NaN or "" behind the options is padding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featurestore.clips import Turn
from featurestore.locate import names_of
from mervcache.errors import UserError
from pipeline.datasets.base import (
    ABSENT,
    FOLDER_FAULTS,
    DatasetSpec,
    ListingBuilder,
    Option,
    RecordError,
    check_text,
    each_record,
    is_absent,
    is_safe,
    media_path,
    number_or_text,
    record_id,
    whole_number,
)
from pipeline.datasets.json_records import find_annotations, read_records
from pipeline.media import kind_of_path

MAX_FRAME = 2**31  # 2 years of video at 30 frames per second; columns of stores hold 64 bits
QUESTIONS, ANSWERS, VIDEOS, VIDEO_TABLE = "test_q.json", "test_a.json", "videos", "videos.txt"

DOWNLOAD = f"""\
Per benchmark one folder under the root, for example MSVD/, with {QUESTIONS}, {ANSWERS} and {VIDEOS}/. The links are in
the evaluation part of the README of princetonvisualai/merv and in TRAIN_AND_VALIDATE.md of Video-LLaVA."""


def collect(builder: ListingBuilder, options: Mapping[str, Any]) -> None:
    """Read every benchmark under the root, in the order of their names; the root may itself be one benchmark."""
    root = builder.root
    is_benchmark = find_annotations(root, QUESTIONS) is not None
    folders = [root] if is_benchmark else sorted(path for path in root.glob("*") if find_annotations(path, QUESTIONS))
    if not folders:
        deeper = sorted({path.parent for path in root.glob("*/*") if find_annotations(path, QUESTIONS)})
        hint = f"; did you mean --root {deeper[0]}?" if deeper else f"\n{DOWNLOAD}"
        raise UserError(f"no benchmark under {root}: expected BENCHMARK/{QUESTIONS}{hint}")
    requested, known = names_of(str(options["benchmarks"])), [path.name for path in folders]
    if unknown := [name for name in requested if name not in known]:
        raise UserError(f"no benchmark {', '.join(unknown)} under {root}; there are {', '.join(known)}")
    folders = [path for path in folders if not requested or path.name in requested]

    option = str(options["media_root"])
    if not option:
        option = ".." if any((folder / VIDEO_TABLE).is_file() for folder in folders) else "."
    media_root = Path(os.path.normpath(root / option))
    if not media_root.is_dir() or not root.is_relative_to(media_root):
        raise UserError(f"media_root must be the root {root} or a folder above it, got {media_root}")
    builder.root = media_root  # clip paths are relative to it
    for folder in folders:
        _collect_benchmark(builder, folder)


def _collect_benchmark(builder: ListingBuilder, folder: Path) -> None:
    name = f"{builder.name}-{folder.name}"
    questions_file, answers_file = (find_annotations(folder, name, builder.notes) for name in (QUESTIONS, ANSWERS))
    if answers_file is None:
        raise UserError(f"benchmark {folder.name} has {questions_file.name} but no {ANSWERS} in {folder}")
    builder.declare_samples(name)
    origin = f"{folder.name}/{answers_file.name}"
    answers: dict[str, dict] = {}  # question id -> answer row; a second answer to one question is refused
    for position, row in each_record(builder, read_records(answers_file), origin):
        try:
            if answers.setdefault(_question_id(row), row) is not row:
                raise RecordError("question has two answers")
        except RecordError as error:
            builder.reject(str(error), f"{origin} record {position} (id {row.get('question_id')!r})")
    videos = _Videos.of(builder.root, folder)
    origin = f"{folder.name}/{questions_file.name}"
    for position, row in each_record(builder, read_records(questions_file), origin):
        try:
            question_id = _question_id(row)
            if question_id not in answers:
                raise RecordError("question has no answer")
            fields = _question_fields(row, answers[question_id])
            path = videos.find(number_or_text(row.get("video_name")))
            span = _span(row)
            if path is not None:
                clip_id = builder.add_clip(path, kind_of_path(path) or "video", **span)
                builder.add_sample(name, f"{folder.name}/{question_id}", clip_id, source=folder.name, **fields)
        except RecordError as error:
            builder.reject(str(error), f"{origin} record {position} (id {row.get('question_id')!r})")
    for place, names in videos.unknown.items():
        builder.miss(place, len(names))


def _question_id(row: dict) -> str:
    if not (found := record_id(row.get("question_id"))):
        raise RecordError("row has no question_id")
    return found


def _question_fields(row: dict, answer: dict) -> dict[str, Any]:
    """Turns, options and answer index of one question; the evaluator adds the prompt."""
    options = _options(row)
    index = whole_number(answer.get("answer_id")) if options else None
    if options and (index is None or not 0 <= index < len(options)):
        raise RecordError("answer_id is not one of the options")
    text = options[index] if options else number_or_text(answer.get("answer"))
    categories = (value for key in ("category", "type") if isinstance(value := row.get(key), str) and value.strip())
    category = next(categories, None)
    return {
        "turns": (Turn(role="human", text=check_text(row.get("question"))), Turn(role="gpt", text=text)),
        "stage": "eval",
        "split": "heldout",
        "category": None if category is None else check_text(category),
        "options": options,
        "answer_index": index,
    }


def _options(row: dict) -> tuple[str, ...]:
    """The first `num_option` of the options, without padding where no number is given, () for an open question."""
    options = row.get("options")
    if options is None or (isinstance(options, float) and math.isnan(options)):
        return ()
    if not isinstance(options, list) or is_absent(options):
        raise RecordError("options are not a list of texts")
    number = row.get("num_option")
    if is_absent(number):
        number = max(place for place, option in enumerate(options, start=1) if not is_absent(option))
    number = whole_number(number)
    if number is None or not 1 <= number <= len(options):
        raise RecordError("num_option is not a number of the options")
    return tuple(number_or_text(option) for option in options[:number])


def _span(row: dict) -> dict[str, float | int | None]:
    end_frame = row.get("end_frame")
    if not is_absent(end_frame):
        last = whole_number(end_frame)
        if last is None or last > MAX_FRAME:
            raise RecordError("end_frame is not a frame's number")
        if last >= 0:
            return {"end_frame": last}
    time = row.get("time")
    if time is None or (isinstance(time, float) and math.isnan(time)):
        return {}
    if not isinstance(time, list) or len(time) != 2:
        raise RecordError("time is not [start, end] in seconds")
    start, end = (_seconds(value) for value in time)
    return {"start_s": 0.0 if start is None else start, "end_s": end}


def _seconds(value: object) -> float | None:
    """Seconds; None for NaN and null."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError("time is not [start, end] in seconds")
    try:
        return None if math.isnan(value) else float(value)
    except OverflowError:  # a whole number of more than 308 digits
        raise RecordError("span is not possible") from None


@dataclass
class _Videos:
    """Paths of a benchmark's videos: by table, else by listing each folder once."""

    root: Path  # that paths are relative to
    folder: str  # of the videos, relative to the root
    table: dict[str, str] | None
    listed: dict[str, dict[str, str]] = field(
        default_factory=dict
    )  # folder -> name with or without extension -> file name
    unknown: dict[str, set[str]] = field(default_factory=dict)  # folder -> names that no file has

    @classmethod
    def of(cls, root: Path, benchmark: Path) -> _Videos:
        folder = "/".join((*benchmark.relative_to(root).parts, VIDEOS))
        path = benchmark / VIDEO_TABLE
        if not path.is_file():
            return cls(root, folder, None)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        pairs = [line.split("\t") for line in lines if line.strip()]
        for i, pair in enumerate(pairs, start=1):
            if len(pair) != 2:
                got = "<TAB>".join(pair)[:200]
                raise UserError(f"{path}, entry {i}: expected NAME, one tab, path; got {got!r}")
        return cls(root, folder, dict(pairs))

    def find(self, name: str) -> str | None:
        """The path of the video called `name`, relative to the root; None (and noted in `unknown`) if there is none."""
        if self.table is not None:
            if name not in self.table:
                raise RecordError(f"video is not in {VIDEO_TABLE}")
            return media_path(self.root, self.table[name])
        path = media_path(self.root / self.folder, name)
        inner, _, stem = path.rpartition("/")
        folder = f"{self.folder}/{inner}" if inner else self.folder
        if not is_safe(f"{folder}/{stem}"):
            raise RecordError("media path is unsafe")
        if folder not in self.listed:
            self.listed[folder] = _names_by_stem(self.root / folder)
        file_name = self.listed[folder].get(stem)
        if file_name is None:
            self.unknown.setdefault(folder, set()).add(stem)
            return None
        return f"{folder}/{file_name}"


def _names_by_stem(folder: Path) -> dict[str, str]:
    """Name with or without extension -> entry.

    Of several that differ in their extension, a video file comes before a folder of frames before anything else.
    """
    whole: dict[str, str] = {}
    ranked: dict[str, tuple[int, str]] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                whole[entry.name] = entry.name
                is_folder = os.path.isdir(entry.path)  # False for a loop of links, where entry.is_dir() raises
                stem = entry.name if is_folder else entry.name.rpartition(".")[0] or entry.name
                rank = 1 if is_folder else 0 if kind_of_path(entry.name) == "video" else 2
                ranked[stem] = min(ranked.get(stem, (3, "")), (rank, entry.name))
    except OSError as error:
        if error.errno in FOLDER_FAULTS:
            raise RecordError(FOLDER_FAULTS[error.errno]) from None
        if error.errno in ABSENT:
            return {}
        raise UserError(f"media folder {folder} cannot be listed: {error.strerror}") from error
    return whole | {stem: name for stem, (_, name) in ranked.items()}


SPEC = DatasetSpec(
    name="eval",
    summary="evaluation benchmarks in MERV's layout: questions, answers, videos; open-ended and multiple choice",
    default_root="data/eval",
    download=DOWNLOAD,
    collect=collect,
    stages=("eval",),
    options={
        "benchmarks": Option(default="", help="folders to read, separated by commas; empty: all"),
        "media_root": Option(
            default="",
            help=f"folder that paths are relative to: the root, or one above it as in '..'; "
            f"empty: the folder above the root where a benchmark has {VIDEO_TABLE}, else the root",
        ),
    },
)

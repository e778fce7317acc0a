"""Evaluation sets: one folder per benchmark, as it is published, in MERV's layout or as plain questions.

A folder holds the annotation files, by whose names `pipeline.datasets.benchmarks` knows the format, and the videos:
`videos/NAME.*` (a file, or a folder of frames), the same under the published name of that folder, or, if there is a
`videos.txt` (NAME, TAB, path), the paths in it. NAME may have its extension. Each benchmark gives one set of held-out
samples, with a span or end frame in the clip, and options and answer index where it is multiple choice. A span may
hold NaN: at the start it means 0, at the end the end of the file. An `end_frame` of 0 or more replaces the span. Tables
leave traces in JSON: 3.0 is 3, and null, NaN or "" behind the options is padding.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
    each_record,
    is_safe,
    media_path,
)
from pipeline.datasets.benchmarks import ANSWERS, FORMATS, QUESTIONS, Format, Source, format_of
from pipeline.datasets.questions import Question
from pipeline.media import kind_of_path

VIDEOS, VIDEO_TABLE = "videos", "videos.txt"

DOWNLOAD = f"""\
Per benchmark one folder under the root, for example MSVD/, with its annotation files and {VIDEOS}/. Formats by file:
{chr(10).join(f"  {' or '.join(each.files)}: {each.name}" for each in FORMATS)}
MERV's layout is {QUESTIONS}, {ANSWERS}; the links are in the evaluation part of the README of princetonvisualai/merv
and in TRAIN_AND_VALIDATE.md of Video-LLaVA. Plain questions have video, question and answer, or options and
answer_index (from 0); question_id, category, start, end (seconds) and end_frame where there are any."""


def collect(builder: ListingBuilder, options: Mapping[str, Any]) -> None:
    """Read every benchmark under the root, in the order of their names; the root may itself be one benchmark."""
    root = builder.root
    own = format_of(root)
    formats = {root: own} if own else {path: format_of(path) for path in sorted(root.glob("*")) if path.is_dir()}
    formats = {path: found for path, found in formats.items() if found is not None}
    if not formats:
        deeper = sorted({path.parent for path in root.glob("*/*") if path.is_dir() and format_of(path)})
        hint = f"; did you mean --root {deeper[0]}?" if deeper else f"\n{DOWNLOAD}"
        raise UserError(f"no benchmark under {root}: expected BENCHMARK/{QUESTIONS}{hint}")
    requested, known = names_of(str(options["benchmarks"])), [path.name for path in formats]
    if unknown := [name for name in requested if name not in known]:
        raise UserError(f"no benchmark {', '.join(unknown)} under {root}; there are {', '.join(known)}")
    formats = {path: found for path, found in formats.items() if not requested or path.name in requested}

    option = str(options["media_root"])
    if not option:
        option = ".." if any((folder / VIDEO_TABLE).is_file() for folder in formats) else "."
    media_root = Path(os.path.normpath(root / option))
    if not media_root.is_dir() or not root.is_relative_to(media_root):
        raise UserError(f"media_root must be the root {root} or a folder above it, got {media_root}")
    builder.root = media_root  # clip paths are relative to it
    for folder, found in formats.items():
        _collect_benchmark(builder, folder, found, options)


def _collect_benchmark(builder: ListingBuilder, folder: Path, found: Format, options: Mapping[str, Any]) -> None:
    name = f"{builder.name}-{folder.name}"
    file = found.find(folder, builder.notes)
    assert file is not None  # by which the format was found
    source = Source(builder=builder, folder=folder, file=file, options=options)
    builder.declare_samples(name)
    records, parse = found.open(source)
    if others := [path.name for each in FORMATS if each is not found and (path := each.find(folder))]:
        builder.notes.append(f"{', '.join(others)} passed over in {folder}, {source.file.name} is read")
    if found.note:
        builder.notes.append(f"{folder.name}: {found.note}")
    videos = _Videos.of(builder.root, folder, found.media)
    origin = f"{folder.name}/{source.file.name}"
    for position, row in each_record(builder, records, origin):
        try:
            question = parse(row)
            path = videos.find(question.videos)
            if path is not None:
                clip_id = builder.add_clip(path, kind_of_path(path) or "video", **asdict(question.span))
                builder.add_sample(
                    name, f"{folder.name}/{question.question_id}", clip_id, **_fields(folder.name, question)
                )
        except RecordError as error:
            builder.reject(str(error), f"{origin} record {position} (id {_name_of(row)!r})")
    for place, names in videos.unknown.items():
        for name in names:
            builder.miss(f"{place}/{name}")


def _fields(source: str, question: Question) -> dict[str, Any]:
    """The fields of a sample; the evaluator adds the prompt."""
    return {
        "turns": (Turn(role="human", text=question.text), Turn(role="gpt", text=question.answer)),
        "stage": "eval",
        "split": "heldout",
        "source": source,
        "category": question.category,
        "options": question.options,
        "answer_index": question.answer_index,
    }


def _name_of(row: Mapping[str, Any]) -> object:
    return next((row[name] for name in ("question_id", "id", "qid", "example_id", "vid_id") if name in row), None)


@dataclass
class _Videos:
    """Paths of a benchmark's videos: by table, else by listing each folder once."""

    root: Path  # that paths are relative to
    folders: tuple[str, ...]  # of the videos, relative to the root
    table: dict[str, str] | None
    listed: dict[str, dict[str, str]] = field(
        default_factory=dict
    )  # folder -> name with or without extension -> file name
    unknown: dict[str, set[str]] = field(default_factory=dict)  # folder -> names that no file has

    @classmethod
    def of(cls, root: Path, benchmark: Path, published: Sequence[str] = ()) -> _Videos:
        names = [name for name in (VIDEOS, *published) if (benchmark / name).is_dir()] or [VIDEOS]
        folders = tuple("/".join((*benchmark.relative_to(root).parts, name)) for name in names)
        path = benchmark / VIDEO_TABLE
        if not path.is_file():
            return cls(root, folders, None)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        pairs = [line.split("\t") for line in lines if line.strip()]
        for i, pair in enumerate(pairs, start=1):
            if len(pair) != 2:
                got = "<TAB>".join(pair)[:200]
                raise UserError(f"{path}, entry {i}: expected NAME, one tab, path; got {got!r}")
        return cls(root, folders, dict(pairs))

    def find(self, names: Sequence[str]) -> str | None:
        """The path of the video with one of these names, relative to the root; None (and noted) if there is none."""
        if self.table is not None:
            if not (known := [name for name in names if name in self.table]):
                raise RecordError(f"video is not in {VIDEO_TABLE}")
            return media_path(self.root, self.table[known[0]])
        places = [self._place(folder, name) for folder in self.folders for name in names]
        for folder, stem in places:
            if folder not in self.listed:
                self.listed[folder] = _names_by_stem(self.root / folder)
            if (file_name := self.listed[folder].get(stem)) is not None:
                return f"{folder}/{file_name}"
        folder, stem = places[0]
        self.unknown.setdefault(folder, set()).add(stem)
        return None

    def _place(self, folder: str, name: str) -> tuple[str, str]:
        """Folder and name without extension."""
        inner, _, stem = media_path(self.root / folder, name).rpartition("/")
        folder = f"{folder}/{inner}" if inner else folder
        if not is_safe(f"{folder}/{stem}"):
            raise RecordError("media path is unsafe")
        return folder, stem


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
    summary="evaluation benchmarks as published, in MERV's layout or plain; open-ended and multiple choice",
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
        "ssv2_seed": Option(default=0, help="of Something-Something: seed that the options are drawn by"),
        "ssv2_temporal": Option(
            default="", help="of Something-Something: file with the classes of the temporal subset; empty: built in"
        ),
    },
)

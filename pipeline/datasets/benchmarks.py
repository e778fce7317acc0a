"""Formats of benchmarks: the annotation files as they are published, MERV's layout, and a plain one.

A folder's format is found by the names of its files. Each gives `Question`s; where their videos are, and how many are
missing, is for `pipeline.datasets.evaluation`.

Sources: MSVD-QA, MSRVTT-QA (Xu et al. 2017), TGIF-QA (arXiv 1704.04497; FrameQA, the full test set), ActivityNet-QA
(arXiv 1906.02467), Perception Test (arXiv 2305.13786), NExT-QA (arXiv 2105.08276), TVQA (arXiv 1809.01696), VLEP
(arXiv 2010.07999), Something-Something V2 (arXiv 1706.04261).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mervcache.errors import UserError
from mervcache.files import sha256_hex
from pipeline.datasets.base import (
    ListingBuilder,
    RecordError,
    check_text,
    each_record,
    is_absent,
    number_or_text,
    record_id,
    whole_number,
)
from pipeline.datasets.json_records import find_annotations, read_records
from pipeline.datasets.questions import (
    Question,
    Span,
    category_of,
    check_row,
    choice,
    question_text,
    read_object,
    read_table,
    required,
    seconds_of_text,
    span_of,
    texts,
)

QUESTIONS, ANSWERS = "test_q.json", "test_a.json"
TEMPORAL_CLASSES = Path(__file__).with_name("ssv2_temporal.txt")
NUM_CHOICES = 5  # of a question made of Something-Something's labels
LETTERS = ("a0", "a1", "a2", "a3", "a4")  # columns of options in NExT-QA and TVQA
ACTIVITYNET_TYPES = dict(
    enumerate(
        (
            "motion",
            "spatial relationship",
            "temporal relationship",
            "yes/no",
            "color",
            "object",
            "location",
            "number",
            "other",
        )
    )
)
TGIF_TYPES = dict(enumerate(("object", "number", "color", "location")))  # as COCO-QA numbers them
QUESTION_WORDS = ("what", "who", "how", "when", "where")  # the types that MSVD-QA and MSRVTT-QA report
VLEP_QUESTION = "Which of these events is more likely to happen next?"
SSV2_QUESTION = "Which action does the video show?"
_SHOW = re.compile(r"([a-z]+)_s\d\de\d\d_")

Parse = Callable[[dict[str, Any]], Question]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder whose questions are read."""

    builder: ListingBuilder
    folder: Path
    file: Path  # of the questions
    options: Mapping[str, Any]  # of the dataset

    def beside(self, *names: str) -> Path | None:
        """The first of these files that the folder has; JSON in any form."""
        for name in names:
            is_json = name.endswith(".json")
            path = find_annotations(self.folder, name, self.builder.notes) if is_json else self.folder / name
            if path is not None and path.is_file():
                return path
        return None


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to write a benchmark's questions."""

    name: str
    files: tuple[str, ...]  # names of the file of questions, the first that is there
    open: Callable[[Source], tuple[Iterable[object], Parse]]
    media: tuple[str, ...] = ()  # names that the folder of videos has where it is published, besides videos/
    note: str = ""  # what a reader of the scores must know

    def find(self, folder: Path, notes: list[str] | None = None) -> Path | None:
        """The file of questions in a folder; others that could be it are added to `notes`."""
        found = [
            path
            for name in self.files
            if (
                path := find_annotations(folder, name, notes)
                if name.endswith(".json")
                else (folder / name if (folder / name).is_file() else None)
            )
        ]
        if len(found) > 1 and notes is not None:
            notes.append(
                f"{', '.join(path.name for path in found[1:])} passed over in {folder}, {found[0].name} is read"
            )
        return found[0] if found else None


def format_of(folder: Path) -> Format | None:
    """The format of the questions in a folder, of several the first."""
    return next((each for each in FORMATS if each.find(folder) is not None), None)


def _merv(source: Source) -> tuple[Iterable[object], Parse]:
    """`test_q.json` and `test_a.json`, matched by question_id."""
    builder, name = source.builder, source.folder.name
    path = source.beside(ANSWERS)
    if path is None:
        raise UserError(f"benchmark {name} has {source.file.name} but no {ANSWERS} in {source.folder}")
    is_activitynet = "activitynet" in name.casefold()
    origin = f"{name}/{path.name}"
    answers: dict[str, dict] = {}  # question id -> answer row; a second answer to one question is refused
    for position, row in each_record(builder, read_records(path), origin):
        try:
            if answers.setdefault(_question_id(row), row) is not row:
                raise RecordError("question has two answers")
        except RecordError as error:
            builder.reject(str(error), f"{origin} record {position} (id {row.get('question_id')!r})")

    def parse(row: dict[str, Any]) -> Question:
        question_id = _question_id(row)
        if question_id not in answers:
            raise RecordError("question has no answer")
        answer, options = answers[question_id], _numbered_options(row)
        fields: dict[str, Any] = {}
        if options:
            index = whole_number(answer.get("answer_id"))
            if index is None or not 0 <= index < len(options):
                raise RecordError("answer_id is not one of the options")
            fields = choice(options, index)
        else:
            fields = {"answer": number_or_text(answer.get("answer"))}
        named = (value for key in ("category", "type") if isinstance(value := row.get(key), str) and value.strip())
        category = next(named, None)
        if category is None and is_activitynet:
            number = whole_number(answer.get("type"))
            category = None if number is None else ACTIVITYNET_TYPES.get(number)
        video = number_or_text(row.get("video_name"))
        return Question(
            question_id=question_id,
            videos=(video, f"v_{video}") if is_activitynet else (video,),
            text=check_text(row.get("question")),
            category=category_of(category),
            span=span_of(row.get("time"), row.get("end_frame")),
            **fields,
        )

    return read_records(source.file), parse


def _question_id(row: dict) -> str:
    if not (found := record_id(row.get("question_id"))):
        raise RecordError("row has no question_id")
    return found


def _numbered_options(row: dict) -> tuple[str, ...]:
    """The first `num_option` of the options, without padding where no number is given, () for an open question."""
    options = row.get("options")
    if options is None or (isinstance(options, float) and options != options):
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


def _msvd(source: Source) -> tuple[Iterable[object], Parse]:
    """`test_qa.json` of MSVD-QA or MSRVTT-QA; `youtube_mapping.txt` (NAME vidN) names the videos of MSVD."""
    mapping, table = {}, source.folder / "youtube_mapping.txt"
    if table.is_file():
        try:
            pairs = [line.split() for line in table.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{table} cannot be read: {error}") from error
        if odd := [pair for pair in pairs if len(pair) != 2]:
            raise UserError(f"{table}: expected NAME vidN in a line, got {' '.join(odd[0])[:200]!r}")
        mapping = {name: video for video, name in pairs}

    def parse(row: dict[str, Any]) -> Question:
        number = number_or_text(required(row, "video_id"))
        if mapping and f"vid{number}" not in mapping:
            raise RecordError("video is not in youtube_mapping.txt")
        videos = (mapping[f"vid{number}"],) if mapping else (f"video{number}", f"vid{number}", number)
        text = question_text(row.get("question"))
        word = text.split()[0].lower()
        return Question(
            question_id=record_id(required(row, "id")),
            videos=videos,
            text=text,
            answer=number_or_text(required(row, "answer")),
            category=word if word in QUESTION_WORDS else None,
        )

    return read_records(source.file), parse


def _tgif(source: Source) -> tuple[Iterable[object], Parse]:
    """`Test_frameqa_question.csv`, tab separated: the whole test set of FrameQA."""

    def parse(row: dict[str, Any]) -> Question:
        check_row(row)
        kind = row.get("type")
        gif, identity = required(row, "gif_name"), row.get("vid_id") or row.get("key")
        return Question(
            question_id=record_id(identity) or f"{gif}/{row['question']}",
            videos=(gif,),
            text=question_text(row["question"]),
            answer=required(row, "answer"),
            category=TGIF_TYPES.get(int(kind)) if isinstance(kind, str) and kind.strip().isdecimal() else None,
        )

    return read_table(source.file, "\t", ("gif_name", "question", "answer")), parse


def _perception(source: Source) -> tuple[Iterable[object], Parse]:
    """`mc_question_valid.json` or `all_valid.json`: video -> its questions; with the frames where videos are cut."""
    cuts_file = source.beside("cut_frame_mapping_valid.json", "cut_frame_mapping.json")
    cuts = {} if cuts_file is None else read_object(cuts_file)
    if cuts_file is None:
        source.builder.notes.append(
            f"{source.folder.name} has no cut_frame_mapping_valid.json: its videos are read to their end, where some of"
            " them give the answer away"
        )

    def rows() -> Iterable[object]:
        for video, record in read_object(source.file).items():
            found = record.get("mc_question", []) if isinstance(record, dict) else None
            if isinstance(found, list):
                yield from ({"video": video, **each} if isinstance(each, dict) else each for each in found)
            else:
                yield record if not isinstance(record, dict) else {"video": video}

    def parse(row: dict[str, Any]) -> Question:
        video = required(row, "video")
        return Question(
            question_id=f"{video}_{record_id(required(row, 'id'))}",
            videos=(video,),
            text=question_text(row.get("question")),
            category=category_of(row.get("area")),
            span=span_of(None, cuts.get(video)),
            **choice(texts(row.get("options")), row.get("answer_id")),
        )

    return rows(), parse


def _nextqa(source: Source) -> tuple[Iterable[object], Parse]:
    """`val.csv` or `test.csv`; `map_vid_vidorID.json` names the files of the videos."""
    path = source.beside("map_vid_vidorID.json")
    names = {} if path is None else read_object(path)

    def parse(row: dict[str, Any]) -> Question:
        check_row(row)
        video = required(row, "video")
        mapped = names.get(video)
        return Question(
            question_id=f"{video}_{required(row, 'qid')}",
            videos=(video,) if mapped is None else (number_or_text(mapped), video),
            text=question_text(row["question"]),
            category=category_of(row.get("type")),
            **choice(texts([row[letter] for letter in LETTERS]), row["answer"]),
        )

    return read_table(source.file, ",", ("video", "question", "answer", "qid", *LETTERS)), parse


def _tvqa(source: Source) -> tuple[Iterable[object], Parse]:
    """`tvqa_val.jsonl`; the span is `ts`, "START-END" in seconds."""

    def parse(row: dict[str, Any]) -> Question:
        video = number_or_text(required(row, "vid_name"))
        show = found[1] if (found := _SHOW.match(video)) else "bbt"  # names of The Big Bang Theory have no prefix
        return Question(
            question_id=record_id(required(row, "qid")),
            videos=(video, f"{show}_frames/{video}"),
            text=question_text(row.get("q")),
            category=category_of(row.get("show_name")),
            span=_ts(row.get("ts")),
            **choice(texts([row.get(letter) for letter in LETTERS]), row.get("answer_idx")),
        )

    return read_records(source.file), parse


def _ts(value: object) -> Span:
    """The span "1.21-8.49"; NaN at its start means 0, at its end the end of the file."""
    parts = value.split("-") if isinstance(value, str) else ()
    if len(parts) != 2:
        raise RecordError("ts is not START-END in seconds")
    return span_of([seconds_of_text(part) for part in parts], None)


def _vlep(source: Source) -> tuple[Iterable[object], Parse]:
    """`vlep_dev_release.jsonl`; the span is that of the event before."""

    def parse(row: dict[str, Any]) -> Question:
        return Question(
            question_id=record_id(required(row, "example_id")),
            videos=(number_or_text(required(row, "vid_name")),),
            text=VLEP_QUESTION,
            span=span_of(row.get("ts"), None),
            **choice(texts(row.get("events")), row.get("answer")),
        )

    return read_records(source.file), parse


def _ssv2(source: Source) -> tuple[Iterable[object], Parse]:
    """Labels of the validation set as questions with five options, four of them other labels by seeded chance."""
    path = source.beside("something-something-v2-labels.json", "labels.json")
    if path is None:
        raise UserError(f"{source.folder} has {source.file.name} but no labels.json, which lists the classes")
    labels, seed = tuple(read_object(path)), whole_number(source.options["ssv2_seed"])
    if seed is None:
        raise UserError(f"option ssv2_seed is a whole number, got {source.options['ssv2_seed']!r}")
    temporal = read_classes(Path(str(source.options["ssv2_temporal"]) or TEMPORAL_CLASSES))
    if len(labels) < NUM_CHOICES:
        raise UserError(f"{path} has {len(labels)} labels, and a question needs {NUM_CHOICES}")
    known = frozenset(labels)

    def parse(row: dict[str, Any]) -> Question:
        video = record_id(required(row, "id"))
        label = re.sub(r"[\[\]]", "", str(required(row, "template")))
        if label not in known:
            raise RecordError("template is not one of the labels")
        options, index = label_options(video, label, labels, seed)
        return Question(
            question_id=video,
            videos=(video,),
            text=SSV2_QUESTION,
            category="temporal" if label in temporal else "other",
            **choice(options, index),
        )

    return read_records(source.file), parse


def label_options(video: str, label: str, labels: Iterable[str], seed: int = 0) -> tuple[tuple[str, ...], int]:
    """Five options and the place of the right one: a function of seed, video and labels, whatever their order."""

    def draw(purpose: str, name: str) -> str:
        return sha256_hex(f"{seed}\0{video}\0{purpose}\0{name}".encode())

    others = sorted((name for name in set(labels) - {label}), key=lambda name: draw("distractor", name))
    options = sorted((label, *others[: NUM_CHOICES - 1]), key=lambda name: draw("place", name))
    return tuple(options), options.index(label)


def read_classes(path: Path) -> frozenset[str]:
    """The classes in a text file, one a line; lines that begin with # are comments."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list of classes {path} cannot be read: {error}") from error
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def _plain(source: Source) -> tuple[Iterable[object], Parse]:
    """`questions.jsonl` or `questions.csv`: video, question and answer, or options and answer_index."""

    def parse(row: dict[str, Any]) -> Question:
        if is_table:
            check_row(row)
        video, text = number_or_text(required(row, "video")), question_text(row.get("question"))
        fields: dict[str, Any] = {"answer": None}
        if options := _plain_options(row):
            index = row.get("answer_index")
            fields = choice(options, _index_of(row.get("answer"), options) if is_absent(index) else index)
        else:
            fields = {"answer": number_or_text(required(row, "answer"))}
        end_frame = row.get("end_frame")
        if isinstance(end_frame, str) and end_frame.strip().isdecimal():
            end_frame = int(end_frame)
        times = [seconds_of_text(row.get(name)) for name in ("start", "end")]
        return Question(
            question_id=record_id(row.get("question_id")) or sha256_hex(f"{video}\0{text}".encode())[:16],
            videos=(video,),
            text=text,
            category=category_of(row.get("category")),
            span=span_of(None if times == [None, None] else times, end_frame),
            **fields,
        )

    is_table = source.file.suffix == ".csv"
    rows = read_table(source.file, ",", ("video", "question")) if is_table else read_records(source.file)
    return rows, parse


def _plain_options(row: dict[str, Any]) -> tuple[str, ...]:
    """`options` as a list, in a table as JSON; or columns a0, a1, ..., of which the last may be empty."""
    options = row.get("options")
    if isinstance(options, str) and options.strip():
        try:
            options = json.loads(options)
        except (ValueError, RecursionError):
            raise RecordError('options are not a JSON list such as ["red", "blue"]') from None
    if is_absent(options):
        options = [row[name] for name in sorted(row, key=str) if re.fullmatch(r"a\d", str(name))]
        while options and is_absent(options[-1]):
            options.pop()
    return texts(options) if options else ()


def _index_of(answer: object, options: tuple[str, ...]) -> int:
    """The place of the one option that is the answer's text."""
    places = [
        index for index, option in enumerate(options) if not is_absent(answer) and option == number_or_text(answer)
    ]
    if len(places) != 1:
        raise RecordError("answer is not the text of one option; give answer_index, which counts from 0")
    return places[0]


FORMATS = (
    Format(name="MERV's layout, ActivityNet-QA", files=(QUESTIONS,), open=_merv),
    Format(name="MSVD-QA, MSRVTT-QA", files=("test_qa.json",), open=_msvd, media=("YouTubeClips", "TestVideo")),
    Format(name="TGIF-QA", files=("Test_frameqa_question.csv",), open=_tgif, media=("gifs",)),
    Format(name="Perception Test", files=("mc_question_valid.json", "all_valid.json"), open=_perception),
    Format(name="NExT-QA", files=("val.csv", "test.csv"), open=_nextqa, media=("NExTVideo",)),
    Format(
        name="TVQA",
        files=("tvqa_val.json",),
        open=_tvqa,
        media=("frames_hq", "frames"),
        note="subtitles are not used, as in arXiv 2501.01426; figures with subtitles do not compare",
    ),
    Format(
        name="VLEP",
        files=("vlep_dev_release.json",),
        open=_vlep,
        media=("vlep_frames",),
        note="dialogue is not used; the files hold no question, so all have the same one",
    ),
    Format(
        name="SSv2-MCQ",
        files=("something-something-v2-validation.json", "validation.json"),
        open=_ssv2,
        media=("20bn-something-something-v2",),
        note="questions are made of the labels: options by seeded chance, the temporal subset by our list",
    ),
    Format(name="plain questions", files=("questions.json", "questions.csv"), open=_plain),
)

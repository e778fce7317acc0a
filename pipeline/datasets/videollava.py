"""Video-LLaVA's training data: stage 1 captions ("align") and stage 2 instructions ("finetune").

Reads the annotation files as published, merged or one per source. A record names its media under "video" or "image",
relative to the root, or has neither (text only); many records share a clip. `<video>` and `<image>` stay in the text:
the trainer decides where visual tokens go.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from mervcache.errors import UserError
from pipeline.datasets.base import (
    DatasetSpec,
    ListingBuilder,
    RecordError,
    check_text,
    each_record,
    parse_turns,
    record_id,
)

WINDOW_CHARS = 1 << 22
MAX_RECORD_CHARS = 1 << 26  # a record that is longer is not an annotation
_SPACE = " \t\r\n"


# stage -> packagings, the preferred one first; a merge is a plain concatenation (PKU-YuanGroup/Video-LLaVA)
ANNOTATIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "align": (
        ("valley_llavaimage.json",),
        ("llava_image_.json", "valley_.json"),
    ),
    "finetune": (
        ("videochatgpt_llavaimage_tune.json",),
        ("llava_image_tune_.json", "videochatgpt_tune_.json", "nlp_tune.json"),
    ),
}
SOURCE_OF_FOLDER = {"videochatgpt_tune": "videochatgpt"}  # other folders are named like their source
NESTED_FOLDER = "llava_image_tune"  # its sub-folders (coco, gqa, ocr_vqa, textvqa, vg) are the sources

DOWNLOAD = """\
1. Media, from the dataset LanguageBind/Video-LLaVA on the Hugging Face hub (about 735 GB; any part will do):
   videochatgpt_tune_2.zip.* (172 GB), llava_image_tune_2.zip.* (72 GB), valley_2.zip.* (463 GB),
   llava_image.zip (27 GB).
   Join the parts before unpacking: cat NAME.zip.* > NAME.zip
2. Annotations, from the links in TRAIN_AND_VALIDATE.md of PKU-YuanGroup/Video-LLaVA:
   valley_llavaimage.json and videochatgpt_llavaimage_tune.json, or the newer file per source.
3. Under the root: the JSON files, and the folders valley/, llava_image/, videochatgpt_tune/ and llava_image_tune/."""


def collect(builder: ListingBuilder, options: Mapping[str, Any]) -> None:
    """Read every stage that is requested and there, in the first packaging that is there, in whole or in part."""
    del options
    stages = [stage for stage in ANNOTATIONS if builder.wants(stage)]
    has_annotations = False
    for stage in stages:
        present = [tuple(name for name in files if (builder.root / name).is_file()) for files in ANNOTATIONS[stage]]
        chosen = next((files for files in present if files), ())
        for expected, files in zip(ANNOTATIONS[stage], present, strict=True):
            listed = ", ".join(files)
            if files and files != chosen:
                builder.notes.append(f"{stage}: {listed} passed over, {', '.join(chosen)} holds the same records")
            elif files and (lacking := [name for name in expected if name not in files]):
                builder.notes.append(f"{stage}: {', '.join(lacking)} is not there, only {listed} is read")
        if not chosen:
            builder.notes.append(f"{stage}: no annotations, expected {', '.join(ANNOTATIONS[stage][0])}")
        for name in chosen:
            has_annotations = True
            _collect_file(builder, stage, name)
    if not has_annotations:
        expected = [name for stage in stages for name in ANNOTATIONS[stage][0]]
        raise UserError(f"no annotations under {builder.root}: expected {' or '.join(expected)}\n{DOWNLOAD}")


def _collect_file(builder: ListingBuilder, stage: str, file_name: str) -> None:
    samples_name = f"{builder.name}-{stage}"
    builder.declare_samples(samples_name)
    for position, record in each_record(builder, read_json_array(builder.root / file_name), file_name):
        try:
            turns = parse_turns(record.get("conversations"))
            own_id = record_id(record.get("id"))
            named = [kind for kind in ("video", "image") if kind in record]
            if len(named) == 2:
                raise RecordError("record names a video and an image")
            clip_id = path = None  # text only
            if named:
                path = check_text(record[named[0]])
                clip_id = builder.add_clip(path, named[0])
            builder.add_sample(
                samples_name,
                own_id or path or "text",
                clip_id,
                turns,
                stage=stage,
                source=source_of(path),
            )
        except RecordError as error:
            builder.reject(str(error), f"{file_name} record {position} (id {record.get('id')!r})")


def source_of(path: str | None) -> str:
    """The source of a sample, by which mixes are weighted, from the leading folders.

    >>> source_of("videochatgpt_tune/v_1.mp4"), source_of("llava_image_tune/gqa/images/2.jpg"), source_of(None)
    ('videochatgpt', 'gqa', 'text')
    """
    if path is None:
        return "text"
    folders = path.split("/")[:-1]
    if not folders:
        return "other"
    if folders[0] == NESTED_FOLDER and len(folders) > 1:
        return folders[1]
    return SOURCE_OF_FOLDER.get(folders[0], folders[0])


def read_json_array(path: Path, window_chars: int = WINDOW_CHARS) -> Iterator[object]:
    """Yield the elements of the array in `path`; `UserError` with line and column for a broken file.

    The training set's file has 1 GB, and `json.load` would hold it as bytes, as text (four bytes a character if a
    single emoji is in it) and as objects at once. Here `window_chars` of text and one record are in memory.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from _Window(file, path, window_chars).elements()
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"annotation file {path} is not UTF-8 text: {error.reason}") from error


class _Window:
    """The stretch of text that is being parsed."""

    def __init__(self, file: TextIO, path: Path, window_chars: int) -> None:
        self.file, self.path, self.window_chars = file, path, window_chars
        self.text, self.position, self.is_last = "", 0, False
        self.lines_before, self.columns_before = 0, 0  # of the text's first character

    def elements(self) -> Iterator[object]:
        decode = json.JSONDecoder().raw_decode
        self._expect("[", "annotations must be an array of records")
        if self._peek() == "]":
            self.position += 1
        else:
            while True:
                self._peek()
                yield self._element(decode)
                if self._peek() == "]":
                    self.position += 1
                    break
                self._expect(",", "expected ',' or ']' after a record")
        if self._peek():
            raise self._error("there is more text after the array")

    def _element(self, decode) -> object:
        """One value; a value cut off by the window's end looks like an error until more text is there."""
        while True:
            try:
                value, end = decode(self.text, self.position)
                # A number near the window's end may go on behind it: of "1e+10" the parser takes the 1 from "1e+".
                if self.is_last or len(self.text) - end > 2 or not isinstance(value, int | float):
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                if self.is_last or len(self.text) - self.position > MAX_RECORD_CHARS:
                    raise self._error(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:  # digits without end, brackets without end
                raise self._error(f"a value is too large ({type(error).__name__})") from None
            self._more()

    def _peek(self) -> str:
        """The next character that is not space, "" at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in _SPACE:
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if self.is_last:
                return ""
            self._more()

    def _expect(self, character: str, message: str) -> None:
        if self._peek() != character:
            raise self._error(message)
        self.position += 1

    def _more(self) -> None:
        """Drop what is parsed and read on, at least as much as is kept, so that retries stay linear."""
        newlines = self.text.count("\n", 0, self.position)
        last = self.text.rfind("\n", 0, self.position)
        self.columns_before = self.position - last - 1 if newlines else self.columns_before + self.position
        self.lines_before += newlines
        kept = self.text[self.position :]
        fresh = self.file.read(max(self.window_chars, len(kept)))
        self.text, self.position, self.is_last = kept + fresh, 0, not fresh

    def _error(self, message: str, position: int | None = None) -> UserError:
        position = self.position if position is None else position
        newlines = self.text.count("\n", 0, position)
        before = self.columns_before if not newlines else -self.text.rfind("\n", 0, position) - 1
        line, column = self.lines_before + newlines + 1, before + position + 1
        return UserError(
            f"annotation file {self.path} is broken at line {line}, column {column}: {message}; download it again"
        )


SPEC = DatasetSpec(
    name="videollava",
    summary="Video-LLaVA's training data: stage 1 captions, stage 2 instructions; videos, images and text",
    default_root="data/videollava",
    download=DOWNLOAD,
    collect=collect,
    stages=tuple(ANNOTATIONS),
)

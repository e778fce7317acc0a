"""Labels of media, one class per clip, from their folders or from a CSV; as conversations and as questions to score.

`folders`: the folder that a file is in names its class, as for image folders: swimming/a.mp4, train/swimming/b.mp4.
A CSV has a column of paths (path, file, file_name, video, image, ...), relative to the root, and one of labels (label,
class or category). Clips under a first folder named val, valid, validation, test or heldout are questions with the
labels as options; all others are trained on.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featurestore.clips import Clip, Turn
from mervcache.errors import UserError
from pipeline.datasets.base import ListingBuilder, RecordError, media_path
from pipeline.datasets.videollava import MEDIA_KEYS, plain_key

FOLDERS = "folders"
HELDOUT = frozenset(("val", "valid", "validation", "test", "heldout"))
SPLITS = HELDOUT | {"train"}
LABEL_COLUMNS = ("label", "class", "category")
QUESTION = {"video": "<video>\nWhat is shown in the video?", "image": "<image>\nWhat is shown in the image?"}
MAX_OPTIONS = 26  # of a question, lettered A to Z; more labels are asked for openly


def collect_labels(builder: ListingBuilder, given: str, clips: Sequence[Clip]) -> None:
    """Add a conversation or a question for each of `clips` that has a label; what has none is counted."""
    label_of = _labels_of_folders(clips) if given == FOLDERS else _labels_of_table(builder, given, clips)
    without = sum(clip.path not in label_of for clip in clips)
    if not label_of:
        raise UserError(
            f"labels={given} labels none of the {len(clips)} clips under {builder.root}: "
            + (
                "put files into a folder per label, such as swimming/a.mp4"
                if given == FOLDERS
                else "its paths are relative to that folder, such as videos/a.mp4"
            )
        )
    if without:
        builder.skip("clips without a label, which have no conversation", without)
    labels = sorted(set(label_of.values()))
    options = tuple(labels) if 2 <= len(labels) <= MAX_OPTIONS else ()
    for clip in clips:
        if (label := label_of.get(clip.path)) is None:
            continue
        is_heldout = clip.path.split("/")[0].lower() in HELDOUT
        fields: dict[str, Any] = {"stage": "finetune", "split": "train"}
        if is_heldout:
            fields = {"stage": "eval", "split": "heldout"}
            if options:
                fields |= {"options": options, "answer_index": options.index(label)}
        if builder.wants(fields["stage"]):
            samples_name = f"{builder.name}-{fields['stage']}"
            turns = (Turn(role="human", text=QUESTION[clip.kind]), Turn(role="gpt", text=label))
            builder.add_sample(
                samples_name, clip.path, clip.clip_id, turns, source=builder.name, category=label, **fields
            )


def _labels_of_folders(clips: Sequence[Clip]) -> dict[str, str]:
    folders = {clip.path: clip.path.split("/")[:-1] for clip in clips}
    return {path: parts[-1] for path, parts in folders.items() if parts and parts[-1].lower() not in SPLITS}


def _labels_of_table(builder: ListingBuilder, given: str, clips: Sequence[Clip]) -> dict[str, str]:
    table = Path(os.path.join(builder.root, given))
    known, found = {clip.path for clip in clips}, {}
    for number, (path, label) in enumerate(_read_table(table), start=1):
        where = f"{table.name} row {number}"
        try:
            path = media_path(builder.root, path)
        except RecordError as error:
            builder.reject(str(error), where)
            continue
        if not label:
            builder.reject("row without a label", where)
        elif path not in known:
            builder.miss(path)
        elif found.setdefault(path, label) != label:
            raise UserError(f"{where} labels {path} {label!r}, an earlier row {found[path]!r}: keep one of them")
    return found


def _read_table(path: Path) -> list[tuple[str, str]]:
    """(path, label) of each row; UserError for what is no such table."""
    if not path.is_file():
        raise UserError(f"labels={path}: there is no such file; give `{FOLDERS}` where folders name the labels")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True, restval="")
            columns = list(reader.fieldnames or ())
            paths = [name for name in columns if plain_key(name) in MEDIA_KEYS or plain_key(name) in ("path", "file")]
            labels = [name for name in columns if name.lower() in LABEL_COLUMNS]
            if len(paths) != 1 or len(labels) != 1:
                raise UserError(
                    f"{path} needs one column of paths (path, file, file_name, video, image, ...) and one of labels"
                    f" ({', '.join(LABEL_COLUMNS)}); it has: {', '.join(columns) or 'none'}"
                )
            return [(row[paths[0]].strip(), row[labels[0]].strip()) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV in UTF-8 that can be read: {error}") from error

"""Video-LLaVA's training data: stage 1 captions and stage 2 instructions about videos, images and nothing.

Comes in: the annotation files as published, in either packaging (merged, or one file per source). Goes out: samples of
stage "align" and "finetune". A record names its media under "video" or "image", relative to the root, or has neither
(text only); many records share a clip. `<video>` and `<image>` stay in the text where they stand: where visual tokens
go is the trainer's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from pipeline.datasets.json_array import read_json_array

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
    """Read every stage that is asked for and there."""
    found = False
    for stage in ANNOTATIONS:
        if not builder.wants(stage):
            continue
        files = _choose_packaging(builder, stage)
        found = found or bool(files)
        for name in files:
            _collect_file(builder, stage, name)
    if not found:
        wanted = [name for stage, sets in ANNOTATIONS.items() if builder.wants(stage) for name in sets[0]]
        raise UserError(f"no annotations under {builder.root}: expected {' or '.join(wanted)}\n{DOWNLOAD}")


def _choose_packaging(builder: ListingBuilder, stage: str) -> tuple[str, ...]:
    """The files of the first packaging that is there, in whole or in part; what was passed over is noted."""
    present = [tuple(name for name in files if (builder.root / name).is_file()) for files in ANNOTATIONS[stage]]
    chosen = next((files for files in present if files), ())
    for i, files in enumerate(present):
        if files and files != chosen:
            builder.notes.append(f"{stage}: {', '.join(files)} passed over, {', '.join(chosen)} holds the same records")
        elif files and (lacking := [name for name in ANNOTATIONS[stage][i] if name not in files]):
            builder.notes.append(f"{stage}: {', '.join(lacking)} is not there, only {', '.join(files)} is read")
    if not chosen:
        builder.notes.append(f"{stage}: no annotations, expected {', '.join(ANNOTATIONS[stage][0])}")
    return chosen


def _collect_file(builder: ListingBuilder, stage: str, file_name: str) -> None:
    samples_name = f"{builder.name}-{stage}"
    builder.declare_samples(samples_name)
    for position, record in each_record(builder, read_json_array(builder.root / file_name), file_name):
        try:
            turns = parse_turns(record.get("conversations"))
            own_id = record_id(record.get("id"))
            clip_id, path = _clip_of(builder, record)
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


def _clip_of(builder: ListingBuilder, record: dict) -> tuple[str | None, str | None]:
    """(clip id, media path), or (None, None) for a text-only record."""
    has_video, has_image = "video" in record, "image" in record
    if has_video and has_image:
        raise RecordError("record names a video and an image")
    if not (has_video or has_image):
        return None, None
    kind = "video" if has_video else "image"
    path = check_text(record[kind])
    return builder.add_clip(path, kind), path


def source_of(path: str | None) -> str:
    """What a mix is weighted by, from the leading folders.

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


SPEC = DatasetSpec(
    name="videollava",
    summary="Video-LLaVA's training data: stage 1 captions, stage 2 instructions; videos, images and text",
    default_root="data/videollava",
    download=DOWNLOAD,
    collect=collect,
    stages=tuple(ANNOTATIONS),
)

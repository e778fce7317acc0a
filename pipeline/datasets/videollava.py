"""Video-LLaVA's training data: stage 1 captions ("align") and stage 2 instructions ("finetune").

Reads the annotation files as published, merged or one per source, and what others write in their layout. A record names
its medium under "video" or "image" (or another key of `MEDIA_KEYS`), relative to the root, or has none (text only);
many records share a clip. `<video>` and `<image>` stay in the text: the trainer decides where visual tokens go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from featurestore.clips import Kind, Turn, without_outer_placeholders
from mervcache.errors import UserError
from pipeline.datasets.base import (
    DatasetSpec,
    ListingBuilder,
    RecordError,
    each_record,
    is_absent,
    media_path,
    parse_turns,
    record_id,
)
from pipeline.datasets.json_records import find_annotations, read_records
from pipeline.media import kind_of_path

# Names of a medium, in lower case without "_" and "-" and without a plural's "s" -> its kind; None: by its extension.
MEDIA_KEYS: dict[str, Kind | None] = {
    **dict.fromkeys(("video", "videopath", "videofile", "videofilename", "clip", "clippath", "clipfile"), "video"),
    **dict.fromkeys(("image", "imagepath", "imagefile", "imagefilename", "img", "imgpath", "picture"), "image"),
    **dict.fromkeys(("media", "mediapath", "mediafile", "filename", "filepath"), None),
}
SPAN_KEYS = frozenset(("start", "end", "starttime", "endtime", "timestamp", "time", "span", "segment"))
KEYS_SHOWN = 5  # of a record, in a reason

OWN = "annotations.json"  # records of one's own, of no published name

# stage -> packagings, the preferred one first; a merge is a plain concatenation (PKU-YuanGroup/Video-LLaVA)
ANNOTATIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "align": (
        ("valley_llavaimage.json",),
        ("llava_image_.json", "valley_.json"),
    ),
    "finetune": (
        ("videochatgpt_llavaimage_tune.json",),
        ("llava_image_tune_.json", "videochatgpt_tune_.json", "nlp_tune.json"),
        (OWN,),
    ),
}
SOURCE_OF_FOLDER = {"videochatgpt_tune": "videochatgpt"}  # other folders are named like their source
NESTED_FOLDER = "llava_image_tune"  # its sub-folders (coco, gqa, ocr_vqa, textvqa, vg) are the sources

DOWNLOAD = """\
Records of your own go into annotations.json (or .jsonl, .json.gz, .jsonl.gz) under the root, each with one medium under
"video" or "image" (also videos, video_path, images, image_path, media, file_name, ...) or with none:
   [{"id": "1", "video": "clips/a.mp4", "conversations": [{"from": "human", "value": "<video>\\nWhat happens?"},
                                                          {"from": "gpt", "value": "A cup falls."}]}]
The published data, about 735 GB (any part will do):
1. Media, from the dataset LanguageBind/Video-LLaVA on the Hugging Face hub:
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
    has_own = find_annotations(builder.root, OWN) is not None
    for stage in stages:
        present = [
            tuple(name for name in files if find_annotations(builder.root, name)) for files in ANNOTATIONS[stage]
        ]
        chosen = next((files for files in present if files), ())
        for expected, files in zip(ANNOTATIONS[stage], present, strict=True):
            listed = ", ".join(files)
            if files and files != chosen:
                same = "is read" if OWN in (*files, *chosen) else "holds the same records"
                builder.notes.append(f"{stage}: {listed} passed over, {', '.join(chosen)} {same}")
            elif files and (lacking := [name for name in expected if name not in files]):
                builder.notes.append(f"{stage}: {', '.join(lacking)} is not there, only {listed} is read")
        if not chosen and not has_own:
            builder.notes.append(f"{stage}: no annotations, expected {', '.join(ANNOTATIONS[stage][0])}")
        for name in chosen:
            has_annotations = True
            _collect_file(builder, stage, name)
    if not has_annotations:
        expected = [OWN] if "finetune" in stages else []
        expected += [name for stage in stages for name in ANNOTATIONS[stage][0]]
        raise UserError(f"no annotations under {builder.root}: expected {' or '.join(expected)}\n{DOWNLOAD}")


def _collect_file(builder: ListingBuilder, stage: str, file_name: str) -> None:
    samples_name = f"{builder.name}-{stage}"
    builder.declare_samples(samples_name)
    path = find_annotations(builder.root, file_name, builder.notes)
    assert path is not None  # the caller has found it
    for position, record in each_record(builder, read_records(path), path.name):
        try:
            if "conversations" not in record:
                raise RecordError(f"conversation is not a list of turns: the record has none ({_keys_of(record)})")
            turns = parse_turns(record["conversations"])
            own_id = record_id(record.get("id"))
            clip_id = path_of_clip = None  # text only
            if medium := named_medium(record):
                path_of_clip = media_path(builder.root, medium[0])
                clip_id = builder.add_clip(path_of_clip, medium[1])
                if span := next((key for key, value in record.items() if _is_span(key, value)), None):
                    builder.skip(f"spans under {_quoted(span)}: the whole file is the clip")
            else:
                check_text_only(record, turns)
            builder.add_sample(
                samples_name,
                own_id or path_of_clip or "text",
                clip_id,
                turns,
                stage=stage,
                source=source_of(path_of_clip),
            )
        except RecordError as error:
            builder.reject(str(error), f"{path.name} record {position} (id {record.get('id')!r})")


def named_medium(record: Mapping[str, Any]) -> tuple[str, Kind] | None:
    """The path and kind of a record's medium, None where it names none; `RecordError` for several or an unclear one."""
    found: dict[tuple[str, Kind], str] = {}  # path, kind -> key
    for key, value in record.items():
        name = plain_key(key)
        if name not in MEDIA_KEYS or is_absent(value):
            continue
        entries = [entry for entry in value if not is_absent(entry)] if isinstance(value, list) else [value]
        if len(entries) > 1:
            raise RecordError(f"record names several media under {_quoted(key)}")
        path = _path_in(entries[0])
        if path is None:
            raise RecordError(f"medium under {_quoted(key)} is not a path")
        kind = MEDIA_KEYS[name] or kind_of_path(path)
        if kind is None:
            raise RecordError(f"medium under {_quoted(key)} has an unknown extension: name it under 'video' or 'image'")
        found.setdefault((path, kind), key)
    if len(found) > 1:
        kinds = {kind for _, kind in found}
        what = "a video and an image" if len(kinds) > 1 else "two media"
        raise RecordError(f"record names {what}, under {' and '.join(map(_quoted, list(found.values())[:2]))}")
    return next(iter(found), None)


def check_text_only(record: Mapping[str, Any], turns: Sequence[Turn]) -> None:
    """Refuse a record that refers to a medium, or names one, under no key that is read."""
    keys = [key for key, value in record.items() if key not in ("id", "conversations") and not is_absent(value)]
    if named := [key for key in keys if any(kind_of_path(path) for path in _paths_in(record[key]))]:
        raise RecordError(f"medium under {_quoted(named[0])} is not read: rename the key to 'video' or 'image'")
    for turn in turns[::2]:
        rest = without_outer_placeholders(turn.text)
        if rest != turn.text.strip():
            raise RecordError(f"question has a media placeholder and no key names a medium ({_keys_of(keys)})")


def plain_key(key: str) -> str:
    """`videos`, `video_path`, `imagePaths` -> `video`, `videopath`, `imagepath`."""
    return key.lower().replace("_", "").replace("-", "").removesuffix("s")


def _path_in(value: object) -> str | None:
    """A path, or that in {"path": ..., "bytes": null}, which the library `datasets` writes for a medium."""
    if isinstance(value, dict) and is_absent(value.get("bytes")):
        value = value.get("path")
    return value if isinstance(value, str) else None


def _paths_in(value: object) -> Iterator[str]:
    for entry in value if isinstance(value, list) else [value]:
        path = _path_in(entry)
        if path is not None and "\n" not in path:
            yield path


def _is_span(key: str, value: object) -> bool:
    return plain_key(key) in SPAN_KEYS and not is_absent(value)


def _keys_of(keys: Iterable[str]) -> str:
    shown = [_quoted(key) for key in keys if key not in ("id", "conversations")][:KEYS_SHOWN]
    return f"other keys: {', '.join(shown) or 'none'}"


def _quoted(key: str) -> str:
    return repr(key[:40])


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


SPEC = DatasetSpec(
    name="videollava",
    summary="Video-LLaVA's training data: stage 1 captions, stage 2 instructions; videos, images and text",
    default_root="data/videollava",
    download=DOWNLOAD,
    collect=collect,
    stages=tuple(ANNOTATIONS),
)

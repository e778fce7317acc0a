"""WebDataset: tar shards as video2dataset and img2dataset write them, {key}.mp4 beside {key}.txt and {key}.json.

Comes in: shards under the root (all of them, or a brace pattern), or addresses that are copied there first. Goes out:
clips "shards/00000.tar/000000001.mp4", read in place, and one caption sample of stage "align" for each that has a
caption. Headers of a shard are read once and no media at all. The webdataset library expands the patterns; its reader
is not used, because it goes through whole archives in sequence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featurestore.clips import Turn
from mervcache.errors import MediaError, UserError
from pipeline.datasets.base import DatasetSpec, ListingBuilder, Option, RecordError, check_text, parse_turns
from pipeline.datasets.spool import is_remote, spool_shards
from pipeline.media import LocalFile, kind_of_path, resolve_media
from pipeline.tar_index import tar_index

MAX_TEXT_BYTES = 1 << 20  # of one caption or JSON member
PROMPTS = {"video": "<video>\nDescribe the video.", "image": "<image>\nDescribe the image."}

DOWNLOAD = """\
Tar shards as video2dataset writes them (video2dataset --url_list=... --output_format=webdataset --output_folder=ROOT),
anywhere under the root; or name them: --option shards='https://HOST/{00000..00099}.tar' --option spool_gb=100"""


@dataclass
class _Member:
    """The files of one key in one shard."""

    media: list[str] = field(default_factory=list)  # names in the archive, in its order
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)  # "txt", "json" -> (offset, size)


def collect(builder: ListingBuilder, options: Mapping[str, Any]) -> None:
    """List every shard; one that cannot be read is refused and the others go on."""
    if builder.wants("align"):
        builder.declare_samples(f"{builder.name}-align")
    for shard in _shards(builder.root, options):
        try:
            _collect_shard(builder, shard, options)
        except MediaError as error:
            if str(error) == "media file is missing":
                builder.miss(shard.rpartition("/")[0] or ".")
            else:
                builder.reject(str(error), shard)


def _shards(root: Path, options: Mapping[str, Any]) -> list[str]:
    """Paths of the shards, relative to the root, remote ones copied there first."""
    pattern = options["shards"]
    if not pattern:
        found = sorted(
            os.path.relpath(os.path.join(folder, name), root)
            for folder, folders, files in os.walk(root)
            for name in files
            if name.endswith(".tar") and not name.startswith(".")
        )
        if not found:
            raise UserError(f"no *.tar under {root}\n{DOWNLOAD}")
        return found
    names = [name for part in ([pattern] if isinstance(pattern, str) else pattern) for name in _expand(str(part))]
    remote = [name for name in names if is_remote(name)]
    spooled = spool_shards(remote, root, _room(options["spool_gb"])) if remote else {}
    return list(dict.fromkeys(spooled.get(name, name) for name in names))


def _room(value: object) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"option spool_gb must be a number of GB, got {value!r}") from None


def _expand(pattern: str) -> list[str]:
    if "{" not in pattern and "::" not in pattern:
        return [pattern]
    from webdataset.shardlists import expand_urls  # seconds: it imports torch

    return expand_urls(pattern)


def _collect_shard(builder: ListingBuilder, shard: str, options: Mapping[str, Any]) -> None:
    media = resolve_media(builder.root, shard)
    if not isinstance(media, LocalFile):
        raise MediaError("shard is not a file")
    path = str(media.path)
    index = tar_index(path)
    for name, what in index.refused.items():
        builder.reject(f"tar member is {what}", f"{shard}/{name}")
    if index.is_damaged:
        builder.reject("tar archive is damaged, its end is not listed", shard)
    captions = _Captions(path, options)
    for key, member in _by_key(index.members).items():
        media = _chosen(member.media)
        if media is None:
            continue
        try:
            _add(builder, shard, key, media, captions, member)
        except RecordError as error:
            builder.reject(str(error), f"{shard}/{key}")


def _by_key(members: Mapping[str, tuple[int, int]]) -> dict[str, _Member]:
    """Members by key: as webdataset has it, the path up to the first dot of the file's name."""
    found: dict[str, _Member] = {}
    for name, place in members.items():
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        member = found.setdefault(folder + slash + stem, _Member())
        if kind_of_path(name):
            member.media.append(name)
        elif extension in ("txt", "json"):
            member.texts[extension] = place
    return found


def _chosen(media: list[str]) -> str | None:
    """A key's first video, else its first image (a thumbnail beside a video is not a clip)."""
    return min(media, key=lambda name: kind_of_path(name) != "video", default=None)


def _add(builder: ListingBuilder, shard: str, key: str, media: str, captions: _Captions, member: _Member) -> None:
    kind = kind_of_path(media)
    turns = captions.turns(key, kind, member) if builder.wants("align") else None
    clip_id = builder.add_clip(f"{shard}/{media}", kind)
    if turns:
        name = f"{shard.removesuffix('.tar')}/{key}"
        builder.add_sample(f"{builder.name}-align", name, clip_id, turns, stage="align", source="webdataset")


class _Captions:
    """What is said about the members of one shard: a conversation or caption in .json, else .txt, else the Parquet."""

    def __init__(self, tar_path: str, options: Mapping[str, Any]) -> None:
        self.tar_path = tar_path
        self.caption_key = str(options["caption_key"])
        self.prompt = options["prompt"]
        self._table: dict[str, str] | None = None

    def turns(self, key: str, kind: str, member: _Member) -> tuple[Turn, ...] | None:
        """Human and gpt turns, None where nothing is said."""
        record = self._json(member)
        if "conversations" in record:
            return parse_turns(record["conversations"])
        caption = record.get(self.caption_key)
        if caption is None and "txt" in member.texts:
            caption = self._text(member.texts["txt"])
        if caption is None:
            caption = self._from_table(key)
        if caption is None or not check_text(caption).strip():
            return None
        prompt = check_text(self.prompt) if self.prompt else PROMPTS[kind]
        return Turn(role="human", text=prompt), Turn(role="gpt", text=caption.strip())

    def _json(self, member: _Member) -> dict:
        if "json" not in member.texts:
            return {}
        try:
            record = json.loads(self._text(member.texts["json"]))
        except (ValueError, RecursionError):
            raise RecordError("json beside the media is broken") from None
        if not isinstance(record, dict):
            raise RecordError("json beside the media is not an object")
        return record

    def _text(self, place: tuple[int, int]) -> str:
        offset, size = place
        if size > MAX_TEXT_BYTES:
            raise RecordError(f"text beside the media is larger than {MAX_TEXT_BYTES >> 20} MiB")
        with open(self.tar_path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise RecordError("text beside the media is not UTF-8") from None

    def _from_table(self, key: str) -> str | None:
        """The caption in {shard}.parquet, which video2dataset writes beside every shard."""
        if self._table is None:
            self._table = dict(_read_captions(Path(self.tar_path).with_suffix(".parquet"), self.caption_key))
        return self._table.get(key)


def _read_captions(path: Path, caption_key: str) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        return
    import pyarrow as pa
    import pyarrow.parquet as pq  # half a second, only where a shard has a table

    try:
        names = pq.read_schema(path).names
        if "key" in names and caption_key in names:
            table = pq.read_table(path, columns=["key", caption_key])
            yield from zip(*(column.to_pylist() for column in table.columns), strict=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({str(error)[:200]}); remove it to go without its captions") from error


SPEC = DatasetSpec(
    name="webdataset",
    summary="tar shards as video2dataset writes them, read in place; captions become stage 1 samples",
    default_root="data/webdataset",
    download=DOWNLOAD,
    collect=collect,
    stages=("align",),
    lists_media=True,
    options={
        "shards": Option(
            default="", help="brace pattern(s) of shards, relative to the root or with a scheme; empty: all"
        ),
        "caption_key": Option(default="caption", help="key of the caption in the JSON and Parquet files"),
        "prompt": Option(
            default="", help="question that a caption answers; empty: 'Describe the video.' or '... image.'"
        ),
        "spool_gb": Option(default=0, help="GB under the root that copies of remote shards may fill; 0: none"),
    },
)

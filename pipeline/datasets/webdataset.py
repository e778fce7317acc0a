"""WebDataset: tar shards as video2dataset and img2dataset write them, {key}.mp4 beside {key}.txt and {key}.json.

Comes in: shards under the root (all of them, or a brace pattern), or addresses that are copied there first. Goes out:
clips "shards/00000.tar/000000001.mp4", read in place, and one caption sample of stage "align" for each that has a
caption. Headers of a shard are read once and no media at all. The webdataset library expands the patterns; its reader
is not used, because it goes through whole archives in sequence.

Spool: copies of remote tar shards under the dataset's root, made once.

Comes in: addresses with a scheme (https, s3, gs, ...). Goes out: address -> path under the root. Extraction reads clips
at offsets, many processes at once, so a shard must be local. The bytes that the folder may hold are stated by the user
and counted before anything is fetched; a copy that was interrupted goes on where it stopped, and only a whole copy has
the shard's name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from featurestore.clips import Turn
from mervcache.errors import MediaError, RunStoppedError, UserError
from pipeline.datasets.base import DatasetSpec, ListingBuilder, Option, RecordError, check_text, parse_turns
from pipeline.media import LocalFile, kind_of_path, resolve_media
from pipeline.tar_index import tar_index

FOLDER = "spool"
READ_BYTES = 1 << 22


def is_remote(name: str) -> bool:
    """True for an address with a scheme."""
    return "://" in name


@dataclass(frozen=True)
class _Shard:
    address: str
    copy: Path
    file_system: Any
    remote_path: str
    num_bytes: int


def spool_shards(addresses: Iterable[str], root: Path, limit_gb: float) -> dict[str, str]:
    """Copy the shards that are not there yet; address -> path relative to the root.

    Raises `UserError` if all copies together would take more than `limit_gb` (10^9 bytes), before the first is made.
    """
    addresses = list(addresses)
    if limit_gb <= 0:
        raise UserError(
            f"{addresses[0]} is remote: its shards are copied under {root / FOLDER} once; "
            "say how much room they may take with the option spool_gb=NUMBER"
        )
    names = {address: f"{FOLDER}/{_local_name(address)}" for address in addresses}
    absent = [_look_up(address, root / name) for address, name in names.items() if not (root / name).is_file()]
    present_bytes = sum((root / name).stat().st_size for name in names.values() if (root / name).is_file())
    total_bytes = present_bytes + sum(shard.num_bytes for shard in absent)
    if total_bytes > limit_gb * 1e9:
        raise UserError(
            f"the {len(names)} remote shards take {total_bytes / 1e9:.1f} GB, spool_gb allows {limit_gb:g}; "
            "raise it, or name fewer shards"
        )
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    for shard in absent:
        _copy(shard)
    return names


def _local_name(address: str) -> str:
    """`HASH-NAME.tar`: shards of two places may share a name; what follows a "?" may be a token that changes."""
    parts = urlsplit(address)
    place = f"{parts.scheme}://{parts.netloc}{parts.path}"
    name = parts.path.rpartition("/")[2]
    if not name.endswith(".tar") or name == ".tar" or any(ord(c) < 32 or c in "\\%" for c in name):
        raise UserError(f"a remote shard must be called NAME.tar, got {address}")
    return f"{hashlib.sha256(place.encode()).hexdigest()[:8]}-{name}"


def _look_up(address: str, copy: Path) -> _Shard:
    import fsspec  # with the scheme's own library, only where something is remote

    try:
        file_system, remote_path = fsspec.core.url_to_fs(address)
        num_bytes = file_system.info(remote_path)["size"]
    except FileNotFoundError as error:
        raise UserError(f"remote shard {address} does not exist") from error
    except ImportError as error:
        raise UserError(f"remote shard {address}: {error}; pip install 'merv-pipeline[remote]' has most") from error
    except ValueError as error:
        raise UserError(f"remote shard {address} cannot be reached: {error}") from error
    except Exception as error:  # every scheme's library has errors of its own; the address names the item
        raise RunStoppedError(f"remote shard {address} cannot be reached: {error}") from error
    if not isinstance(num_bytes, int):
        raise UserError(f"remote shard {address} does not tell its size; copy it under the root yourself")
    return _Shard(address, copy, file_system, remote_path, num_bytes)


def _copy(shard: _Shard) -> None:
    """Fetch what is lacking into NAME.part, then give it its name; never more than the size that was counted."""
    part = shard.copy.with_name(shard.copy.name + ".part")
    try:
        with open(part, "ab") as target, shard.file_system.open(shard.remote_path, "rb") as source:
            done = target.tell()
            if done > shard.num_bytes:  # the shard has become another since
                target.truncate(0)
                done = 0
            source.seek(done)
            while done < shard.num_bytes and (data := source.read(min(READ_BYTES, shard.num_bytes - done))):
                target.write(data)
                done += len(data)
            target.flush()
            os.fsync(target.fileno())
    except Exception as error:  # as above; what has arrived stays for the next run
        raise RunStoppedError(f"remote shard {shard.address} stopped after {_size(part)} bytes: {error}") from error
    if done < shard.num_bytes:
        raise RunStoppedError(f"remote shard {shard.address} ended after {done} of {shard.num_bytes} bytes; run again")
    os.replace(part, shard.copy)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


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

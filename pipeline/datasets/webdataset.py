"""WebDataset: tar shards as video2dataset and img2dataset write them, {key}.mp4 with {key}.txt and {key}.json.

Clips "shards/00000.tar/000000001.mp4" are read in place; captions become samples of stage "align". Listing reads the
headers of a shard once and no media. The webdataset library expands brace patterns; its reader is not used, because it
goes through whole archives in sequence. Remote shards are copied under the root once, because many processes read clips
at offsets.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from featurestore.clips import Turn
from mervcache.errors import MediaError, RunStoppedError, UserError
from mervcache.text import check_not_redacted
from pipeline.datasets.base import DatasetSpec, ListingBuilder, Option, RecordError, check_text, parse_turns
from pipeline.media import LocalFile, kind_of_path, resolve_media
from pipeline.tar_index import tar_index

SPOOL_FOLDER = "spool"  # copies of remote shards, under the root
READ_BYTES = 1 << 22
MAX_TEXT_BYTES = 1 << 20  # of one caption or JSON member
PROMPTS = {"video": "<video>\nDescribe the video.", "image": "<image>\nDescribe the image."}

DOWNLOAD = """\
Tar shards as video2dataset writes them (video2dataset --url_list=... --output_format=webdataset --output_folder=ROOT),
anywhere under the root; or name them: --option shards='https://HOST/{00000..00099}.tar' --option spool_gb=100"""


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
    patterns = options["shards"]
    if not patterns:
        shards = sorted(
            os.path.relpath(os.path.join(folder, name), root)
            for folder, folders, files in os.walk(root)
            for name in files
            if name.endswith(".tar") and not name.startswith(".")
        )
        if not shards:
            raise UserError(f"no *.tar under {root}\n{DOWNLOAD}")
        return shards
    names: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else map(str, patterns):
        if "{" in pattern or "::" in pattern:
            from webdataset.shardlists import expand_urls  # seconds: it imports torch

            names += expand_urls(pattern)
        else:
            names.append(pattern)
    copies: dict[str, str] = {}
    if remote := [name for name in names if "://" in name]:
        try:
            limit_gb = float(options["spool_gb"])
        except (TypeError, ValueError):
            raise UserError(f"option spool_gb must be a number of GB, got {options['spool_gb']!r}") from None
        copies = copy_remote_shards(remote, root, limit_gb)
    return list(dict.fromkeys(copies.get(name, name) for name in names))


def copy_remote_shards(addresses: Sequence[str], root: Path, limit_gb: float) -> dict[str, str]:
    """Copy the remote shards that are not there yet; address -> path relative to the root.

    Raises `UserError` if all copies together would take more than `limit_gb` (10^9 bytes), before the first is made.
    """
    if limit_gb <= 0:
        raise UserError(
            f"{addresses[0]} is remote: its shards are copied under {root / SPOOL_FOLDER} once; "
            "state how much space they may take with the option spool_gb=NUMBER"
        )
    names = {address: f"{SPOOL_FOLDER}/{copy_name(address)}" for address in addresses}
    present = {address for address, name in names.items() if (root / name).is_file()}
    absent = {address: _open_remote(address) for address in names if address not in present}
    total_bytes = sum((root / names[address]).stat().st_size for address in present)
    total_bytes += sum(num_bytes for _, _, num_bytes in absent.values())
    if total_bytes > limit_gb * 1e9:
        raise UserError(
            f"the {len(names)} remote shards take {total_bytes / 1e9:.1f} GB, spool_gb allows {limit_gb:g}; "
            "raise it, or name fewer shards"
        )
    (root / SPOOL_FOLDER).mkdir(parents=True, exist_ok=True)
    for address, (file_system, remote_path, num_bytes) in absent.items():
        copy = root / names[address]
        part = copy.with_name(copy.name + ".part")  # only a whole copy has the shard's name
        done = 0
        try:
            with open(part, "wb") as target, file_system.open(remote_path, "rb") as source:
                while done < num_bytes and (data := source.read(min(READ_BYTES, num_bytes - done))):
                    target.write(data)
                    done += len(data)
                target.flush()
                os.fsync(target.fileno())
        except Exception as error:  # every scheme's library has errors of its own
            raise RunStoppedError(f"remote shard {address} stopped after {done} bytes: {error}") from error
        if done < num_bytes:
            raise RunStoppedError(f"remote shard {address} ended after {done} of {num_bytes} bytes; run again")
        os.replace(part, copy)
    return names


def copy_name(address: str) -> str:
    """`HASH-NAME.tar`: shards in two locations may share a name; user, password and what follows a "?" may change."""
    parts = urlsplit(address)
    location = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # without user and password
    name = parts.path.rpartition("/")[2]
    if not name.endswith(".tar") or name == ".tar" or any(ord(c) < 32 or c in "\\%" for c in name):
        raise UserError(f"a remote shard must be called NAME.tar, got {address}")
    return f"{hashlib.sha256(location.encode()).hexdigest()[:8]}-{name}"


def _open_remote(address: str) -> tuple[Any, str, int]:
    """(fsspec file system, path in it, size in bytes) of a remote shard."""
    import fsspec  # with the scheme's own library, only where something is remote

    check_not_redacted(address, "give the option shards again, as for the extraction")
    try:
        file_system, remote_path = fsspec.core.url_to_fs(address)
        num_bytes = file_system.info(remote_path)["size"]
    except FileNotFoundError as error:
        raise UserError(f"remote shard {address} does not exist") from error
    except ImportError as error:
        raise UserError(f"remote shard {address}: {error}; pip install 'merv-pipeline[remote]' has most") from error
    except ValueError as error:
        raise UserError(f"remote shard {address} cannot be reached: {error}") from error
    except Exception as error:  # every scheme's library has errors of its own
        raise RunStoppedError(f"remote shard {address} cannot be reached: {error}") from error
    if not isinstance(num_bytes, int):
        raise UserError(f"remote shard {address} does not report its size; copy it under the root yourself")
    return file_system, remote_path, num_bytes


@dataclass
class _Member:
    """The files of one key in one shard."""

    media: list[str] = field(default_factory=list)  # names in the archive, in its order
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)  # "txt", "json" -> (offset, size)


def _collect_shard(builder: ListingBuilder, shard: str, options: Mapping[str, Any]) -> None:
    file = resolve_media(builder.root, shard)
    if not isinstance(file, LocalFile):
        raise MediaError("shard is not a file")
    index = tar_index(str(file.path))
    for name, what in index.refused.items():
        builder.reject(f"tar member is {what}", f"{shard}/{name}")
    if index.is_damaged:
        builder.reject("tar archive is damaged, its end is not listed", shard)
    members: dict[str, _Member] = {}  # by key: as webdataset has it, the path up to the first dot of the file's name
    for name, place in index.members.items():
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        member = members.setdefault(folder + slash + stem, _Member())
        if kind_of_path(name):
            member.media.append(name)
        elif extension in ("txt", "json"):
            member.texts[extension] = place
    captions = _Captions(file.path, options)
    for key, member in members.items():
        # a key's first video, else its first image: a thumbnail of a video is not a clip
        media = min(member.media, key=lambda name: kind_of_path(name) != "video", default=None)
        if media is None:
            continue
        kind = kind_of_path(media)
        try:
            turns = captions.turns(key, kind, member) if builder.wants("align") else None
            clip_id = builder.add_clip(f"{shard}/{media}", kind)
            if turns:
                record_id = f"{shard.removesuffix('.tar')}/{key}"
                builder.add_sample(
                    f"{builder.name}-align", record_id, clip_id, turns, stage="align", source="webdataset"
                )
        except RecordError as error:
            builder.reject(str(error), f"{shard}/{key}")


class _Captions:
    """Conversations and captions of one shard: from a member's .json, else its .txt, else the shard's Parquet file."""

    def __init__(self, tar_path: Path, options: Mapping[str, Any]) -> None:
        self.tar_path = tar_path
        self.caption_key = str(options["caption_key"])
        self.prompt = options["prompt"]

    def turns(self, key: str, kind: str, member: _Member) -> tuple[Turn, ...] | None:
        """Human and gpt turns, None where there is no caption."""
        record: dict[str, Any] = {}
        if "json" in member.texts:
            try:
                record = json.loads(self._text(member.texts["json"]))
            except (ValueError, RecursionError):
                raise RecordError("json of the media is broken") from None
            if not isinstance(record, dict):
                raise RecordError("json of the media is not an object")
        if "conversations" in record:
            return parse_turns(record["conversations"])
        caption = record.get(self.caption_key)
        if caption is None and "txt" in member.texts:
            caption = self._text(member.texts["txt"])
        if caption is None:
            caption = self._table.get(key)
        if caption is None or not check_text(caption).strip():
            return None
        prompt = check_text(self.prompt) if self.prompt else PROMPTS[kind]
        return Turn(role="human", text=prompt), Turn(role="gpt", text=caption.strip())

    def _text(self, place: tuple[int, int]) -> str:
        offset, size = place
        if size > MAX_TEXT_BYTES:
            raise RecordError(f"text of the media is larger than {MAX_TEXT_BYTES >> 20} MiB")
        with open(self.tar_path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise RecordError("text of the media is not UTF-8") from None

    @cached_property
    def _table(self) -> dict[str, str]:
        """Captions by key in {shard}.parquet, which video2dataset writes for every shard."""
        path = self.tar_path.with_suffix(".parquet")
        if not path.is_file():
            return {}
        import pyarrow as pa
        import pyarrow.parquet as pq  # half a second, only where a shard has a table

        try:
            names = pq.read_schema(path).names
            if "key" not in names or self.caption_key not in names:
                return {}
            table = pq.read_table(path, columns=["key", self.caption_key])
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path} cannot be read ({str(error)[:200]}); remove it to go without its captions"
            ) from error
        return dict(zip(*(column.to_pylist() for column in table.columns), strict=True))


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

"""WebDataset: tar shards as video2dataset and img2dataset write them, {key}.mp4 with {key}.txt and {key}.json.

Clips "shards/00000.tar/000000001.mp4" are read in place; captions become samples of stage "align". A key is a member's
path up to the first dot of its name, as in the webdataset library; every video of a key is a clip, or every image where
it has no video, and a caption goes to the medium of its own name, else to the key's first. Listing reads the headers of
a shard once and no media. The webdataset library expands brace patterns; its reader is not used, because it
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

from featurestore.clips import KINDS, Turn
from mervcache.errors import MediaError, RunStoppedError, UserError
from mervcache.text import check_not_redacted
from pipeline.datasets.base import (
    DatasetSpec,
    ListingBuilder,
    Option,
    RecordError,
    check_text,
    is_absent,
    parse_turns,
)
from pipeline.datasets.walk import check_link, ending, walk_files
from pipeline.media import MISSING_REASON, LocalFile, kind_of_path, resolve_media
from pipeline.tar_index import TarIndex, tar_index

SPOOL_FOLDER = "spool"  # copies of remote shards, under the root
READ_BYTES = 1 << 22
MAX_TEXT_BYTES = 1 << 20  # of one caption or JSON member
COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
PROMPTS = {"video": "<video>\nDescribe the video.", "image": "<image>\nDescribe the image."}

DOWNLOAD = """\
Tar shards as video2dataset writes them (video2dataset --url_list=... --output_format=webdataset --output_folder=ROOT),
anywhere under the root; or name them: --option shards='https://HOST/{00000..00099}.tar' --option spool_gb=100"""


def collect(builder: ListingBuilder, options: Mapping[str, Any]) -> None:
    """List every shard; one that cannot be read is refused and the others go on."""
    if builder.wants("align"):
        builder.declare_samples(f"{builder.name}-align")
    for shard in _shards(builder, options):
        try:
            _collect_shard(builder, shard, options)
        except MediaError as error:
            if str(error) == MISSING_REASON:
                builder.miss(shard)
            else:
                builder.reject(str(error), shard)


def _shards(builder: ListingBuilder, options: Mapping[str, Any]) -> list[str]:
    """Paths of the shards, relative to the root, remote ones copied there first."""
    patterns = options["shards"]
    if not patterns:
        shards = []
        for path in walk_files(builder):
            name = path.lower()
            if name.endswith(".tar"):
                shards.append(path)
            elif name.endswith(COMPRESSED):
                builder.reject("tar shard is compressed, and members of a compressed tar cannot be read in place", path)
            elif kind_of_path(path):
                builder.skip("media files outside of tar shards")
        if not shards and not builder.has_rejected:
            raise UserError(f"no *.tar under {builder.root}\n{DOWNLOAD}")
        return sorted(path for path in shards if check_link(builder, path))
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
        copies = copy_remote_shards(remote, builder.root, limit_gb)
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
class _Sample:
    """The files of one key in one shard, in the order of the archive."""

    media: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})  # names by kind
    texts: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)  # stem -> "txt", "json" -> offset, size

    def owners(self, key: str, media: Sequence[str]) -> dict[str, str]:
        """Stem of a caption -> the medium that it is about."""
        owners: dict[str, str] = {}
        for name in media:
            if _stem(name) in self.texts:
                owners.setdefault(_stem(name), name)
        if key in self.texts and key not in owners:
            first = next((name for name in media if name not in owners.values()), None)
            if first is not None:
                owners[key] = first
        return owners


def _stem(name: str) -> str:
    """A member's name without its last extension."""
    return name.rpartition(".")[0]


def _collect_shard(builder: ListingBuilder, shard: str, options: Mapping[str, Any]) -> None:
    file = resolve_media(builder.media_root, shard)
    if not isinstance(file, LocalFile):
        raise MediaError("shard is not a file")
    index = tar_index(str(file.path))
    for name, what in index.refused.items():
        builder.reject(f"tar member is {what}", f"{shard}/{name}")
    if index.num_unusable:
        examples = ", ".join(index.unusable)
        builder.reject("tar member has a name that no clip can have", f"{shard}: {examples}", index.num_unusable)
    if index.num_replaced:
        builder.skip("tar members that a later one of the same name replaces", index.num_replaced)
    if index.is_damaged:
        builder.reject("tar archive is damaged, its end is not listed", shard)
    samples = _samples(builder, index)
    captions = _Captions(file.path, _table_path(builder, shard), options)
    for key, sample in samples.items():
        # an image of a video's key is its thumbnail
        kind = next((kind for kind in KINDS if sample.media[kind]), None)
        if kind is None:
            builder.skip("captions without a video or image", len(sample.texts))
            continue
        media = sample.media[kind]
        if kind == "video" and sample.media["image"]:
            builder.skip("images beside a video of the same key", len(sample.media["image"]))
        owners = sample.owners(key, media)
        if lone := [stem for stem in sample.texts if stem not in owners]:
            builder.skip("captions without a video or image", len(lone))
        texts = {name: sample.texts[stem] for stem, name in owners.items()}
        for number, name in enumerate(media):
            names = [_stem(name), key] if number == 0 else [_stem(name)]
            record_id = f"{shard[: -len('.tar')]}/{key if len(media) == 1 else _stem(name)}"
            try:
                turns = captions.turns(names, kind, texts.get(name, {})) if builder.wants("align") else None
                clip_id = builder.add_clip(f"{shard}/{name}", kind)
                if turns:
                    builder.add_sample(
                        f"{builder.name}-align", record_id, clip_id, turns, stage="align", source="webdataset"
                    )
                elif number and texts and builder.wants("align"):
                    builder.skip("further media of a key, listed without its caption")
            except RecordError as error:
                builder.reject(str(error), f"{shard}/{key if len(media) == 1 else name}")


def _samples(builder: ListingBuilder, index: TarIndex) -> dict[str, _Sample]:
    """The media and captions of a shard by key; its other members are counted."""
    samples: dict[str, _Sample] = {}
    for name, place in index.members.items():
        folder, slash, base = name.rpartition("/")
        if base.startswith("."):
            builder.skip("hidden tar members")
            continue
        key, extension = folder + slash + base.partition(".")[0], ending(base)
        if kind := kind_of_path(name):
            samples.setdefault(key, _Sample()).media[kind].append(name)
        elif extension in (".txt", ".json"):
            samples.setdefault(key, _Sample()).texts.setdefault(_stem(name), {})[extension[1:]] = place
        else:
            builder.skip(f"tar members that end in {extension}")
    return samples


def _table_path(builder: ListingBuilder, shard: str) -> Path | None:
    """The Parquet file that video2dataset writes next to a shard, by its name under the root."""
    try:
        table = resolve_media(builder.media_root, f"{shard[: -len('.tar')]}.parquet")
    except MediaError as error:
        if str(error) != MISSING_REASON:
            builder.reject(f"captions of a shard cannot be read: {error}", f"{shard[: -len('.tar')]}.parquet")
        return None
    return table.path if isinstance(table, LocalFile) else None


class _Captions:
    """Conversations and captions of one shard: from a member's .json, else its .txt, else the shard's Parquet file."""

    def __init__(self, tar_path: Path, table_path: Path | None, options: Mapping[str, Any]) -> None:
        self.tar_path, self.table_path = tar_path, table_path
        self.caption_key = str(options["caption_key"])
        self.prompt = options["prompt"]

    def turns(self, names: Sequence[str], kind: str, texts: Mapping[str, tuple[int, int]]) -> tuple[Turn, ...] | None:
        """Human and gpt turns, None where there is no caption; `names` are keys of the table, the first one counts."""
        record: dict[str, Any] = {}
        if "json" in texts:
            try:
                record = json.loads(self._text(texts["json"]))
            except (ValueError, RecursionError):
                raise RecordError("json of the media is broken") from None
            if not isinstance(record, dict):
                raise RecordError("json of the media is not an object")
        if "conversations" in record:
            return parse_turns(record["conversations"])
        caption = record.get(self.caption_key)
        if is_absent(caption) and "txt" in texts:
            caption = self._text(texts["txt"])
        if is_absent(caption):
            caption = next((self._table[name] for name in names if name in self._table), None)
        if is_absent(caption) or not check_text(caption).strip():
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
        if self.table_path is None:
            return {}
        import pyarrow as pa
        import pyarrow.parquet as pq  # half a second, only where a shard has a table

        try:
            names = pq.read_schema(self.table_path).names
            if "key" not in names or self.caption_key not in names:
                return {}
            table = pq.read_table(self.table_path, columns=["key", self.caption_key])
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.table_path} cannot be read ({str(error)[:200]}); remove it to go without its captions"
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

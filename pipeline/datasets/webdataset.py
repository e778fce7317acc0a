"""WebDataset: tar shards as video2dataset and img2dataset write them, {key}.mp4 with {key}.txt and {key}.json.

Clips "shards/00000.tar/000000001.mp4" are read in place; captions become samples of stage "align". A key is a member's
path up to the first dot of its name, as in the webdataset library; every video of a key is a clip, or every image where
it has no video, and a caption goes to the medium of its own name, else to the key's first. Listing reads the headers of
a shard once and no media. The webdataset library expands brace patterns; its reader is not used, because it
goes through whole archives in sequence. Shards in buckets and behind web servers are read by ranges
(`remote_shards.py`), and their clips have the ids that the same shards in a folder give.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from featurestore.clips import KINDS, Kind, Turn
from featurestore.locate import is_url
from mervcache.console import plural
from mervcache.errors import MediaError, UserError
from mervcache.text import HIDDEN, check_not_redacted, redact
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
from pipeline.remote_shards import (
    DEFAULT_SPOOL_GB,
    MAX_TEXT_BYTES,
    RemoteRoot,
    RemoteShard,
    ShardState,
    list_shards,
    remote_root,
    split_member,
)
from pipeline.tar_index import TarIndex, tar_index

log = logging.getLogger(__name__)

PARALLEL_SHARDS = 32  # indexed at once: each is a chain of requests that wait for their answers
COMPRESSED_REASON = "tar shard is compressed, and members of a compressed tar cannot be read in place"
COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
PROMPTS = {"video": "<video>\nDescribe the video.", "image": "<image>\nDescribe the image."}

DOWNLOAD = """\
Tar shards as video2dataset writes them (video2dataset --url_list=... --output_format=webdataset --output_folder=ROOT),
anywhere under the root, a folder or a URL such as s3://BUCKET/FOLDER; or name them:
--option shards='https://HOST/{00000..00099}.tar'
By URL, listing sends about one request per video, and with --fps it fetches every video whole."""


def collect(builder: ListingBuilder, options: Mapping[str, Any]) -> None:
    """List every shard; one that cannot be read is refused and the others go on."""
    if builder.wants("align"):
        builder.declare_samples(f"{builder.name}-align")
    shards = _local_shards(builder, options) if builder.remote is None else _remote_shards(builder, options)
    for name, opened in shards:
        try:
            _collect_shard(builder, name, opened(), options)
        except MediaError as error:
            if str(error) == MISSING_REASON:
                builder.miss(name)
            else:
                builder.reject(str(error), name)


def remote_root_of(root: str | None, options: Mapping[str, Any]) -> RemoteRoot | None:
    """The URL below which the shards are: the root if it is one, else the bucket or host that the shards name."""
    names_places = any("://" in pattern for pattern in _patterns(options))
    if root is not None and is_url(root) and not (HIDDEN in root and names_places):  # a journal's, without its secrets
        return remote_root(root, options)
    places = {_bucket(pattern) for pattern in _patterns(options) if "://" in pattern}
    if not places:
        return None
    if len(places) > 1 or not all("://" in pattern for pattern in _patterns(options)):
        raise UserError(
            "the shards of one run are in one folder, bucket or host: list each of "
            f"{', '.join(sorted(map(redact, places)))} in a run of its own, into the same --store"
        )
    return remote_root(places.pop(), options)


def _bucket(pattern: str) -> str:
    """`s3://BUCKET`, `https://HOST` or `hf://datasets/USER/REPO` of an address, with what follows its "?"."""
    parts = urlsplit(pattern)
    folders = parts.path.split("/")[:3] if parts.scheme == "hf" else []
    return urlunsplit((parts.scheme, parts.netloc, "/".join(folders), parts.query, ""))


def _patterns(options: Mapping[str, Any]) -> list[str]:
    given = options["shards"]
    return [given] if isinstance(given, str) and given else [*map(str, given)]


def _expanded(options: Mapping[str, Any]) -> list[str]:
    """The names that the option shards gives, without braces."""
    names: list[str] = []
    for pattern in _patterns(options):
        if "{" in pattern or "::" in pattern:
            from webdataset.shardlists import expand_urls  # seconds: it imports torch

            names += expand_urls(pattern)
        else:
            names.append(pattern)
    return list(dict.fromkeys(names))


def _local_shards(
    builder: ListingBuilder, options: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[], _OpenShard]]]:
    """Path under the root of each shard, and how to open it."""
    names = _expanded(options)
    if not names:
        for path in walk_files(builder):
            name = path.lower()
            if name.endswith(".tar"):
                names.append(path)
            elif name.endswith(COMPRESSED):
                builder.reject(COMPRESSED_REASON, path)
            elif kind_of_path(path):
                builder.skip("media files outside of tar shards")
        if not names and not builder.has_rejected:
            raise UserError(f"no *.tar under {builder.root}\n{DOWNLOAD}")
        names = sorted(path for path in names if check_link(builder, path))
    for name in names:
        yield name, partial(_open_local, builder, name)


def _open_local(builder: ListingBuilder, shard: str) -> _OpenShard:
    file = resolve_media(builder.media_root, shard)
    if not isinstance(file, LocalFile):
        raise MediaError("shard is not a file")
    index = tar_index(str(file.path))

    def text(name: str) -> bytes:
        offset, size = index.members[name]
        with open(file.path, "rb", buffering=0) as archive:
            return os.pread(archive.fileno(), size, offset)

    return _OpenShard(index, text, lambda: _table_path(builder, shard))


def _remote_shards(
    builder: ListingBuilder, options: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[], _OpenShard]]]:
    """Key below the root of each shard, and how to open it; indexes that the cache lacks are made in parallel."""
    root = builder.remote
    assert root is not None, "only called for a remote root"
    if _patterns(options):
        names = [_key_of(root, name) for name in _expanded(options)]
        known: dict[str, ShardState] = {}
    else:
        known, others = list_shards(root)
        for key in others:
            if key.lower().endswith(COMPRESSED):
                builder.reject(COMPRESSED_REASON, key)
            elif kind_of_path(key):
                builder.skip("media files outside of tar shards")
        names = sorted(known)
        if not names and not builder.has_rejected:
            raise UserError(f"no *.tar below {redact(root.url)}\n{DOWNLOAD}")
    usable = [name for name in names if split_member(name) == (name, "")]
    for name in sorted({*names} - {*usable}):
        builder.reject("shard is not called NAME.tar, or is below a folder that is", name)
    log.info("reading the indexes of %s below %s", plural(len(usable), "shard"), redact(root.url))
    opened = {name: _RemoteListing(RemoteShard(root, name), known.get(name)) for name in usable}
    pool = ThreadPoolExecutor(PARALLEL_SHARDS)
    try:
        for listing in opened.values():
            listing.loaded = pool.submit(listing.load, with_texts=builder.wants("align"))
        for name, listing in opened.items():
            yield name, partial(_open_remote, listing, root)
    finally:
        pool.shutdown(cancel_futures=True)
    versions = {name: listing.version for name, listing in opened.items() if listing.version}
    builder.remote = replace(root, versions=versions)


def _key_of(root: RemoteRoot, name: str) -> str:
    """A shard's key below the root, of a key or an address."""
    if "://" not in name:
        return name
    check_not_redacted(name, "give the option shards again, as for the extraction")
    wanted, parts = urlsplit(root.url), urlsplit(name)
    folder = f"{wanted.path.rstrip('/')}/"
    same = (parts.scheme, parts.netloc, parts.query) == (wanted.scheme, wanted.netloc, wanted.query)
    if not same or not parts.path.startswith(folder):
        raise UserError(f"shard {redact(name)} is not below {redact(root.url)}: leave --root out, or name its folder")
    return parts.path.removeprefix(folder)


@dataclass
class _RemoteListing:
    """One remote shard while the dataset is listed."""

    shard: RemoteShard
    state: ShardState | None
    version: str = ""  # of its index
    loaded: Future[None] | None = None

    def load(self, *, with_texts: bool) -> None:
        """Have index and captions in the host's cache."""
        self.state = self.state or self.shard.state()
        index = self.shard.index(self.state)
        self.version = index.version
        if with_texts:
            self.shard.texts(index)


def _open_remote(listing: _RemoteListing, root: RemoteRoot) -> _OpenShard:
    shard = listing.shard
    try:
        assert listing.loaded is not None, "submitted when the shards were named"
        listing.loaded.result()
    except FileNotFoundError as error:
        raise MediaError(MISSING_REASON) from error
    index = shard.index(listing.state)
    for name, (_, size) in index.members.items():
        if size > root.spool_bytes and kind_of_path(name):
            raise UserError(
                f"{shard.url}/{name} has {size / 1e9:.1f} GB, spool_gb allows {root.spool_bytes / 1e9:g}: raise it"
            )
    texts = cache(lambda: shard.texts(index))
    return _OpenShard(index, lambda name: texts()[name], shard.table)


@dataclass(frozen=True)
class _OpenShard:
    """A shard with what its captions are read from."""

    index: TarIndex
    text: Callable[[str], bytes]  # of a caption or JSON member, by name
    table: Callable[[], Path | bytes | None]  # the Parquet file beside it


@dataclass
class _Sample:
    """The files of one key in one shard, in the order of the archive."""

    media: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})  # names by kind
    texts: dict[str, dict[str, str]] = field(default_factory=dict)  # stem -> "txt" or "json" -> name

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


def _collect_shard(builder: ListingBuilder, shard: str, opened: _OpenShard, options: Mapping[str, Any]) -> None:
    index = opened.index
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
    captions = _Captions(opened, options)
    for key, sample in samples.items():
        # an image of a video's key is its thumbnail
        kind: Kind | None = next((kind for kind in KINDS if sample.media[kind]), None)
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
    for name in index.members:
        folder, slash, base = name.rpartition("/")
        if base.startswith("."):
            builder.skip("hidden tar members")
            continue
        key, extension = folder + slash + base.partition(".")[0], ending(base)
        if kind := kind_of_path(name):
            samples.setdefault(key, _Sample()).media[kind].append(name)
        elif extension in (".txt", ".json"):
            samples.setdefault(key, _Sample()).texts.setdefault(_stem(name), {})[extension[1:]] = name
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

    def __init__(self, shard: _OpenShard, options: Mapping[str, Any]) -> None:
        self.shard = shard
        self.caption_key = str(options["caption_key"])
        self.prompt = options["prompt"]

    def turns(self, names: Sequence[str], kind: str, texts: Mapping[str, str]) -> tuple[Turn, ...] | None:
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
        if is_absent(caption) or not (text := check_text(caption).strip()):
            return None
        prompt = check_text(self.prompt) if self.prompt else PROMPTS[kind]
        return Turn(role="human", text=prompt), Turn(role="gpt", text=text)

    def _text(self, name: str) -> str:
        if self.shard.index.members[name][1] > MAX_TEXT_BYTES:
            raise RecordError(f"text of the media is larger than {MAX_TEXT_BYTES >> 20} MiB")
        try:
            return self.shard.text(name).decode()
        except UnicodeDecodeError:
            raise RecordError("text of the media is not UTF-8") from None

    @cached_property
    def _table(self) -> dict[str, str]:
        """Captions by key in {shard}.parquet, which video2dataset writes for every shard."""
        given = self.shard.table()
        if given is None:
            return {}
        import pyarrow as pa
        import pyarrow.parquet as pq  # half a second, only where a shard has a table

        source = pa.BufferReader(given) if isinstance(given, bytes) else given
        try:
            names = pq.read_schema(source).names
            if "key" not in names or self.caption_key not in names:
                return {}
            table = pq.read_table(source, columns=["key", self.caption_key])
        except (pa.ArrowException, OSError) as error:
            place = "the Parquet file of a shard" if isinstance(given, bytes) else given
            raise UserError(
                f"{place} cannot be read ({str(error)[:200]}); remove it to go without its captions"
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
    remote_root=remote_root_of,
    options={
        "shards": Option(
            default="",
            help="brace pattern(s) of shards, relative to the root or whole URLs, which need no root; empty: all",
        ),
        "caption_key": Option(default="caption", help="key of the caption in the JSON and Parquet files"),
        "prompt": Option(
            default="", help="question that a caption answers; empty: 'Describe the video.' or '... image.'"
        ),
        "spool_gb": Option(
            default=DEFAULT_SPOOL_GB,
            help="GB of a host's disk that copies of remote media may fill; the least recently used are evicted",
        ),
        "spool_dir": Option(
            default="", help="absolute folder of these copies on every host; empty: spool in MERV_CACHE_DIR"
        ),
    },
)

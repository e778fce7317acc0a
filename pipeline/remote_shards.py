"""Tar shards in a bucket, behind a web server or on the Hub, read by ranges through obstore.

A shard is indexed once per host and version: from NAME.idx beside it (as DALI's wds2idx writes it) or by walking its
headers with ranged reads. Index and captions are kept under MERV_CACHE_DIR, and a member is one ranged read into the
spool. Every read is checked against the version that was indexed, and a member against its own header, so that a shard
that was replaced gives an error and never other bytes.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

from featurestore.locate import is_url
from featurestore.objects.base import service_faults
from featurestore.objects.cache import cache_folder
from featurestore.objects.open import open_objects
from mervcache.errors import MediaError, MervCacheError, RunStoppedError, UserError
from mervcache.files import record_digest, sha256_hex
from mervcache.text import check_not_redacted
from pipeline.spool import Spool
from pipeline.tar_index import BLOCK_BYTES, MAX_MEMBERS, TarIndex, clip_name, is_header_of, read_index

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult
    from obstore.store import ObjectStore

DEFAULT_SPOOL_GB = 10
CHANGED_REASON = "tar shard changed after it was listed"
TEXTS = (".json", ".txt")  # members whose text is kept with the index
MAX_TEXT_BYTES = 1 << 20  # of one caption or JSON member
MAX_SIDECAR_BYTES = 256 << 20
MAX_GAP_BYTES = 8 * BLOCK_BYTES  # between two members of an index file
SIDECAR_VERSION = "v1.2"  # the first that holds names
STREAM_BYTES = 4 << 20
WINDOW_BYTES = 32 << 10  # of one ranged read of headers: a header, the captions around it and the next headers
NEAR_BYTES = 256 << 10  # a gap that costs less time to read through than another request
MAX_WINDOW_BYTES = 1 << 20
CACHED_INDEXES = 32  # in a process
_FORMAT = 1  # of the cached files


@dataclass(frozen=True)
class RemoteRoot:
    """Where a dataset's shards are, and the copies of their members that a host may keep."""

    url: str  # of a bucket or host, with or without a folder
    spool: str = ""  # absolute folder on every host; "": under MERV_CACHE_DIR
    spool_bytes: int = DEFAULT_SPOOL_GB * 10**9
    versions: Mapping[str, str] = field(default_factory=dict)  # shard -> its version, as far as it was listed

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class ShardIndex(TarIndex):
    """The index of one version of a remote shard."""

    version: str = ""  # the ETag, or size and date where a server gives none
    num_bytes: int = 0
    modified_s: float = 0.0  # Unix time of the last put, by the server's clock


@dataclass(frozen=True)
class ShardState:
    """What a server says about a shard now."""

    version: str
    num_bytes: int
    modified_s: float


def remote_root(root: object, options: Mapping[str, Any] | None = None) -> RemoteRoot | None:
    """The root, if it is a URL or a `RemoteRoot`, else None; `options` are those of the dataset webdataset."""
    if isinstance(root, RemoteRoot):
        return root
    if not isinstance(root, str) or not is_url(root):
        return None
    options = options or {}
    given = options.get("spool_gb", DEFAULT_SPOOL_GB)
    try:
        spool_bytes = int(float(given) * 1e9)
    except (TypeError, ValueError, OverflowError):
        spool_bytes = 0
    if spool_bytes < 1:
        raise UserError(f"option spool_gb must be a positive number of GB, got {given!r}")
    spool = str(options.get("spool_dir") or "")
    if spool and not os.path.isabs(spool):
        raise UserError(f"option spool_dir must be an absolute folder, the same on every host, got {spool!r}")
    return RemoteRoot(root.rstrip("/"), spool, spool_bytes)


def narrowed(root: Any, paths: Iterable[str]) -> Any:
    """The root; a remote one with the versions of these clips' shards alone, because it travels with every task."""
    if not isinstance(root, RemoteRoot):
        return root
    keys = {split_member(path)[0] for path in paths}
    return replace(root, versions={key: root.versions[key] for key in sorted(keys) if key in root.versions})


def split_member(path: str) -> tuple[str, str]:
    """("shards/0.tar", "a.mp4") of a clip's path below a URL; the second is "" where no part ends in .tar."""
    parts = path.split("/")
    for count, part in enumerate(parts, start=1):
        if part.lower().endswith(".tar"):
            return "/".join(parts[:count]), "/".join(parts[count:])
    return path, ""


def address_of(url: str, key: str) -> str:
    """The address of a shard without credentials: what its copies in caches are known by."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/{key}"


class RemoteShard:
    """One shard, by its key below the root."""

    def __init__(self, root: RemoteRoot, key: str) -> None:
        self.root, self.key, self.url = root, key, address_of(root.url, key)

    @cached_property
    def _store(self) -> ObjectStore:
        return connection(self.root.url)

    def state(self) -> ShardState:
        """One request; FileNotFoundError if there is no such shard."""
        return _state_of(self._get(self.key, head=True).meta)

    def index(self, state: ShardState | None = None) -> ShardIndex:
        """The index of the version that was listed, else of the one there is now; from the host's cache, or made anew.

        `state` saves the request that asks for the version. Raises FileNotFoundError where there is no shard and
        `MediaError` for another version and for what is no plain tar.
        """
        file = self.cache_file("index")
        version = state.version if state else self.root.versions.get(self.key) or _version_now(self.root.url, self.key)
        if (found := _load_index(file, self.url)) is not None and found.version == version:
            return found
        with _locked(file.with_suffix(".lock")):  # the other processes of the host wait instead of reading the same
            if (found := _load_index(file, self.url)) is None or found.version != version:
                state = state or self.state()
                if state.version != version:
                    raise MediaError(CHANGED_REASON)
                self._make_index(state)
                found = _load_index(file, self.url)
        if found is None or found.version != version:
            raise RunStoppedError(f"{file} was changed while it was written; run the same command again")
        return found

    def texts(self, index: ShardIndex) -> Mapping[str, bytes]:
        """Contents of the captions and JSON members of a version, by name; those over `MAX_TEXT_BYTES` are absent."""
        file = self.cache_file("texts")
        found = _read_cached(file, self.url)
        if found is None or found["version"] != index.version:
            reader = _ReadAhead(self, ShardState(index.version, index.num_bytes, index.modified_s))
            places = sorted(
                (offset, size, name) for name, (offset, size) in index.members.items() if _is_text(name, size)
            )
            self._save_texts(index.version, {name: reader.read_at(size, offset) for offset, size, name in places})
            found = _read_cached(file, self.url)
        return {name: text.encode("latin-1") for name, text in (found or {"texts": {}})["texts"].items()}

    def fetch(self, offset: int, size: int, version: str, file: BinaryIO) -> None:
        """Write a member into a file, with one request; `MediaError` where the shard is not the one of the index."""
        start, written, head = offset - BLOCK_BYTES, -BLOCK_BYTES, b""
        answer = self._checked(self._get(self.key, range=(start, offset + size)), version)
        with self._faults():
            for chunk in answer.stream(min_chunk_size=STREAM_BYTES):
                data = memoryview(chunk)
                written += len(data)
                if len(head) < BLOCK_BYTES:
                    missing = BLOCK_BYTES - len(head)
                    head, data = head + bytes(data[:missing]), data[missing:]
                file.write(data)
        if written != size:
            raise RunStoppedError(f"{self.url} answered {written} of {size} bytes; run the same command again")
        if not is_header_of(head, size):
            raise MediaError("tar shard's index is wrong: there is no such member where it says")

    def table(self) -> bytes | None:
        """The Parquet file that video2dataset writes beside a shard, if there is one."""
        return self._sidecar(".parquet")

    def _make_index(self, state: ShardState) -> None:
        reader = _ReadAhead(self, state)
        texts: dict[str, bytes] | None = None
        index = self._index_of_sidecar(reader, state.num_bytes)
        if index is None:
            texts = {}

            def keep_text(name: str, offset: int, size: int) -> None:
                if _is_text(name, size):
                    texts[name] = reader.read_at(size, offset)

            index = read_index(reader.read_at, state.num_bytes, keep_text)
        record = {name: getattr(index, name) for name in TarIndex.__dataclass_fields__}
        record |= {"version": state.version, "num_bytes": state.num_bytes, "modified_s": state.modified_s}
        if texts is not None:  # else read when somebody wants them
            self._save_texts(state.version, texts)
        _write_cached(self.cache_file("index"), self.url, record)

    def _save_texts(self, version: str, texts: Mapping[str, bytes]) -> None:
        content = {name: text.decode("latin-1") for name, text in texts.items()}
        _write_cached(self.cache_file("texts"), self.url, {"version": version, "texts": content})

    def _index_of_sidecar(self, reader: _ReadAhead, num_bytes: int) -> TarIndex | None:
        """The index in NAME.idx, if it fits the shard: its last member has a header, and no other one follows."""
        members = parse_sidecar(self._sidecar(".idx") or b"", num_bytes)
        if not members:
            return None
        offset, size = max(place for _, place in members)
        end = offset + -(-size // BLOCK_BYTES) * BLOCK_BYTES
        fits = is_header_of(reader.read_at(BLOCK_BYTES, offset - BLOCK_BYTES), size)
        if not fits or reader.read_at(BLOCK_BYTES, end).strip(b"\0"):
            return None
        named: dict[str, tuple[int, int]] = {}
        unusable = [name for name, _ in members if clip_name(name) is None]
        for name, place in members:
            if (safe := clip_name(name)) is not None:
                named.pop(safe, None)
                named[safe] = place
        num_replaced = len(members) - len(unusable) - len(named)
        return TarIndex(named, {}, tuple(map(repr, unusable[:5])), len(unusable), num_replaced)

    def _sidecar(self, ending: str) -> bytes | None:
        try:
            answer = self._get(self.key[: -len(".tar")] + ending)
            if answer.meta["size"] > MAX_SIDECAR_BYTES:
                return None
            with self._faults():
                return answer.bytes().to_bytes()
        except FileNotFoundError:
            return None

    def read(self, offset: int, length: int, version: str) -> bytes:
        """A range of the indexed version."""
        answer = self._checked(self._get(self.key, range=(offset, offset + length)), version)
        with self._faults():
            return answer.bytes().to_bytes()

    def _checked(self, answer: GetResult, version: str) -> GetResult:
        if _state_of(answer.meta).version != version:
            raise MediaError(CHANGED_REASON)
        return answer

    def _get(self, key: str, **options: Any) -> GetResult:
        import obstore

        with self._faults():
            return obstore.get(self._store, key, options=cast("GetOptions", options) or None)

    def _faults(self) -> Any:
        from obstore.exceptions import BaseError

        return service_faults(f"read {self.url}", self.root.url, (BaseError,))

    def cache_file(self, what: str) -> Path:
        """Where this host keeps the shard's "index" or "texts"."""
        name = sha256_hex(self.url.encode())
        return cache_folder() / "shards" / name[:2] / f"{name}.{what}.gz"


class _ReadAhead:
    """Reads a shard's headers in order: through members that are small, from header to header where they are large."""

    def __init__(self, shard: RemoteShard, state: ShardState) -> None:
        self._shard, self._state = shard, state
        self._start, self._data = 0, b""
        self._window = WINDOW_BYTES

    def read_at(self, length: int, offset: int) -> bytes:
        """Like `os.pread`: fewer bytes at the end of the shard."""
        length = min(length, self._state.num_bytes - offset)
        if length <= 0:
            return b""
        end = self._start + len(self._data)
        if not self._start <= offset <= offset + length <= end:
            is_near = self._start <= offset <= end + NEAR_BYTES and self._data
            self._window = min(4 * self._window, MAX_WINDOW_BYTES) if is_near else WINDOW_BYTES
            wanted = min(max(length, self._window), self._state.num_bytes - offset)
            self._data = self._shard.read(offset, wanted, self._state.version)
            self._start = offset
            if len(self._data) < wanted:
                raise RunStoppedError(f"{self._shard.url} answered {len(self._data)} of {wanted} bytes; run again")
        return self._data[offset - self._start : offset - self._start + length]


def parse_sidecar(data: bytes, num_bytes: int) -> list[tuple[str, tuple[int, int]]]:
    """(name, (offset, size)) of every member in an index file of DALI; [] where it is none or does not fit the shard.

    A line holds the files of one sample: extension, offset of the data, size and name of each, separated by spaces, so
    that a name with a space makes the file unreadable. Between two members there is room for extended headers and
    folders, and for no medium that the index leaves out.
    """
    try:
        first, *lines = data.decode().splitlines()
    except (UnicodeDecodeError, ValueError):
        return []
    if first.split(" ") != [SIDECAR_VERSION, str(len(lines))]:
        return []
    members: list[tuple[str, tuple[int, int]]] = []
    for line in lines:
        words = line.split(" ")
        if len(words) % 4 or not all(word.isascii() and word.isdigit() for word in [*words[1::4], *words[2::4]]):
            return []
        members += zip(words[3::4], zip(map(int, words[1::4]), map(int, words[2::4]), strict=True), strict=True)
    end = 0
    for offset, size in sorted(place for _, place in members):
        gap = offset - BLOCK_BYTES - end
        if gap % BLOCK_BYTES or not 0 <= gap <= MAX_GAP_BYTES or offset + size > num_bytes:
            return []
        end = offset + -(-size // BLOCK_BYTES) * BLOCK_BYTES
    return members if len(members) <= MAX_MEMBERS else []


@contextmanager
def spooled(
    root: RemoteRoot, key: str, offset: int, size: int, version: str, on_wait: Callable[[], None]
) -> Iterator[Path]:
    """The member as a file of the host's spool, which stays while the block runs."""
    shard = RemoteShard(root, key)
    fetch = partial(shard.fetch, offset, size, version)
    try:
        with spool_of(root).hold(copy_name(shard.url, offset, version), size, fetch, on_wait) as path:
            yield path
    except FileNotFoundError as error:
        raise RunStoppedError(
            f"{shard.url} is gone since it was listed; put it back, or list it no longer, and run the same command "
            "again; nothing was quarantined"
        ) from error


def copy_name(shard_url: str, offset: int, version: str) -> str:
    """The name of a member's copy in a spool; all copies of a shard begin alike."""
    return f"{_copies_prefix(shard_url)}{offset}-{record_digest([version])[:16]}"


def _copies_prefix(shard_url: str) -> str:
    return f"{sha256_hex(shard_url.encode())[:16]}-"


def forget_shard(root: RemoteRoot, key: str) -> int:
    """Remove what this host keeps of a shard, of any version: members, captions, index; returns how many files."""
    shard, removed = RemoteShard(root, key), 0
    for file in (shard.cache_file("index"), shard.cache_file("texts")):
        removed += file.exists()
        file.unlink(missing_ok=True)
    folder = _spool_folder(root)
    return removed + (Spool(folder, root.spool_bytes).remove(_copies_prefix(shard.url)) if folder.is_dir() else 0)


def spool_of(root: RemoteRoot) -> Spool:
    """The spool of a root on this host; one of this process."""
    return _spool(_spool_folder(root), root.spool_bytes)


def _spool_folder(root: RemoteRoot) -> Path:
    return Path(root.spool) if root.spool else cache_folder() / "spool"


_spool = lru_cache(8)(Spool)


@lru_cache(8)
def connection(url: str) -> ObjectStore:
    """This process's connection to a root; nothing is sent yet."""
    from featurestore.objects.remote import connect

    check_not_redacted(url, "give --root or the option shards again, as for the extraction")
    return connect(url)


@lru_cache(64)
def is_reachable(url: str) -> bool:
    """Whether the server of a root answers, asked for once in a process."""
    try:
        open_objects(url)
    except MervCacheError:
        return False
    return True


def list_shards(root: RemoteRoot) -> tuple[dict[str, ShardState], list[str]]:
    """(key -> state of every *.tar below the root, all other keys), by listing the bucket."""
    import obstore
    from obstore.exceptions import BaseError

    from featurestore.objects.remote import READ_ONLY

    if root.url.partition("://")[0] in READ_ONLY:
        raise UserError(f"{root.url} cannot be listed: name its shards, such as --option shards='{{00000..00099}}.tar'")
    shards: dict[str, ShardState] = {}
    others: list[str] = []
    with service_faults("list the shards", root.url, (BaseError,)):
        for metas in obstore.list(connection(root.url), chunk_size=1000):
            for meta in metas:
                if meta["path"].lower().endswith(".tar"):
                    shards[meta["path"]] = _state_of(meta)
                else:
                    others.append(meta["path"])
    return shards, others


def _state_of(meta: Mapping[str, Any]) -> ShardState:
    modified_s = meta["last_modified"].timestamp()
    return ShardState(meta.get("e_tag") or f"{meta['size']} {modified_s:.0f}", meta["size"], modified_s)


def _is_text(name: str, size: int) -> bool:
    return name.lower().endswith(TEXTS) and size <= MAX_TEXT_BYTES


@lru_cache(1024)
def _version_now(url: str, key: str) -> str:
    """The version of a shard that was not listed, asked for once in a process."""
    return RemoteShard(RemoteRoot(url), key).state().version


def _load_index(file: Path, url: str) -> ShardIndex | None:
    try:
        return _parse_index(file, os.stat(file).st_mtime_ns, url)
    except FileNotFoundError:
        return None


@lru_cache(CACHED_INDEXES)
def _parse_index(file: Path, mtime_ns: int, url: str) -> ShardIndex | None:
    del mtime_ns  # part of the cache key only
    record = _read_cached(file, url)
    if record is None:
        return None
    fields = {name: record[name] for name in ShardIndex.__dataclass_fields__}
    members = {name: tuple(place) for name, place in fields["members"].items()}
    return ShardIndex(**fields | {"members": members, "unusable": tuple(fields["unusable"])})


def _read_cached(file: Path, url: str) -> dict[str, Any] | None:
    """A file of the cache; None where there is none that is whole."""
    try:
        record = json.loads(gzip.decompress(file.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error):
        return None
    return record if isinstance(record, dict) and (record.get("format"), record.get("url")) == (_FORMAT, url) else None


def _write_cached(file: Path, url: str, record: Mapping[str, Any]) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    text = json.dumps({"format": _FORMAT, "url": url, **record}, separators=(",", ":"))
    temporary.write_bytes(gzip.compress(text.encode(), compresslevel=1, mtime=0))
    os.replace(temporary, file)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

"""A cache of remote stores on this machine's disk, shared by any number of processes and bounded in size.

Of a shard, ranges are kept in a sparse file at the shard's own offsets. There is no index and no lock: a range is used
only if it ends in the crc32c of itself, so a hole, a half-finished write or a flipped bit is fetched again. Tables that
readers check by digest are kept whole with a sha256; names hold the object's version, so replaced bytes are not served.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c

from featurestore.layout import PARTS, SAMPLES, SNAPSHOTS
from featurestore.locate import Place
from featurestore.objects.base import machine_faults, scatter
from featurestore.objects.remote import RemoteObject, RemoteObjects
from mervcache.errors import UserError
from mervcache.files import sha256_hex, user_cache

DEFAULT_BYTES = 50 * 10**9
_KEPT_WHOLE = (PARTS, SAMPLES, SNAPSHOTS)  # folders whose tables are read whole and checked by their reader
_CRC_BYTES, _SHA_BYTES = 4, 32
_BLOCK = 512  # bytes: the unit of st_blocks
_CHECKS_PER_BOUND = 64  # the folder is measured each time a process has written this fraction of the bound
_KEPT_FRACTION = 0.9  # of the bound, after room is made


def cache_folder(given: Place | None = None) -> Path:
    """The folder given, else MERV_CACHE_DIR, else merv-cache in the user's cache folder."""
    named = given or os.environ.get("MERV_CACHE_DIR")
    return Path(named) if named else user_cache() / "merv-cache"


def cache_bound(given: int | None = None) -> int:
    """Bytes that the cache may take: as given, else MERV_CACHE_BYTES, else 50 GB."""
    text = given if given is not None else os.environ.get("MERV_CACHE_BYTES", DEFAULT_BYTES)
    try:
        bound = int(float(text))
    except (TypeError, ValueError):
        bound = 0
    if bound < 1:
        raise UserError(f"the cache's size is a number of bytes such as 50e9, got {text!r}")
    return bound


def clear_cache(folder: Path) -> int:
    """Remove everything that is cached of remote stores, in use or not; returns how many files.

    Their names do not tell what they hold, so this is how to be certain that a removed clip is in none of them.
    """
    removed = 0
    for path in folder.glob("??/*"):
        with suppress(OSError):
            path.unlink()
            removed += 1
    return removed


class CachedObjects:
    """Remote objects whose `get` and `open` go through the cache; everything else goes to the objects directly."""

    def __init__(self, objects: RemoteObjects, folder: Path, bound: int) -> None:
        self._objects = objects
        self.cache = CacheFolder(folder, bound)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def get(self, key: str, *, max_bytes: int | None = None, sha256: str | None = None) -> bytes:
        if key.split("/")[0] not in _KEPT_WHOLE or not key.endswith(".parquet"):
            return self._objects.get(key, max_bytes=max_bytes)
        path = self.cache.path(self._objects.root, key, sha256 or self._objects.open(key).version)
        data = self.cache.read_whole(path)
        if data is None or (sha256 is not None and sha256_hex(data) != sha256):
            data = self._objects.get(key, max_bytes=max_bytes)
            self.cache.write_whole(path, data)
        return data

    def open(self, key: str) -> CachedObject:
        source = self._objects.open(key)
        return CachedObject(source, self.cache, self.cache.path(self._objects.root, key, source.version))


class CachedObject:
    """A shard whose ranges are cached if they end in the crc32c of themselves."""

    def __init__(self, source: RemoteObject, cache: CacheFolder, path: Path) -> None:
        self._source, self._cache, self._path = source, cache, path
        self.size = source.size

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        length = sum(len(buffer) for buffer in buffers)
        data = self._cache.read_range(self._path, offset, length)
        if data is None:
            fetched = bytearray(length)
            if self._source.read_into(offset, [memoryview(fetched)]) != length:
                return self._source.read_into(offset, buffers)
            data = memoryview(fetched)
            if _matches_crc(data):
                self._cache.write_range(self._path, offset, data)
        scatter(data, buffers)
        return length

    def close(self) -> None:
        self._source.close()


class CacheFolder:
    """Files of the cache; a full or failing disk costs speed, never the read."""

    def __init__(self, folder: Path, bound: int) -> None:
        self.folder, self.bound = folder, bound
        self._written = 0
        self._lock = threading.Lock()
        with machine_faults(f"make the cache folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, root: str, key: str, version: str) -> Path:
        name = sha256_hex(f"{root}\n{key}\n{version}".encode())
        return self.folder / name[:2] / name

    def read_range(self, path: Path, offset: int, length: int) -> memoryview | None:
        with suppress(OSError), open(path, "rb", buffering=0) as file:
            data = memoryview(bytearray(length))
            if os.preadv(file.fileno(), [data], offset) == length and _matches_crc(data):
                os.utime(file.fileno())  # the least recently used are removed first
                return data
        return None

    def write_range(self, path: Path, offset: int, data: memoryview) -> None:
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.pwrite(handle, data, offset)
            finally:
                os.close(handle)
            self._count(len(data))

    def read_whole(self, path: Path) -> bytes | None:
        with suppress(OSError):
            data = path.read_bytes()
            if len(data) >= _SHA_BYTES and hashlib.sha256(data[:-_SHA_BYTES]).digest() == data[-_SHA_BYTES:]:
                os.utime(path)
                return data[:-_SHA_BYTES]
        return None

    def write_whole(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(data + hashlib.sha256(data).digest())
            os.replace(temporary, path)
            self._count(len(data))

    def _count(self, written: int) -> None:
        with self._lock:
            self._written += written
            is_due = self._written * _CHECKS_PER_BOUND >= self.bound
            self._written = 0 if is_due else self._written
        if is_due:
            self.make_room()

    def make_room(self) -> None:
        """Remove the least recently used files until the rest fits; a process that reads one keeps its open file."""
        files: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("??/*"):
            with suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime, status.st_blocks * _BLOCK, path))
        total = sum(size for _, size, _ in files)
        if total <= self.bound:
            return
        for _, size, path in sorted(files):
            if total <= _KEPT_FRACTION * self.bound:
                break
            with suppress(OSError):
                path.unlink()
            total -= size


def _matches_crc(data: memoryview) -> bool:
    """Whether the bytes end in the crc32c of the rest, as a row and the index of a shard do."""
    if len(data) <= _CRC_BYTES:
        return False
    (stored,) = struct.unpack("<I", data[-_CRC_BYTES:])
    return google_crc32c.value(bytes(data[:-_CRC_BYTES])) == stored

"""A cache on this machine's disk for stores that are far away; safe for any number of processes, bounded in size.

Of shards, ranges are kept and not whole files: a shuffled reader wants 1-2 MB of a shard of 100 MB. Each shard has a
sparse file in which a row lies where it lies in the shard. Nothing says which rows are there: a row ends in the crc32c
of itself, and what does not agree with it (a hole, another process's write half done, a flipped bit) is fetched again.
So there are no locks and no index, and no cached byte is used without its checksum. Other objects that readers check
by digest (snapshots, clip parts, samples) are kept whole with a sha256 of their own. Names hold the object's version:
what was replaced in the store is never served from here.
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
_WHOLE = (PARTS, SAMPLES, SNAPSHOTS)  # folders whose objects are read whole, and checked by whoever reads them
_CRC_BYTES, _SHA_BYTES = 4, 32
_BLOCK = 512  # bytes: the unit of st_blocks
_LOOK_AFTER = 64  # the folder is measured after every 1/64 of its bound that a process wrote
_KEEP = 0.9  # of the bound stays when room is made


def cache_folder(given: Place | None = None) -> Path:
    """The folder named, else MERV_CACHE_DIR, else merv-cache under the user's cache folder."""
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


class CachedObjects:
    """A remote place whose reads go through the cache; what is not named here goes straight there."""

    def __init__(self, objects: RemoteObjects, folder: Path, bound: int) -> None:
        self._objects = objects
        self.cache = _CacheFolder(folder, bound)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def get(self, key: str) -> bytes:
        if key.split("/")[0] not in _WHOLE:
            return self._objects.get(key)
        path = self.cache.path(self._objects.root, key, self._objects.open(key).version)
        data = self.cache.read_whole(path)
        if data is None:
            data = self._objects.get(key)
            self.cache.write_whole(path, data)
        return data

    def open(self, key: str) -> CachedObject:
        opened = self._objects.open(key)
        return CachedObject(opened, self.cache, self.cache.path(self._objects.root, key, opened.version))


class CachedObject:
    """A shard whose ranges are remembered, if they end in the crc32c of themselves."""

    def __init__(self, source: RemoteObject, cache: _CacheFolder, path: Path) -> None:
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
            if _is_whole(data):
                self._cache.write_range(self._path, offset, data)
        scatter(data, buffers)
        return length

    def close(self) -> None:
        self._source.close()


class _CacheFolder:
    """Files of the cache; a full or failing disk costs the cache, never the read."""

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
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            data = memoryview(bytearray(length))
            count = os.preadv(handle, [data], offset)
            if count != length or not _is_whole(data):
                return None
            os.utime(handle)  # the least recently used go first
            return data
        except OSError:
            return None
        finally:
            os.close(handle)

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
            is_due = self._written * _LOOK_AFTER >= self.bound
            self._written = 0 if is_due else self._written
        if is_due:
            self.make_room()

    def make_room(self) -> None:
        """Remove the least recently used files until the rest fits; whoever reads one keeps it until it is closed."""
        found = []
        for path in self.folder.glob("??/*"):
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, status.st_blocks * _BLOCK, path))
        total = sum(size for _, size, _ in found)
        if total <= self.bound:
            return
        for _, size, path in sorted(found):
            if total <= _KEEP * self.bound:
                break
            with suppress(OSError):
                path.unlink()
            total -= size


def _is_whole(data: memoryview) -> bool:
    """True of a row or an index as shards have them: bytes, then their crc32c."""
    if len(data) <= _CRC_BYTES:
        return False
    (stored,) = struct.unpack("<I", data[-_CRC_BYTES:])
    return google_crc32c.value(bytes(data[:-_CRC_BYTES])) == stored

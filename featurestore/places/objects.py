"""The one door to bytes: named objects that are put once, whole and durably.

`Objects` is what the store asks of a place to keep bytes: `LocalObjects` is a folder, `RemoteObjects` a bucket, where
`put_new` is one conditional put, and `HubObjects` a repository of the Hub, where puts are gathered into commits. Every
failure of the machine (disk full, share gone) becomes a `RunStoppedError` here, so that no caller mistakes it for a
broken clip.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from featurestore.digests import sha256_hex
from featurestore.errors import AlreadyExistsError, RunStoppedError, StoreFormatError

Buffer = bytes | bytearray | memoryview

_MACHINE_FAULTS = {
    "ENOSPC": "the disk is full: free space and run the same command again, committed blocks are kept",
    "EFBIG": "a limit refuses files that large: choose another --store, or smaller block_rows for a new one",
    "EDQUOT": "the disk quota is used up: raise it or free space and run the same command again",
    "EIO": "the disk or share reports an I/O error: check it, then run the same command again",
    "ESTALE": "the share was unmounted or replaced: mount it again, then run the same command again",
    "EROFS": "the file system is read-only: remount it writable or choose another --store",
    "EACCES": "permission denied: fix the owner or mode of the folder or choose another --store",
    "EPERM": "operation not permitted: fix the owner or mode of the folder or choose another --store",
    "ENOTCONN": "the share is not connected: mount it again, then run the same command again",
    "EHOSTDOWN": "the file server does not answer: wait for it, then run the same command again",
    "ETIMEDOUT": "the file server does not answer: wait for it, then run the same command again",
}
# What only a crafted store does: loops of links, names longer than any of ours, sockets.
_CRAFTED = {errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EINVAL}
_NEXT_STEP = {getattr(errno, name): step for name, step in _MACHINE_FAULTS.items() if hasattr(errno, name)}


class OpenObject(Protocol):
    """An object opened for many ranged reads."""

    size: int  # bytes

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int: ...  # bytes read

    def close(self) -> None: ...


class Objects(Protocol):
    """Named bytes. Keys are relative POSIX paths; a missing key raises FileNotFoundError."""

    parallel_reads: int  # requests that are worth having in flight at once
    gathers: bool  # others see a put after `flush` only

    def put_new(self, key: str, data: Buffer | Sequence[Buffer]) -> None: ...  # AlreadyExistsError if taken

    def replace(self, key: str, data: bytes) -> None: ...  # metadata that grows; and `repair` and `tombstone`

    def swap(self, key: str, old: bytes, new: bytes) -> bool: ...  # replace if it still is `old`; False if it is not

    def get(self, key: str) -> bytes: ...

    def open(self, key: str) -> OpenObject: ...

    def size(self, key: str) -> int: ...

    def exists(self, key: str) -> bool: ...

    def list_names(self, prefix: str) -> list[str]: ...  # direct children, sorted; [] if there is none

    def list_tree(self, prefix: str = "") -> dict[str, int]: ...  # key -> bytes of everything below

    def delete(self, key: str) -> None: ...  # a missing key is no error

    def abandoned(self) -> list[str]: ...  # temporary folders that no living process owns

    def sweep(self) -> None: ...  # remove them

    def flush(self) -> None: ...  # what was put until now is there for others; nothing to do unless the place gathers

    def known_sha256(self, key: str) -> str | None: ...  # None where it takes reading the object to know


def scatter(data: memoryview, buffers: Sequence[memoryview]) -> None:
    """Spread bytes over buffers, one after the other, until they are used up."""
    done = 0
    for buffer in buffers:
        part = data[done : done + len(buffer)]
        buffer[: len(part)] = part
        done += len(part)


def put_if_absent(objects: Objects, key: str, data: Buffer | Sequence[Buffer]) -> bool:
    """Put unless the name is taken; False if somebody was first, whose bytes then stand."""
    try:
        objects.put_new(key, data)
    except AlreadyExistsError:
        return False
    return True


def digest_of(objects: Objects, key: str) -> str:
    """The sha256 of an object, which is read unless the place tells it."""
    return objects.known_sha256(key) or sha256_hex(objects.get(key))


def get_bounded(objects: Objects, key: str, max_bytes: int) -> bytes:
    """The bytes of an object that may be a stranger's: what claims to be larger than it can be is not loaded."""
    size = objects.size(key)
    if size > max_bytes:
        raise StoreFormatError(f"{key} has {size} bytes, more than the {max_bytes} that such a file can need")
    return objects.get(key)


@contextmanager
def machine_faults(what: str) -> Iterator[None]:
    """Turn errors of the machine into RunStoppedError with a next step; let the others pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _CRAFTED:
            raise StoreFormatError(f"cannot {what}: {error.strerror}; no store of ours holds such a file") from error
        step = _NEXT_STEP.get(error.errno or 0)
        if step is None:
            raise
        raise RunStoppedError(f"cannot {what}: {step} ({error.strerror})") from error

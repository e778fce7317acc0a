"""A folder as objects: puts are exclusive and survive a power cut, and no path leads out of the folder.

A put writes a temporary file, syncs it, links it to its name (which fails if the name exists) and syncs the folder.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import time
import uuid
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from featurestore.layout import TEMPORARY
from featurestore.objects.base import Buffer, Objects, check_key, check_size, machine_faults
from mervcache.errors import AlreadyExistsError, StoreFormatError

_NO_LINK = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_ABANDONED_AFTER_S = 86_400
_MAX_CHECKED_FOLDERS = 100_000


class LocalObjects(Objects):
    """A folder; any number of processes may share it."""

    parallel_reads = 1  # a disk's queue is filled by the loader's workers

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.realpath(root)
        self._run = f"{_process_space()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"  # our folder in tmp/
        self._count = 0
        weakref.finalize(self, _remove_if_empty, os.path.join(self.root, TEMPORARY, self._run))
        self._checked_folders: set[str] = set()

    def __reduce__(self) -> tuple[type[LocalObjects], tuple[str]]:
        return (LocalObjects, (self.root,))  # a new process gets a temporary folder of its own

    def put_exclusive(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        path = self._path(key)
        with machine_faults(f"write {key}"):
            _make_folder(os.path.dirname(path))
            temporary = self._write_temporary(data)
            try:
                self._link_exclusively(temporary, path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
            _sync_folder(os.path.dirname(path))

    def replace(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with machine_faults(f"write {key}"):
            _make_folder(os.path.dirname(path))
            os.rename(self._write_temporary(data), path)
            _sync_folder(os.path.dirname(path))

    def compare_and_swap(self, key: str, old: bytes, new: bytes) -> bool:
        with self._locked("metadata"):
            if self.get(key) != old:
                return False
            self.replace(key, new)
        return True

    def get(self, key: str, *, max_bytes: int | None = None, sha256: str | None = None) -> bytes:
        with machine_faults(f"read {key}"), os.fdopen(_open_regular(self._path(key), key), "rb") as file:
            check_size(key, os.fstat(file.fileno()).st_size, max_bytes)
            return file.read()

    def open(self, key: str) -> LocalObject:
        with machine_faults(f"read {key}"):
            return LocalObject(self._path(key), key)

    def size(self, key: str) -> int:
        opened = self.open(key)
        opened.close()
        return opened.size

    def modified_s(self, key: str) -> float:
        """Unix time of the last put, by the file system's clock; for the lease."""
        with machine_faults(f"read {key}"):
            return os.stat(self._path(key)).st_mtime

    def exists(self, key: str) -> bool:
        with machine_faults(f"read {key}"):
            return os.path.exists(self._path(key))

    def list_names(self, prefix: str) -> list[str]:
        with machine_faults(f"list {prefix or 'the store'}"):
            try:
                return sorted(os.listdir(self._path(prefix) if prefix else self.root))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def list_tree(self, prefix: str = "") -> dict[str, int]:
        """Files only, without links and what is in `tmp/`."""
        sizes: dict[str, int] = {}
        with machine_faults(f"list {prefix or 'the store'}"):
            for folder, _, names in os.walk(self._path(prefix) if prefix else self.root):
                for path in (os.path.join(folder, name) for name in names):
                    key = self._key(path)
                    if not os.path.islink(path) and not key.startswith(f"{TEMPORARY}/"):
                        sizes[key] = os.stat(path).st_size
        return sizes

    def delete(self, key: str) -> None:
        path = self._path(key)
        with machine_faults(f"delete {key}"), suppress(FileNotFoundError):
            os.unlink(path)
            _sync_folder(os.path.dirname(path))

    def cleanup_tmp(self, *, dry_run: bool = False) -> list[str]:
        """Folders of `tmp/` whose process is dead for certain, or that are a day old."""
        names = [name for name in self.list_names(TEMPORARY) if self._is_abandoned(name)]
        for name in () if dry_run else names:
            shutil.rmtree(os.path.join(self.root, TEMPORARY, name), ignore_errors=True)
        return [f"{TEMPORARY}/{name}" for name in names]

    def non_regular_files(self) -> list[str]:
        found: list[str] = []
        for folder, folders, names in os.walk(self.root):
            for path in (os.path.join(folder, name) for name in (*folders, *names)):
                if not stat.S_ISREG(mode := os.lstat(path).st_mode) and not stat.S_ISDIR(mode):
                    found.append(self._key(path))
        return sorted(found)

    def _key(self, path: str) -> str:
        return os.path.relpath(path, self.root).replace(os.sep, "/")

    def _is_abandoned(self, name: str) -> bool:
        path = os.path.join(self.root, TEMPORARY, name)
        if name == self._run or not os.path.isdir(path):
            return False
        with suppress(FileNotFoundError):
            if time.time() - os.stat(path).st_mtime > _ABANDONED_AFTER_S:
                return True
        space, _, owner = name.rpartition("-")[0].rpartition("-")
        if space != _process_space() or not owner.isdigit():
            return False  # of another machine: only its age counts
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False

    def _path(self, key: str) -> str:
        """The file of a key; refuses keys and links that lead out of the root (a store may be untrusted)."""
        parts = check_key(key).split("/")
        path = os.path.join(self.root, *parts)
        folder = os.path.dirname(path)
        if folder not in self._checked_folders or os.path.islink(path):
            for checked in (folder, path):
                real = os.path.realpath(checked)
                if not (real + os.sep).startswith(self.root.rstrip(os.sep) + os.sep):
                    raise StoreFormatError(f"{key} is refused: a symbolic link leads out of the store")
                if real != checked:
                    raise StoreFormatError(f"{key} is refused: a store holds no symbolic links, put the file there")
            if len(self._checked_folders) < _MAX_CHECKED_FOLDERS and os.path.isdir(folder):
                self._checked_folders.add(folder)
        return path

    def _write_temporary(self, data: Buffer | Sequence[Buffer]) -> str:
        folder = os.path.join(self.root, TEMPORARY, self._run)
        os.makedirs(folder, exist_ok=True)
        self._count += 1
        path = os.path.join(folder, f"{self._count}-{uuid.uuid4().hex[:8]}")
        with open(path, "xb", buffering=0) as file:
            for piece in [data] if isinstance(data, bytes | bytearray | memoryview) else data:
                rest = memoryview(piece).cast("B")
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        return path

    def _link_exclusively(self, temporary: str, path: str) -> None:
        """Give a written file its name, unless the name exists."""
        try:
            os.link(temporary, path)
        except FileExistsError:
            # A retransmitted link on NFS can report the success of its first try as "exists".
            if not os.path.samefile(temporary, path):
                raise _taken(path) from None
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            with self._locked("rename"):  # no links on this file system: check, then rename, one process at a time
                if os.path.exists(path):
                    raise _taken(path) from None
                os.rename(temporary, path)

    @contextmanager
    def _locked(self, name: str) -> Generator[None]:
        """Hold an advisory lock among processes that share the folder; no lock where they are not supported."""
        import fcntl  # POSIX only

        path = self._path(f"{TEMPORARY}/{name}.lock")
        with machine_faults(f"lock {name}"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


class LocalObject:
    """An open file of a `LocalObjects`."""

    _file = -1  # until it is open

    def __init__(self, path: str, key: str) -> None:
        self._file = _open_regular(path, key)
        self.size = os.fstat(self._file).st_size

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        views, done = list(buffers), 0
        with machine_faults("read a shard"):
            while views:
                count = os.preadv(self._file, views, offset + done)
                if count == 0:
                    break  # end of file
                done += count
                while views and count >= len(views[0]):
                    count -= len(views.pop(0))
                if views:  # a short read: network file systems do that
                    views[0] = views[0][count:]
        return done

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()


def _open_regular(path: str, key: str) -> int:
    """A handle of a regular file: reading a pipe or device in an untrusted store could block forever."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, path) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise StoreFormatError(f"{key} is refused: it is no plain file")
    return handle


def _taken(path: str) -> AlreadyExistsError:
    return AlreadyExistsError(f"{os.path.basename(path)} exists already: another process was first, read what it wrote")


def _make_folder(path: str) -> None:
    """Make missing folders durably: a file's entry is safe only if its folder's own entry is."""
    if not os.path.isdir(path):
        _make_folder(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path)
        _sync_folder(os.path.dirname(path))


def _sync_folder(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_if_empty(folder: str) -> None:
    with suppress(OSError):
        os.rmdir(folder)


@cache
def _process_space() -> str:
    """Names the host, its boot and its process namespace, within which a process id is alive or not."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        boot, namespace = "0", 0
    host = "".join(c for c in socket.gethostname().split(".")[0] if c.isalnum()) or "host"
    return f"{host}-{boot}-{namespace}"

"""A folder of copies that all processes of a host share: bounded in size, the least recently used go first.

Files alone hold its state, so that nothing has to be repaired after a kill. A process locks (`flock`) the copy that it
uses, and the kernel releases the lock when the process ends: a locked copy is never evicted, and a partial copy that
is not locked was left by a kill and is removed at the next scan. Bytes are reserved in a counter before they are
written, so that the bound holds however many processes write; a scan sets the counter right.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from featurestore.objects.base import machine_faults
from mervcache.errors import RunStoppedError

PARTIAL = ".part"  # a copy that is being written
COUNTER = "bytes"  # file with the number of bytes reserved; locked while the folder's content is decided
KEPT_FRACTION = 0.9  # of the bound, after room was made
POLL_S = 0.05  # while every copy is in use
REPORT_S = 5.0  # between two calls of `on_wait`


class Spool:
    """At most `bound` bytes of copies under `folder`, together with all other processes that give the same bound."""

    def __init__(self, folder: Path, bound: int) -> None:
        self.folder, self.bound = folder, bound
        with machine_faults(f"make the spool folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            self.clean()

    @contextmanager
    def hold(
        self,
        name: str,
        size: int,
        fetch: Callable[[BinaryIO], None],
        on_wait: Callable[[], None] = lambda: None,
    ) -> Iterator[Path]:
        """The copy called `name`, which stays while the block runs; `fetch` writes its `size` bytes if it is not there.

        Where all other copies are in use and leave no room, it waits, and calls `on_wait` every few seconds. Raises
        `RunStoppedError` for a copy larger than the bound, and what `fetch` raises.
        """
        if size > self.bound:
            raise RunStoppedError(
                f"a member of {size} bytes does not fit into the spool of {self.bound} bytes at {self.folder}: give "
                "the dataset's option spool_gb a larger number and run the same command again"
            )
        path = self.folder / name
        with machine_faults(f"write the spool {self.folder}"):
            held = _lock_existing(path)
            if held is None:
                held = self._fetched(path, size, fetch, on_wait)
        try:
            yield path
        finally:
            os.close(held)  # releases the lock

    def clean(self) -> None:
        """Remove what killed processes left, and what is over the bound."""
        with self._counter() as counter:
            counter.value = self._make_room(self.bound)

    def remove(self, prefix: str) -> int:
        """Remove the copies whose names begin so, also those in use; returns how many there were."""
        with self._counter() as counter:
            names = [name for name in os.listdir(self.folder) if name.startswith(prefix) and name != COUNTER]
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
            counter.value = self._make_room(self.bound)
        return len(names)

    def _fetched(self, path: Path, size: int, fetch: Callable[[BinaryIO], None], on_wait: Callable[[], None]) -> int:
        """Write the copy under a temporary name and give it its own; returns its locked descriptor."""
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
        handle = self._reserve(partial, size, on_wait)
        try:
            with open(os.dup(handle), "wb") as file:
                fetch(file)
            with self._counter():  # no scan may take the file that goes for the one that comes
                os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            os.close(handle)
            with self._counter() as counter:
                counter.value -= size
            raise
        return handle

    def _reserve(self, partial: Path, size: int, on_wait: Callable[[], None]) -> int:
        """Count `size` bytes and make the empty, locked file for them; waits until there is room."""
        reported = time.monotonic()
        while True:
            with self._counter() as counter:
                if counter.value + size > self.bound:
                    counter.value = self._make_room(self.bound - size)
                if counter.value + size <= self.bound:
                    handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                    fcntl.flock(handle, fcntl.LOCK_SH)
                    os.ftruncate(handle, size)  # a scan counts what is reserved, not what is written so far
                    counter.value += size
                    return handle
            if time.monotonic() - reported > REPORT_S:
                on_wait()
                reported = time.monotonic()
            time.sleep(POLL_S)

    def _make_room(self, wanted: int) -> int:
        """Remove abandoned partial copies, then unused copies until `wanted` bytes are left; returns bytes."""
        copies, total = [], 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name == COUNTER or not entry.is_file(follow_symlinks=False):
                    continue
                status = entry.stat(follow_symlinks=False)
                if not (entry.name.endswith(PARTIAL) and _unlink_unused(entry.path)):
                    copies.append((status.st_mtime_ns, status.st_size, entry.path))
                    total += status.st_size
        if total > wanted:
            for _, size, path in sorted(copies):
                if total <= min(wanted, KEPT_FRACTION * self.bound):
                    break
                if _unlink_unused(path):
                    total -= size
        return total

    @contextmanager
    def _counter(self) -> Iterator[_Counter]:
        handle = os.open(self.folder / COUNTER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            counter = _Counter(int(os.pread(handle, 32, 0) or b"0"))
            yield counter
            os.pwrite(handle, b"%032d" % max(0, counter.value), 0)
        finally:
            os.close(handle)


class _Counter:
    """Bytes reserved in a spool, while its counter file is locked."""

    def __init__(self, value: int) -> None:
        self.value = value


def _lock_existing(path: Path) -> int | None:
    """A descriptor with a shared lock on a whole copy; None if there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(handle, fcntl.LOCK_SH)
    if os.fstat(handle).st_nlink == 0:  # evicted between the two calls
        os.close(handle)
        return None
    with suppress(OSError):
        os.utime(handle)  # the least recently used is removed first
    return handle


def _unlink_unused(path: str) -> bool:
    """Remove a file unless a process has it locked; returns whether it is gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True

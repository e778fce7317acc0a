"""Marks of blocks in progress, which a crashed process leaves under `tmp/`. No torch: the driver removes them.

Python has one fault handler per process, and a process has several blocks in flight: each block has an empty mark that
names its process, and the handler writes into one file of the process. A crash therefore suspects every block that was
in flight, and no other.
"""

from __future__ import annotations

import faulthandler
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from featurestore.layout import TEMPORARY
from featurestore.locate import is_url

if TYPE_CHECKING:
    from pipeline.worker.block import BlockTask

MARKS_FOLDER = "crashes"  # under the store's `tmp/`


def has_crashed(task: BlockTask) -> bool:
    """True if a process crashed while it computed this block."""
    for mark in _marks(task):
        with suppress(FileNotFoundError):
            if mark.with_name(mark.name.rpartition("-")[2]).stat().st_size > 0:
                return True
    return False


@contextmanager
def crash_mark(task: BlockTask) -> Iterator[None]:
    """Around the computing of a block: a crash inside leaves a mark, an exception does not."""
    if is_url(task.store):
        yield
        return
    try:
        log = _CRASH_LOG.enter(_marks_folder(task.store))
    except OSError:  # a full or read-only disk: the block itself reports it
        yield
        return
    mark = log.with_name(f"{_mark_prefix(task)}{log.name}")
    try:
        with suppress(OSError):
            mark.touch()
        yield
    finally:
        with suppress(OSError):
            mark.unlink()
        _CRASH_LOG.leave()


def remove_marks(task: BlockTask) -> None:
    """Remove the marks of a committed block."""
    for mark in _marks(task):
        mark.unlink(missing_ok=True)


def remove_all_marks(store: str) -> None:
    """Remove all marks, once every block of a run is committed."""
    if not is_url(store):
        shutil.rmtree(_marks_folder(store), ignore_errors=True)


class _CrashLog:
    """The file of this process that Python's fault handler writes into while any block is in flight."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._file: TextIO | None = None
        self._was_enabled = False

    def enter(self, folder: Path) -> Path:
        """The file, opened for the first block in flight; OSError where there can be none."""
        with self._lock:
            if self._file is None:
                folder.mkdir(parents=True, exist_ok=True)
                self._was_enabled = faulthandler.is_enabled()
                self._file = (folder / uuid.uuid4().hex).open("w")
                faulthandler.enable(self._file, all_threads=False)
            self._blocks += 1
            return Path(self._file.name)

    def leave(self) -> None:
        """Close and remove the file when the last block has left."""
        with self._lock:
            self._blocks -= 1
            if self._blocks:
                return
            file, self._file = self._file, None
            assert file is not None  # opened by `enter`
            faulthandler.disable()
            if self._was_enabled:
                with suppress(AttributeError, OSError, ValueError):  # standard error may be no file
                    faulthandler.enable()
            file.close()
            with suppress(OSError):
                Path(file.name).unlink()


_CRASH_LOG = _CrashLog()


def _marks(task: BlockTask) -> list[Path]:
    return [] if is_url(task.store) else list(_marks_folder(task.store).glob(f"{_mark_prefix(task)}*"))


def _marks_folder(store: str) -> Path:
    return Path(store) / TEMPORARY / MARKS_FOLDER


def _mark_prefix(task: BlockTask) -> str:
    """With the batch shape: encoders of one block that differ in it are computed apart."""
    return f"{task.kind}-{task.block}-{task.batch}-"

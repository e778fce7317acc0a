"""Crash marks: which block a process was computing when it crashed, told to whoever comes next.

Comes in: a block about to be computed. Goes out: whether a process crashed on it before. A mark is a file under the
store's `tmp/`, made before a block and removed after it, into which Python's fault handler writes when a signal such as
SIGSEGV or SIGABRT ends the process. A process that was killed from outside writes nothing, so its mark says nothing.
Needed because the default worker lives in the driver: what brings it down takes all memory of it along. Stores in
buckets have no marks: there a task that workers die of is known to Dask alone.
"""

from __future__ import annotations

import faulthandler
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from featurestore.layout import TEMPORARY
from featurestore.locate import is_url

if TYPE_CHECKING:
    from pipeline.worker.block import BlockTask

FOLDER = "crashes"


def has_crashed(task: BlockTask) -> bool:
    """Did a process crash while it computed this block?"""
    return any(_is_written(mark) for mark in _marks(task))


@contextmanager
def marked(task: BlockTask) -> Iterator[None]:
    """Wraps the computing of a block: a crash inside leaves a mark, an exception does not."""
    if is_url(task.store):
        yield
        return
    mark = _folder(task.store) / f"{_name(task)}-{uuid.uuid4().hex}"
    was_enabled = faulthandler.is_enabled()
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        file = mark.open("w")
    except OSError:  # a full or read-only disk: the block itself will say so
        yield
        return
    with file:
        faulthandler.enable(file, all_threads=False)
        try:
            yield
        finally:
            faulthandler.disable()
            if was_enabled:
                with suppress(AttributeError, OSError, ValueError):  # standard error may be no file
                    faulthandler.enable()
            with suppress(OSError):  # of a disk that has turned read-only: the block itself says so
                mark.unlink()


def forget(task: BlockTask) -> None:
    """Remove the marks of a committed block."""
    for mark in _marks(task):
        mark.unlink(missing_ok=True)


def forget_all(store: str) -> None:
    """Remove all marks, once every block of a run is committed."""
    if not is_url(store):
        shutil.rmtree(_folder(store), ignore_errors=True)


def _marks(task: BlockTask) -> list[Path]:
    return [] if is_url(task.store) else list(_folder(task.store).glob(f"{_name(task)}-*"))


def _is_written(mark: Path) -> bool:
    with suppress(FileNotFoundError):
        return mark.stat().st_size > 0
    return False


def _folder(store: str) -> Path:
    return Path(store) / TEMPORARY / FOLDER


def _name(task: BlockTask) -> str:
    """Encoders of one block may be computed apart: those of another batch shape."""
    return f"{task.kind}-{task.block}-{task.batch}"

"""Marks of blocks in progress, which a crashed process leaves under `tmp/`. No torch: the driver removes them."""

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

MARKS_FOLDER = "crashes"  # under the store's `tmp/`


def has_crashed(task: BlockTask) -> bool:
    """True if a process crashed while it computed this block."""
    for mark in _marks(task):
        with suppress(FileNotFoundError):
            if mark.stat().st_size > 0:
                return True
    return False


@contextmanager
def crash_mark(task: BlockTask) -> Iterator[None]:
    """Around the computing of a block: a crash inside leaves a mark, an exception does not."""
    if is_url(task.store):
        yield
        return
    mark = _marks_folder(task.store) / f"{_mark_prefix(task)}{uuid.uuid4().hex}"
    was_enabled = faulthandler.is_enabled()
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        file = mark.open("w")
    except OSError:  # a full or read-only disk: the block itself reports it
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
            with suppress(OSError):  # of a disk that has turned read-only: the block itself reports it
                mark.unlink()


def remove_marks(task: BlockTask) -> None:
    """Remove the marks of a committed block."""
    for mark in _marks(task):
        mark.unlink(missing_ok=True)


def remove_all_marks(store: str) -> None:
    """Remove all marks, once every block of a run is committed."""
    if not is_url(store):
        shutil.rmtree(_marks_folder(store), ignore_errors=True)


def _marks(task: BlockTask) -> list[Path]:
    return [] if is_url(task.store) else list(_marks_folder(task.store).glob(f"{_mark_prefix(task)}*"))


def _marks_folder(store: str) -> Path:
    return Path(store) / TEMPORARY / MARKS_FOLDER


def _mark_prefix(task: BlockTask) -> str:
    """With the batch shape: encoders of one block that differ in it are computed apart."""
    return f"{task.kind}-{task.block}-{task.batch}-"

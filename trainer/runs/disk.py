"""Errors of the disk under a run's folder: messages with a next step, and leftovers of processes that were killed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mervcache.console import format_bytes
from mervcache.errors import RunStoppedError

FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a limit refuses files that large (ulimit -f)",
    errno.EIO: "the disk or share reports an I/O error",
    errno.ESTALE: "the share was unmounted or replaced",
    errno.EROFS: "the file system is read-only",
}
OS_ERROR = re.compile(r"os error (\d+)")  # in a message of Rust's standard library, which safetensors writes with
LEFTOVERS = (".tmp-*", ".mode-*")  # of trainer/runs/checkpoint.py and mervcache/files.py


@contextmanager
def disk_faults(run: Path, what: str, *, num_bytes: int | None = None) -> Iterator[None]:
    """Turn an error of the disk under `run` into a RunStoppedError with the free space and the next command."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = OS_ERROR.search(str(error)) if isinstance(error, SafetensorError) else None
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number not in FAULTS:
            raise
        size = f" of {format_bytes(num_bytes)}" if num_bytes is not None else ""
        raise RunStoppedError(
            f"cannot write {what}{size} to {run}: {FAULTS[number]} ({os.strerror(number)}); {_free_space(run)} are free"
            " there. What was saved before is kept: make room, then go on with --resume auto"
        ) from error


def remove_leftovers(run: Path) -> None:
    """Remove what killed processes have left half written; the caller is the run's only writer."""
    for folder in (run, run / "checkpoints"):
        for path in (path for pattern in LEFTOVERS for path in folder.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _free_space(run: Path) -> str:
    nearest = next(folder for folder in (run.absolute(), *run.absolute().parents) if folder.is_dir())
    try:
        return format_bytes(shutil.disk_usage(nearest).free)
    except OSError:
        return "an unknown number of bytes"

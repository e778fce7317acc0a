"""Digests: what covers every byte of a store, as hex digits of a sha256.

This user's cache folder on this machine. What lies there can be made again: losing it costs nothing but time.

Files: how a run's or an export's files come to be: whole or not at all, for others to read, known by a digest.

Comes in: a path and what shall be there. Goes out: that, or what was there before. A folder or a text is written under
another name beside its own and renamed at the end, so that nobody finds half of it, not after a kill either.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mervcache.errors import StoreFormatError


def load_json(data: bytes, what: str) -> Any:
    """Parse JSON that may be hostile: too deep or broken input is a StoreFormatError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(
            f"{what} is not readable JSON ({type(error).__name__}); restore it from a copy"
        ) from error


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """64 hex digits over bytes."""
    return hashlib.sha256(data).hexdigest()


def record_digest(record: Any) -> str:
    """64 hex digits over the one text of a JSON value."""
    return sha256_hex(canonical_json(record).encode())


def canonical_json(value: Any) -> str:
    """The one text of a JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def user_cache() -> Path:
    """XDG_CACHE_HOME, else ~/.cache; nobody promises that it is there or may be written to."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `out` where the block ends; where it fails, nothing is left of it."""
    temporary = _beside(out)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had this number: in containers all have 1
    temporary.mkdir(parents=True)
    try:
        yield temporary
        apply_umask(temporary)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_text(path: Path, text: str) -> Path:
    """Put `text` where `path` is; an interrupted write leaves the old file."""
    temporary = _beside(path)
    temporary.write_text(text)
    return temporary.replace(path)


def file_sha256(path: Path) -> str:
    """The digest by which a file of weights is known."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def apply_umask(folder: Path) -> None:
    """Give every file of weights under `folder` the mode that any new file gets there: 0666 without the umask's bits.

    safetensors writes through a temporary file that only its owner may read, and leaves it so: a colleague could then
    read a run's settings but not its weights. The umask is read off a new file, since reading it otherwise sets it for
    all threads.
    """
    probe = folder / f".mode-{os.getpid()}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def _beside(path: Path) -> Path:
    """A name of this process's own, on the same disk."""
    return path.with_name(f".tmp-{path.name}-{os.getpid()}")

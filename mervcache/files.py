"""Files that are written whole or not at all, SHA-256 digests, canonical JSON and the user's cache folder.

A folder or text is written under a temporary name next to its destination and renamed, so that a killed process never
leaves a part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from mervcache.errors import StoreFormatError


def load_json(data: bytes, what: str) -> Any:
    """Parse untrusted JSON; broken or too deeply nested input is a `StoreFormatError` that names `what`."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(
            f"{what} is not readable JSON ({type(error).__name__}); restore it from a copy"
        ) from error


def is_json_object(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a parsed JSON value is an object, whose values are anything."""
    return isinstance(value, dict)


def is_json_list(value: Any) -> TypeGuard[list[Any]]:
    """Whether a parsed JSON value is a list, whose items are anything."""
    return isinstance(value, list)


# Made once: json.dumps makes an encoder for each call.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical_json(value: Any) -> str:
    """The one text of a JSON value: sorted keys, no spaces, no NaN."""
    return _CANONICAL.encode(value)


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 of bytes as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def record_digest(record: Any) -> str:
    """SHA-256 of the canonical JSON of a value."""
    return sha256_hex(canonical_json(record).encode())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


RENDERED_FOLDER = "merv-pipeline/rendered"  # in the user's cache: conversations as token ids


def user_cache() -> Path:
    """XDG_CACHE_HOME, else ~/.cache; it may be absent or read-only. Its content can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@contextmanager
def atomic_directory(out: Path) -> Generator[Path, None, None]:
    """An empty folder to fill, which becomes `out` at the end of the block; it is removed if the block fails."""
    temporary = _temporary_name(out)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with this id: in containers every id is 1
    temporary.mkdir(parents=True)
    try:
        yield temporary
        apply_umask(temporary)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_text(path: Path, text: str) -> Path:
    """Write `text` to `path`; an interrupted write leaves the old file, and one that fails leaves nothing else."""
    temporary = _temporary_name(path)
    try:
        temporary.write_text(text)
        return temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary_name(path: Path) -> Path:
    """A name of this process's own, on the same disk."""
    return path.with_name(f".tmp-{path.name}-{os.getpid()}")


def apply_umask(folder: Path) -> None:
    """Give every safetensors file under `folder` the mode of a new file there: 0666 without the umask's bits.

    safetensors writes through a temporary file that only its owner may read, and keeps its mode: a colleague could then
    read a run's settings but not its weights. The umask is read off a new file, because reading it otherwise sets it
    for all threads.
    """
    probe = folder / f".mode-{os.getpid()}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)

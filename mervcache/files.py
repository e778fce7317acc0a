"""Digests: what covers every byte of a store, as hex digits of a sha256.

This user's cache folder on this machine. What lies there can be made again: losing it costs nothing but time.
"""

from __future__ import annotations

import hashlib
import json
import os
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

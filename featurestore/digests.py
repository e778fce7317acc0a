"""Digests: what covers every byte of a store, as hex digits of a sha256."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """64 hex digits over bytes."""
    return hashlib.sha256(data).hexdigest()


def record_digest(record: Any) -> str:
    """64 hex digits over the one text of a JSON value."""
    return sha256_hex(canonical_json(record).encode())


def canonical_json(value: Any) -> str:
    """The one text of a JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)

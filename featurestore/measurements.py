"""Measurements: records in a store's journal of what a machine found about its tokens.

Comes in: a frozen value with a time and rows. Goes out: a journal object with a format version, and later the value
again. No clip id, host or path is in it: it travels with every push. So what is read may be a stranger's, and every
field is checked before it is used. `parity.py` and `distortion.py` say what their records hold.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any, TypeVar

from featurestore.digests import record_digest
from featurestore.errors import StoreError, StoreFormatError
from featurestore.find import Place
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter

FORMAT = 1
MAX_ROWS = 1000  # of a record: dozens of encoders, two kinds, three dtypes
MAX_NUMBER = sys.float_info.max  # JSON knows whole numbers that no float holds
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")

Value = TypeVar("Value")
IsSound = Callable[[str, Any], bool]  # name of a field, value: may it be?


def now() -> str:
    """The time of a record: UTC, 2026-11-22T09:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def to_record(measured: Any, **about: Any) -> dict[str, Any]:
    """What goes to the journal; `about` stands beside the fields of the value."""
    values = asdict(measured)
    return {"format": FORMAT, **about, **values, "rows": list(values["rows"])}


def keep(place: Place, prefix: str, record: Mapping[str, Any]) -> str:
    """Put a record into the store's journal; returns its key. Places that are only read refuse.

    The name holds the digest, so that no record hides another where stores meet.
    """
    return StoreWriter.open(place).journal(f"{prefix}{record_digest(record)[:12]}", record)


def read(store: FeatureStore, prefix: str, parse: Callable[[Mapping[str, Any], str], Value]) -> list[Value]:
    """What `parse` makes of the records, the oldest first; those of another version, or crafted ones, are left out.

    None at all where the journal is damaged: `verify` tells of it, and no tokens depend on it.
    """
    try:
        kept = store.journal(prefix)
    except StoreError:
        return []
    found = []
    for name, record in kept:
        with suppress(StoreFormatError):
            found.append(parse(record, name))
    return sorted(found, key=lambda value: value.time)


def parse_values(kind: type[Value], row_kind: type, values: Mapping[str, Any], is_sound: IsSound, name: str) -> Value:
    """A value of `kind` with rows of `row_kind`: exactly their fields, each of them sound."""
    rows = values.get("rows")
    if not isinstance(rows, list) or len(rows) > MAX_ROWS:
        raise StoreFormatError(f"journal {name} must list at most {MAX_ROWS} rows")
    parsed = tuple(_parse_fields(row_kind, row, is_sound, name) for row in rows)
    return _parse_fields(kind, {**values, "rows": parsed}, is_sound, name)


def _parse_fields(kind: type[Value], values: Any, is_sound: IsSound, name: str) -> Value:
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(kind)}:
        raise StoreFormatError(f"journal {name} does not have the fields of a {kind.__name__}")
    for key, value in values.items():
        if key != "rows" and not is_sound(key, value):
            raise StoreFormatError(f"journal {name}: {key} is {str(value)[:80]!r}")
    return kind(**values)


def is_time(value: Any) -> bool:
    return type(value) is str and bool(_TIME.fullmatch(value))


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER  # no NaN either

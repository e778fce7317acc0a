"""Parity: whether a machine's encoders make the tokens that a store holds, as records in its journal.

`merv-pipeline verify --parity` measures and writes them; the report, the card and training runs show the newest of each
encoder. A record names the canaries that it compared, so one about other canaries (of a store that a union left out)
counts for nothing. No host, path or clip id is in it: it travels with every push.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from featurestore import measurements
from featurestore.errors import StoreFormatError
from featurestore.find import Place
from featurestore.store import FeatureStore

JOURNAL_PREFIX = "parity-"  # of the records' names
NOT_CHECKED = "not checked"
VERDICTS = {  # worst last
    "equal": "equal to the bit",
    "within": "within tolerance",
    "outside": "OUTSIDE TOLERANCE",
}
FRAMES = ("equal", "differ", "not compared")
_PLAIN = re.compile(r"[\w.@+:/ -]{0,100}")
_PLAIN = re.compile(r"[\w.@+:/ -]{0,100}")


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """One encoder's tokens of one kind, made again and compared with the stored ones."""

    encoder: str  # key in the store
    identity: str  # 12 hex digits
    kind: str
    canaries: str  # sha256 of the canaries' file; empty where the store's own clips were encoded again
    clips: int  # compared
    frames: str  # one of FRAMES: do decoding and resizing give the frames that the canaries were made of
    max_abs: float | None  # largest difference of any value; None where a clip's tokens overflow here
    relative: float | None  # of the worst clip: root of summed squares of differences over those of the stored values
    cosine_min: float | None  # smallest cosine between a token and the stored one
    tolerance: float  # the most of `relative`
    cosine_tolerance: float  # the least of `cosine_min`
    verdict: str  # a key of VERDICTS


@dataclass(frozen=True, kw_only=True)
class ParityRecord:
    """One check on one machine."""

    time: str  # UTC, 2026-11-22T09:00:00Z
    snapshot: str
    device: str  # "cpu", "cuda:0 NVIDIA H100"
    machine: str  # "x86_64"
    versions: Mapping[str, str]  # of what decodes, resizes and computes
    rows: tuple[ParityRow, ...]


_TEXTS = {field.name for kind in (ParityRecord, ParityRow) for field in fields(kind) if field.type == "str"}
_CHOICES = {"verdict": tuple(VERDICTS), "frames": FRAMES}


def keep_parity(place: Place, record: ParityRecord) -> str:
    """Put a record into the store's journal; returns its key. Places that are only read refuse."""
    return measurements.keep(place, JOURNAL_PREFIX, measurements.to_record(record))


def read_parity(store: FeatureStore) -> dict[str, dict[str, Any]]:
    """Encoder key -> the newest check against its canaries of today, or {"verdict": "not checked"}.

    A check is {"verdict", "time", "device", "machine", "rows"}, its verdict the worst of its rows.
    """
    found: dict[str, dict[str, Any]] = {key: {"verdict": NOT_CHECKED} for key in store.encoders}
    for record in measurements.read(store, JOURNAL_PREFIX, parse_parity):
        for key, identity in store.encoders.items():
            current = {kind: store.canaries.get(f"{kind}/{identity.group_name}") for kind in ("video", "image")}
            rows = [row for row in record.rows if row.identity == identity.id and row.canaries == current.get(row.kind)]
            if rows:
                about = {"time": record.time, "device": record.device, "machine": record.machine}
                found[key] = {"verdict": worst(row.verdict for row in rows), **about, "rows": [asdict(r) for r in rows]}
    return found


def worst(verdicts: Any) -> str:
    """The verdict of several together."""
    return max(verdicts, key=list(VERDICTS).index)


def parity_words(check: Mapping[str, Any] | None) -> str:
    """A check of `read_parity` in one line."""
    if not check or check.get("verdict") not in VERDICTS:
        return NOT_CHECKED
    figures = [row["relative"] for row in check["rows"] if row["relative"] is not None]
    error = f", relative error {max(figures):.1e}" if figures and check["verdict"] != "equal" else ""
    return f"{VERDICTS[check['verdict']]}{error} on {check['device']}, {check['time'][:10]}"


def parse_parity(record: Mapping[str, Any], name: str) -> ParityRecord:
    """A record that may be a stranger's, every field checked."""
    if record.get("format") != measurements.FORMAT:
        raise StoreFormatError(f"journal {name} is no parity record of this version: update, or remove it")
    values = {key: value for key, value in record.items() if key != "format"}
    return measurements.parse_values(ParityRecord, ParityRow, values, _is_sound, name)


def _is_sound(key: str, value: Any) -> bool:
    if key == "time":
        return measurements.is_time(value)
    if key == "versions":
        return isinstance(value, dict) and all(map(_is_plain, [*value, *value.values()]))
    if key in _CHOICES:
        return value in _CHOICES[key]
    if key in _TEXTS:
        return _is_plain(value)
    return value is None or measurements.is_number(value)


def _is_plain(text: Any) -> bool:
    return type(text) is str and bool(_PLAIN.fullmatch(text))

"""Distortion: what each storage dtype costs and loses on a store's own tokens, as records in its journal.

Two measurements, made by different rooms, become one table: what the tokens take and lose (`merv-pipeline
distortion`), and what a trained run makes of them (`merv-eval distortion`). The newest record of each is shown;
`measurements.py` keeps and reads them, `distortion_table.py` shows them to people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from featurestore import measurements
from featurestore.errors import StoreFormatError
from featurestore.find import Place
from featurestore.identity import STORAGE_DTYPES
from featurestore.store import FeatureStore

JOURNAL_PREFIX = "distortion-"  # of the records' names
STORED = "as stored"  # the dtype of a run's own loss
MODALITIES = {"video", "image", "text"}
MAX_TEXT = 200  # characters


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One encoder's tokens of one kind of clip, in one storage dtype; None where no clip fits the dtype."""

    encoder: str  # key in the store
    identity: str  # of the store's own tokens
    weights: str  # "pretrained" or "random:SEED"
    kind: str
    dtype: str
    is_stored: bool  # the dtype that the store has
    clips: int  # measured
    refused: int  # clips whose tokens overflow the dtype
    bytes_per_clip: float | None  # on disk, compressed, with index and sidecars
    clips_s: float | None  # read and decoded, files in the page cache
    mb_s: float | None  # of the same reading, in stored bytes
    of_raw: float | None  # rate of the same reading over that of reading the same files whole
    max_abs: float | None  # largest difference of any value
    relative_rms: float | None  # root of the summed squares of differences over those of the reference
    cosine_min: float | None  # smallest cosine between a token and its reference


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """A run's validation loss on tokens that went through one storage dtype; None where some clip overflows it."""

    dtype: str  # or `STORED`
    loss: float | None  # mean over all supervised tokens of the held-out samples
    by_modality: Mapping[str, float]  # "video", "image", "text"


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """What `merv-pipeline distortion` measured."""

    time: str  # UTC, 2026-11-22T09:00:00Z
    snapshot: str
    reference: str  # what errors are against: a key of REFERENCES
    sample: int  # clips of each encoder and kind, at most
    seed: int
    rows: tuple[TokenRow, ...]


@dataclass(frozen=True, kw_only=True)
class LossRecord:
    """What `merv-eval distortion` measured."""

    time: str
    snapshot: str
    run: str  # name of the run's folder
    step: int
    split: str
    samples: int  # of the split
    weights: str  # labels of the encoders' weights, such as "random:0"
    rows: tuple[LossRow, ...]  # `STORED` first


@dataclass(frozen=True, kw_only=True)
class Distortion:
    """The newest record of each measurement."""

    tokens: TokenRecord | None = None
    loss: LossRecord | None = None


REFERENCES: dict[str, str] = {
    "store": "Errors are against what the store holds: its own dtype has none by construction (and, for uint8, what "
    "rounding twice costs). What that dtype rounded at extraction is not in the table; by the format it is at most "
    "2^-11 of a value for float16, 2^-8 for bfloat16, and half a step of (max - min) / 255 of clip and channel for "
    "uint8.",
    "encoders": "Errors are against the encoders' own float32, computed again from the media by the machine that "
    "measured.",
}
_RECORDS: dict[str, tuple[type, type]] = {"tokens": (TokenRecord, TokenRow), "loss": (LossRecord, LossRow)}
_TEXTS = {"snapshot", "run", "split", "weights", "encoder", "identity", "kind"}
_CHOICES = {"reference": tuple(REFERENCES), "dtype": (*STORAGE_DTYPES, STORED)}


def to_record(measured: TokenRecord | LossRecord) -> dict[str, Any]:
    """What goes to the journal."""
    measure = next(name for name, (kind, _) in _RECORDS.items() if isinstance(measured, kind))
    return measurements.to_record(measured, measure=measure)


def keep_record(place: Place, record: Mapping[str, Any]) -> str:
    """Put a record into the store's journal; returns its key. Places that are only read refuse."""
    return measurements.keep(place, f"{JOURNAL_PREFIX}{record['measure']}-", record)


def read_distortion(store: FeatureStore) -> Distortion:
    """The newest records about what this store holds; encoders that it lacks (a partial pull) are left out.

    Records of another version, or crafted ones, are passed over: no push or report fails for a measurement.
    """
    newest = {type(record): record for record in measurements.read(store, JOURNAL_PREFIX, parse_record)}
    tokens, stored = newest.get(TokenRecord), {identity.id for identity in store.encoders.values()}
    if tokens is not None:
        tokens = replace(tokens, rows=tuple(row for row in tokens.rows if row.identity in stored))
    return Distortion(tokens=tokens, loss=newest.get(LossRecord))


def parse_record(record: Mapping[str, Any], name: str) -> TokenRecord | LossRecord:
    """A record that may be a stranger's, every field checked."""
    measure = record.get("measure")
    if record.get("format") != measurements.FORMAT or measure not in tuple(_RECORDS):
        raise StoreFormatError(f"journal {name} is no distortion record of this version: update, or remove it")
    values = {key: value for key, value in record.items() if key not in ("format", "measure")}
    return measurements.parse_values(*_RECORDS[measure], values, _is_sound, name)


def _is_sound(key: str, value: Any) -> bool:
    if key == "time":
        return measurements.is_time(value)
    if key == "by_modality":
        return isinstance(value, dict) and set(value) <= MODALITIES and all(map(measurements.is_number, value.values()))
    if key in _CHOICES:  # tuples: what cannot be hashed is not in them
        return value in _CHOICES[key]
    if key in _TEXTS:
        return isinstance(value, str) and len(value) <= MAX_TEXT
    return value is None or isinstance(value, bool) or measurements.is_number(value)

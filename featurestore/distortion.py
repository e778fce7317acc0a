"""Distortion: what each storage dtype costs and loses on a store's own tokens, as records in its journal.

Two measurements, made by different rooms, become one table: what the tokens take and lose (`merv-pipeline
distortion`), and what a trained run makes of them (`merv-eval distortion`). Each record is a journal object with a
version; the newest of each measurement is shown. Records hold no clip id, host or path, so they travel with the store
on every push.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, TypeVar

from featurestore.digests import record_digest
from featurestore.errors import StoreError, StoreFormatError
from featurestore.find import Place
from featurestore.identity import STORAGE_DTYPES
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter

JOURNAL_PREFIX = "distortion-"  # of the records' names
MAX_ROWS = 1000  # of a record: dozens of encoders, two kinds, three dtypes
MAX_NUMBER = sys.float_info.max  # JSON knows whole numbers that no float holds
SEEDED = "Tokens of seeded random weights, not trained ones"
STORED = "as stored"  # the dtype of a run's own loss
MODALITIES = {"video", "image", "text"}
_FORMAT = 1
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")

Row = TypeVar("Row")
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # columns, and rows of texts


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
_TEXTS = {"time", "snapshot", "reference", "run", "split", "weights", "encoder", "identity", "kind", "dtype"}


def now() -> str:
    """The time of a record."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def to_record(measured: TokenRecord | LossRecord) -> dict[str, Any]:
    """What goes to the journal."""
    measure = next(name for name, (kind, _) in _RECORDS.items() if isinstance(measured, kind))
    return {"format": _FORMAT, "measure": measure, **asdict(measured), "rows": [asdict(row) for row in measured.rows]}


def journal_name(record: Mapping[str, Any]) -> str:
    """A name of its own for every record, so that none hides another where stores meet."""
    return f"{JOURNAL_PREFIX}{record['measure']}-{record_digest(record)[:12]}"


def keep_record(place: Place, record: Mapping[str, Any]) -> str:
    """Put a record into the store's journal; returns its key. Places that are only read refuse."""
    return StoreWriter.open(place).journal(journal_name(record), record)


def read_distortion(store: FeatureStore) -> Distortion:
    """The newest records about what this store holds; encoders that it lacks (a partial pull) are left out.

    Records of another version, or crafted ones, are passed over: no push or report fails for a measurement.
    """
    newest: dict[str, TokenRecord | LossRecord] = {}
    try:
        kept = store.journal(JOURNAL_PREFIX)
    except StoreError:  # damaged: `verify` tells of it, and no tokens depend on it
        return Distortion()
    for name, record in kept:
        try:
            measure, parsed = parse_record(record, name)
        except StoreFormatError:
            continue
        if measure not in newest or newest[measure].time <= parsed.time:
            newest[measure] = parsed
    tokens, stored = newest.get("tokens"), {identity.id for identity in store.encoders.values()}
    if isinstance(tokens, TokenRecord):
        kept = tuple(row for row in tokens.rows if row.identity in stored)
        newest["tokens"] = TokenRecord(**{**vars(tokens), "rows": kept})
    return Distortion(**newest)


def parse_record(record: Mapping[str, Any], name: str) -> tuple[str, TokenRecord | LossRecord]:
    """A record that may be a stranger's: (measure, record), every field checked."""
    measure = record.get("measure")
    if record.get("format") != _FORMAT or not _is_one_of(measure, _RECORDS):
        raise StoreFormatError(f"journal {name} is no distortion record of this version: update, or remove it")
    kind, row_kind = _RECORDS[measure]
    rows = record.get("rows")
    if not isinstance(rows, list) or len(rows) > MAX_ROWS:
        raise StoreFormatError(f"journal {name} must list at most {MAX_ROWS} rows")
    parsed = tuple(_parse(row_kind, row, name) for row in rows)
    body = {key: value for key, value in record.items() if key not in ("format", "measure")}
    return measure, _parse(kind, body | {"rows": parsed}, name)


def _parse(kind: type[Row], values: Any, name: str) -> Row:
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(kind)}:
        raise StoreFormatError(f"journal {name} does not have the fields of a {kind.__name__}")
    for key, value in values.items():
        if key not in ("rows", "by_modality") and not _is_sound(key, value):
            raise StoreFormatError(f"journal {name}: {key} is {str(value)[:80]!r}")
    modality = values.get("by_modality", {})
    if not isinstance(modality, dict) or not set(modality) <= MODALITIES or not all(map(_is_number, modality.values())):
        raise StoreFormatError(f"journal {name}: by_modality is {str(modality)[:80]!r}")
    return kind(**values)


def _is_sound(key: str, value: Any) -> bool:
    if key == "time":
        return isinstance(value, str) and bool(_TIME.fullmatch(value))
    if key == "reference":
        return _is_one_of(value, REFERENCES)
    if key == "dtype":
        return value in (*STORAGE_DTYPES, STORED)
    if key in _TEXTS:
        return isinstance(value, str) and len(value) <= 200
    return value is None or isinstance(value, bool) or _is_number(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER  # no NaN either


def _is_one_of(value: Any, names: Container[str]) -> bool:
    return type(value) is str and value in names


def token_table(record: TokenRecord) -> Table:
    """For the console, the report and the card: one line per encoder, kind and dtype."""
    columns = ("encoder", "clips", "dtype", "bytes/clip", "clips/s", "MB/s", "of raw read")
    columns += ("max abs error", "relative RMS", "min cosine")
    rows = []
    for row in record.rows:
        label = f"{row.clips} {row.kind}" + (f", {row.refused} overflow" if row.refused else "")
        dtype = f"{row.dtype} (stored)" if row.is_stored else row.dtype
        rows.append(
            (
                row.encoder,
                label,
                dtype,
                _number(row.bytes_per_clip, ",.0f"),
                _number(row.clips_s, ",.0f"),
                _number(row.mb_s, ",.0f"),
                _number(row.of_raw, ".2f"),
                _number(row.max_abs, ".3g"),
                _number(row.relative_rms, ".2e"),
                _number(row.cosine_min, ".6f"),
            )
        )
    return columns, rows


def loss_table(record: LossRecord) -> Table:
    """One line per dtype, with the change from what is stored."""
    names = list(dict.fromkeys(name for row in record.rows for name in row.by_modality))
    own = next((row.loss for row in record.rows if row.dtype == STORED), None)
    rows = []
    for row in record.rows:
        change = None if row.loss is None or own is None else row.loss - own
        texts = (_number(row.loss, ".5f"), _number(change, "+.5f"))
        rows.append((row.dtype, *texts, *(_number(row.by_modality.get(name), ".5f") for name in names)))
    return ("dtype", "loss", "change", *names), rows


def token_notes(record: TokenRecord) -> list[str]:
    """What the table is of, in sentences."""
    seeded = sorted({row.weights for row in record.rows if row.weights.startswith("random")})
    label = f" {SEEDED} ({', '.join(seeded)}): errors of trained encoders differ." if seeded else ""
    return [
        f"Measured {record.time} at snapshot {record.snapshot}, on at most {record.sample} clips of each encoder and "
        f"kind (seed {record.seed}), read from files in the page cache; rates are of the machine that measured.{label}",
        REFERENCES[record.reference],
    ]


def loss_notes(record: LossRecord) -> list[str]:
    """What the losses are of, in a sentence."""
    label = f" {SEEDED} ({record.weights})." if "random" in record.weights else ""
    return [
        f"Measured {record.time} with the run {record.run} at step {record.step}, on {record.samples} samples of split "
        f"{record.split} of snapshot {record.snapshot}.{label}"
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

"""Measurements of a store's tokens, kept in its journal: parity and distortion.

Parity: do a machine's encoders make the tokens that the store holds (`merv-pipeline verify --parity`). Distortion: what
each storage dtype takes and loses (`merv-pipeline distortion`), and what a trained run makes of it (`merv-eval
distortion`). Records travel with every push, so they hold no clip id, host or path, and every field that is read is
checked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any

from featurestore.locate import Place
from featurestore.storage_dtypes import STORAGE_DTYPES
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter
from mervcache.errors import StoreError, StoreFormatError
from mervcache.files import is_json_list, is_json_object, record_digest

FORMAT = 1
PARITY_PREFIX, DISTORTION_PREFIX = "parity-", "distortion-"  # of the journal's names
NOT_CHECKED = "not checked"
VERDICTS = {  # worst last
    "equal": "bit-identical",
    "within": "within tolerance",
    "outside": "OUTSIDE TOLERANCE",
}
FRAMES = ("equal", "differ", "not compared")
STORED = "as stored"  # the dtype of a run's own loss
MODALITIES = ("video", "image", "text")
SEEDED = "Tokens of seeded random weights, not trained ones"
REFERENCES: dict[str, str] = {
    "store": "Errors are against what the store holds: its own dtype has none by construction (and, for an affine "
    "dtype, what rounding twice costs). What that dtype rounded at extraction is not in the table; by the format it is "
    f"at most {', '.join(f'{entry.error} for {name}' for name, entry in STORAGE_DTYPES.items())}.",
    "encoders": "Errors are against the encoders' own float32, computed again from the media by the machine that "
    "measured.",
}
MAX_ROWS = 1000  # of a record: dozens of encoders, two kinds, three dtypes
MAX_TEXT = 200  # characters
MAX_NUMBER = sys.float_info.max  # JSON knows whole numbers that no float holds
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")
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


Record = ParityRecord | TokenRecord | LossRecord
# `measure` of a record, which those of parity lack -> (record, row, prefix of the journal's names)
RECORDS: dict[str | None, tuple[type, type, str]] = {
    None: (ParityRecord, ParityRow, PARITY_PREFIX),
    "tokens": (TokenRecord, TokenRow, f"{DISTORTION_PREFIX}tokens-"),
    "loss": (LossRecord, LossRow, f"{DISTORTION_PREFIX}loss-"),
}


def now() -> str:
    """The time of a record: UTC, 2026-11-22T09:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def to_record(measured: Record) -> dict[str, Any]:
    """The journal's JSON of a measurement."""
    measure = next(measure for measure, (kind, *_) in RECORDS.items() if isinstance(measured, kind))
    values = asdict(measured)
    about = {} if measure is None else {"measure": measure}
    return {"format": FORMAT, **about, **values, "rows": list(values["rows"])}


def keep_record(place: Place, measured: Record | Mapping[str, Any]) -> str:
    """Put a measurement, or its `to_record`, into the store's journal; returns its key. Read-only places refuse.

    The name holds the digest, so that no record hides another where stores are merged.
    """
    record = measured if isinstance(measured, Mapping) else to_record(measured)
    prefix = RECORDS[record.get("measure")][2]
    return StoreWriter.open(place).journal(f"{prefix}{record_digest(record)[:12]}", record)


def read_records(store: FeatureStore, prefix: str) -> list[Any]:
    """Measurements whose names start so, oldest first; those of another version, or crafted ones, are skipped.

    None at all where the journal is damaged: `verify` reports that, and no tokens depend on it.
    """
    try:
        journal = store.journal(prefix)
    except StoreError:
        return []
    records: list[Any] = []
    for name, record in journal:
        with suppress(StoreFormatError):
            records.append(parse_record(record, name))
    return sorted(records, key=lambda record: record.time)


def parse_record(record: Mapping[str, Any], name: str) -> Any:
    """The measurement of an untrusted record: exactly the fields of its type, each of them checked."""
    measure = record.get("measure")
    if record.get("format") != FORMAT or measure not in tuple(RECORDS):  # a tuple: it may not be hashable
        raise StoreFormatError(f"journal {name} is no measurement of this version: update, or remove it")
    kind, row_kind, _ = RECORDS[measure]
    values = {key: value for key, value in record.items() if key not in ("format", "measure")}
    rows = values.get("rows")
    if not is_json_list(rows) or len(rows) > MAX_ROWS:
        raise StoreFormatError(f"journal {name} must list at most {MAX_ROWS} rows")
    rows = tuple(_parse_fields(row_kind, row, name) for row in rows)
    return _parse_fields(kind, values | {"rows": rows}, name)


def _parse_fields(kind: type[Any], values: Any, name: str) -> Any:
    types = {field.name: str(field.type) for field in fields(kind)}
    if not is_json_object(values) or set(values) != set(types):
        raise StoreFormatError(f"journal {name} does not have the fields of a {kind.__name__}")
    for key, value in values.items():
        if not (_OF_FIELD.get(key) or _OF_TYPE[types[key]])(value):
            raise StoreFormatError(f"journal {name}: {key} is {str(value)[:80]!r}")
    return kind(**values)


def is_time(value: Any) -> bool:
    return type(value) is str and bool(_TIME.fullmatch(value))


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER  # no NaN either


def _is_plain(value: Any) -> bool:
    return type(value) is str and bool(_PLAIN.fullmatch(value))


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= MAX_TEXT


def _is_versions(value: Any) -> bool:
    return is_json_object(value) and all(map(_is_plain, [*value, *value.values()]))


def _is_losses(value: Any) -> bool:
    return is_json_object(value) and set(value) <= set(MODALITIES) and all(map(is_number, value.values()))


_OF_TYPE: dict[str, Callable[[Any], bool]] = {  # by annotation
    "str": _is_plain,
    "bool": lambda value: type(value) is bool,
    "int": lambda value: type(value) is int and is_number(value),
    "float": is_number,
    "float | None": lambda value: value is None or is_number(value),
}
_OF_FIELD: dict[str, Callable[[Any], bool]] = {  # not by type alone; tuples, as values may be unhashable
    "rows": lambda value: True,  # parsed before
    "time": is_time,
    "verdict": lambda value: value in tuple(VERDICTS),
    "frames": lambda value: value in FRAMES,
    "reference": lambda value: value in tuple(REFERENCES),
    "dtype": lambda value: value in (*STORAGE_DTYPES, STORED),
    "versions": _is_versions,
    "by_modality": _is_losses,
    "run": _is_text,  # a folder's name
    "split": _is_text,
    "weights": _is_text,
}


def read_parity(store: FeatureStore) -> dict[str, dict[str, Any]]:
    """Encoder key -> the newest check against its present reference clips, or {"verdict": "not checked"}.

    A check is {"verdict", "time", "device", "machine", "rows"}, its verdict the worst of its rows.
    """
    checks: dict[str, dict[str, Any]] = {key: {"verdict": NOT_CHECKED} for key in store.encoders}
    for record in read_records(store, PARITY_PREFIX):
        for key, identity in store.encoders.items():
            current = {kind: store.canaries.get(f"{kind}/{identity.group_name}") for kind in ("video", "image")}
            rows = [row for row in record.rows if row.identity == identity.id and row.canaries == current.get(row.kind)]
            if rows:
                about = {"time": record.time, "device": record.device, "machine": record.machine}
                checks[key] = {
                    "verdict": worst(row.verdict for row in rows),
                    **about,
                    "rows": [asdict(row) for row in rows],
                }
    return checks


def worst(verdicts: Iterable[str]) -> str:
    """The verdict of several together."""
    return max(verdicts, key=list(VERDICTS).index)


def parity_words(check: Mapping[str, Any] | None) -> str:
    """A check of `read_parity` in one line."""
    if not check or check.get("verdict") not in VERDICTS:
        return NOT_CHECKED
    figures = [row["relative"] for row in check["rows"] if row["relative"] is not None]
    error = f", relative error {max(figures):.1e}" if figures and check["verdict"] != "equal" else ""
    return f"{VERDICTS[check['verdict']]}{error} on {check['device']}, {check['time'][:10]}"


@dataclass(frozen=True, kw_only=True)
class Distortion:
    """The newest record of each measurement."""

    tokens: TokenRecord | None = None
    loss: LossRecord | None = None


def read_distortion(store: FeatureStore) -> Distortion:
    """The newest records about what this store holds; encoders that it lacks (a partial pull) are left out."""
    newest: dict[type[Any], Any] = {type(record): record for record in read_records(store, DISTORTION_PREFIX)}
    tokens, stored = newest.get(TokenRecord), {identity.id for identity in store.encoders.values()}
    if tokens is not None:
        tokens = replace(tokens, rows=tuple(row for row in tokens.rows if row.identity in stored))
    return Distortion(tokens=tokens, loss=newest.get(LossRecord))


Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # columns, and rows of texts


def token_table(record: TokenRecord) -> Table:
    """One line per encoder, kind and dtype."""
    columns = ("encoder", "clips", "dtype", "bytes/clip", "clips/s", "MB/s", "of raw read")
    columns += ("max abs error", "relative RMS", "min cosine")
    rows: list[tuple[str, ...]] = []
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
    rows: list[tuple[str, ...]] = []
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

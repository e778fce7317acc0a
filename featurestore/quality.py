"""Parity: whether a machine's encoders make the tokens that a store holds, as records in its journal.

`merv-pipeline verify --parity` measures and writes them; the report, the card and training runs show the newest of each
encoder. A record names the canaries that it compared, so one about other canaries (of a store that a union left out)
counts for nothing. No host, path or clip id is in it: it travels with every push.

Distortion: what each storage dtype costs and loses on a store's own tokens, as records in its journal.

Two measurements, made by different rooms, become one table: what the tokens take and lose (`merv-pipeline
distortion`), and what a trained run makes of them (`merv-eval distortion`). The newest record of each is shown;
`measurements.py` keeps and reads them, `distortion_table.py` shows them to people.

Distortion as people read it: tables and notes: on the console, in the report and on the card.

Measurements: records in a store's journal of what a machine found about its tokens.

Comes in: a frozen value with a time and rows. Goes out: a journal object with a format version, and later the value
again. No clip id, host or path is in it: it travels with every push. So what is read may be a stranger's, and every
field is checked before it is used. `parity.py` and `distortion.py` say what their records hold.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from featurestore.locate import Place
from featurestore.storage_dtypes import STORAGE_DTYPES
from featurestore.store import FeatureStore
from featurestore.writer import StoreWriter
from mervcache.errors import StoreError, StoreFormatError
from mervcache.files import record_digest

FORMAT = 1
MAX_ROWS = 1000  # of a record: dozens of encoders, two kinds, three dtypes
MAX_NUMBER = sys.float_info.max  # JSON knows whole numbers that no float holds
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")

Value = TypeVar("Value")
IsSound = Callable[[str, Any], bool]  # name of a field, value: may it be?


def now() -> str:
    """The time of a record: UTC, 2026-11-22T09:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def measurement_record(measured: Any, **about: Any) -> dict[str, Any]:
    """What goes to the journal; `about` stands beside the fields of the value."""
    values = asdict(measured)
    return {"format": FORMAT, **about, **values, "rows": list(values["rows"])}


def keep_measurement(place: Place, prefix: str, record: Mapping[str, Any]) -> str:
    """Put a record into the store's journal; returns its key. Places that are only read refuse.

    The name holds the digest, so that no record hides another where stores meet.
    """
    return StoreWriter.open(place).journal(f"{prefix}{record_digest(record)[:12]}", record)


def read_measurements(
    store: FeatureStore, prefix: str, parse: Callable[[Mapping[str, Any], str], Value]
) -> list[Value]:
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


PARITY_PREFIX = "parity-"  # of the records' names
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


_PARITY_TEXTS = {field.name for kind in (ParityRecord, ParityRow) for field in fields(kind) if field.type == "str"}
_PARITY_CHOICES = {"verdict": tuple(VERDICTS), "frames": FRAMES}


def keep_parity(place: Place, record: ParityRecord) -> str:
    """Put a record into the store's journal; returns its key. Places that are only read refuse."""
    return keep_measurement(place, PARITY_PREFIX, measurement_record(record))


def read_parity(store: FeatureStore) -> dict[str, dict[str, Any]]:
    """Encoder key -> the newest check against its canaries of today, or {"verdict": "not checked"}.

    A check is {"verdict", "time", "device", "machine", "rows"}, its verdict the worst of its rows.
    """
    found: dict[str, dict[str, Any]] = {key: {"verdict": NOT_CHECKED} for key in store.encoders}
    for record in read_measurements(store, PARITY_PREFIX, parse_parity):
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
    if record.get("format") != FORMAT:
        raise StoreFormatError(f"journal {name} is no parity record of this version: update, or remove it")
    values = {key: value for key, value in record.items() if key != "format"}
    return parse_values(ParityRecord, ParityRow, values, _is_valid_parity, name)


def _is_valid_parity(key: str, value: Any) -> bool:
    if key == "time":
        return is_time(value)
    if key == "versions":
        return isinstance(value, dict) and all(map(_is_plain, [*value, *value.values()]))
    if key in _PARITY_CHOICES:
        return value in _PARITY_CHOICES[key]
    if key in _PARITY_TEXTS:
        return _is_plain(value)
    return value is None or is_number(value)


def _is_plain(text: Any) -> bool:
    return type(text) is str and bool(_PLAIN.fullmatch(text))


DISTORTION_PREFIX = "distortion-"  # of the records' names
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
    "store": "Errors are against what the store holds: its own dtype has none by construction (and, for an affine "
    "dtype, what rounding twice costs). What that dtype rounded at extraction is not in the table; by the format it is "
    f"at most {', '.join(f'{entry.error} for {name}' for name, entry in STORAGE_DTYPES.items())}.",
    "encoders": "Errors are against the encoders' own float32, computed again from the media by the machine that "
    "measured.",
}
_RECORDS: dict[str, tuple[type, type]] = {"tokens": (TokenRecord, TokenRow), "loss": (LossRecord, LossRow)}
_DISTORTION_TEXTS = {"snapshot", "run", "split", "weights", "encoder", "identity", "kind"}


def distortion_record(measured: TokenRecord | LossRecord) -> dict[str, Any]:
    """What goes to the journal."""
    measure = next(name for name, (kind, _) in _RECORDS.items() if isinstance(measured, kind))
    return measurement_record(measured, measure=measure)


def keep_record(place: Place, record: Mapping[str, Any]) -> str:
    """Put a record into the store's journal; returns its key. Places that are only read refuse."""
    return keep_measurement(place, f"{DISTORTION_PREFIX}{record['measure']}-", record)


def read_distortion(store: FeatureStore) -> Distortion:
    """The newest records about what this store holds; encoders that it lacks (a partial pull) are left out.

    Records of another version, or crafted ones, are passed over: no push or report fails for a measurement.
    """
    newest = {type(record): record for record in read_measurements(store, DISTORTION_PREFIX, parse_record)}
    tokens, stored = newest.get(TokenRecord), {identity.id for identity in store.encoders.values()}
    if tokens is not None:
        tokens = replace(tokens, rows=tuple(row for row in tokens.rows if row.identity in stored))
    return Distortion(tokens=tokens, loss=newest.get(LossRecord))


def parse_record(record: Mapping[str, Any], name: str) -> TokenRecord | LossRecord:
    """A record that may be a stranger's, every field checked."""
    measure = record.get("measure")
    if record.get("format") != FORMAT or measure not in tuple(_RECORDS):
        raise StoreFormatError(f"journal {name} is no distortion record of this version: update, or remove it")
    values = {key: value for key, value in record.items() if key not in ("format", "measure")}
    return parse_values(*_RECORDS[measure], values, _is_valid_distortion, name)


def _is_valid_distortion(key: str, value: Any) -> bool:
    if key == "time":
        return is_time(value)
    if key == "by_modality":
        return isinstance(value, dict) and set(value) <= MODALITIES and all(map(is_number, value.values()))
    if key == "reference":
        return value in tuple(REFERENCES)  # tuples: what cannot be hashed is not in them
    if key == "dtype":
        return value in (*STORAGE_DTYPES, STORED)
    if key in _DISTORTION_TEXTS:
        return isinstance(value, str) and len(value) <= MAX_TEXT
    return value is None or isinstance(value, bool) or is_number(value)


SEEDED = "Tokens of seeded random weights, not trained ones"
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # columns, and rows of texts


def token_table(record: TokenRecord) -> Table:
    """One line per encoder, kind and dtype."""
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

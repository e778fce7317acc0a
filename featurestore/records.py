"""Receipts: the record that a block is committed, written last and from the bytes on disk.

A receipt is canonical JSON without times, hosts or measured values: the same block gives the same receipt. Fields of
rows are columns, so that a receipt stays small. What is read back may be a stranger's: `parse` checks every type,
length and value before anything is used.

Tombstones: clips removed on request (a licence, a consent withdrawn), as data that travels with the store.

A tombstone is a JSON record with its own digest, put once. From then on readers list and read none of its clips, at any
snapshot, and nothing computes them again; `erase.py` takes their tokens and conversations off the disk. Clip ids stay
in the clip parts (rows are never given out twice) and in the record, which must know whom to leave out.

Journal records: provenance that must not change bytes (times, hosts, versions, rates); one per run and worker.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from featurestore.layout import (
    ARRAYS,
    JOURNAL,
    MAX_BLOCK_ROWS,
    TOMBSTONES,
    journal_key,
    journal_names,
    receipt_key,
    slot_of,
    tombstone_key,
    tombstone_names,
)
from featurestore.objects.base import Objects, get_bounded, put_if_absent
from mervcache.errors import StoreDamagedError, StoreError, StoreFormatError, UserError
from mervcache.files import canonical_json, load_json, record_digest

State = Literal["ok", "failed", "skipped", "empty"]
STATES: tuple[State, ...] = ("ok", "failed", "skipped", "empty")
SCOPES: tuple[str, ...] = ("clip", "encoder")  # who is to blame: the media, or one encoder on it
LOST = "lost in an interrupted attempt"
DIGEST_LENGTH = 32  # hex digits
MAX_REASON_LENGTH = 500  # characters
MAX_ROW_BYTES = 4096  # of one row in a receipt: a reason of 500 characters, all escaped, and three digests
MAX_NUMBER = 1_000_000  # times that a block was replaced

_DIGEST = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RECEIPT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RowOutcome:
    """What became of one row."""

    state: State
    scope: str | None = None  # of a failure: "clip" or "encoder"
    reason: str | None = None  # of a failure: no measured values, hosts or absolute paths
    digest: str | None = None  # of the stored arrays, where ok
    media_sha256: str | None = None
    decoder: str | None = None  # what made the pixels

    def __post_init__(self) -> None:
        problem = None
        if self.state not in STATES:
            problem = f"state {self.state!r}"
        elif (self.state == "failed") != (self.reason is not None) or (self.state == "failed") != (
            self.scope is not None
        ):
            problem = f"a reason and scope that do not fit state {self.state!r}"
        elif (self.state == "ok") != (self.digest is not None):
            problem = f"a digest that does not fit state {self.state!r}"
        elif self.scope is not None and self.scope not in SCOPES:
            problem = f"scope {self.scope!r}"
        elif self.reason is not None and not 0 < len(self.reason) <= MAX_REASON_LENGTH:
            problem = f"a reason of {len(self.reason)} characters"
        elif self.digest is not None and not _DIGEST.fullmatch(self.digest):
            problem = "a malformed digest"
        elif self.media_sha256 is not None and not _SHA256.fullmatch(self.media_sha256):
            problem = "a malformed media sha256"
        elif self.decoder is not None and not 0 < len(self.decoder) <= 100:
            problem = "a malformed decoder name"
        if problem:
            raise StoreFormatError(f"a receipt's row has {problem}")


COLUMNS: tuple[str, ...] = tuple(RowOutcome.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """One committed block of one encoder."""

    kind: str
    group: str  # ENCODER-IDENTITY12
    block: int
    rows: tuple[RowOutcome, ...]  # one per row of the block
    shards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # array -> {"sha256": hex, "bytes": int}
    number: int = 1  # counts the receipts of this block: only `repair` and `tombstone` replace one
    replaces: str | None = None  # digest of the receipt before, where number > 1

    @cached_property
    def digest(self) -> str:
        """64 hex digits over everything else in the receipt."""
        return record_digest(self._content())

    @cached_property
    def counts(self) -> dict[str, int]:
        """Rows by state."""
        found = Counter(row.state for row in self.rows)
        return {state: found[state] for state in STATES}

    @property
    def stored_bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards.values())

    def first_row(self) -> int:
        return self.block * len(self.rows)

    def outcome(self, row: int) -> RowOutcome:
        """What became of a row of the block; rows count as in the store."""
        return self.rows[slot_of(row, len(self.rows))]

    def to_bytes(self) -> bytes:
        return (canonical_json(self._content() | {"digest": self.digest}) + "\n").encode()

    def _content(self) -> dict[str, Any]:
        history = {"number": self.number, "replaces": self.replaces} if self.number > 1 else {}
        return history | {
            "format": _RECEIPT_VERSION,
            "kind": self.kind,
            "group": self.group,
            "block": self.block,
            "rows": {name: [getattr(row, name) for row in self.rows] for name in COLUMNS},
            "shards": {name: dict(shard) for name, shard in self.shards.items()},
        }

    @classmethod
    def parse(cls, data: bytes, *, kind: str, group: str, block: int, block_rows: int) -> Receipt:
        """A receipt from its file; raises unless it is exactly the receipt of that block, whole and undamaged."""
        what = f"receipt {kind}/{group} block {block}"
        if len(data) > max_receipt_bytes(block_rows):
            raise StoreFormatError(f"{what} has {len(data)} bytes, more than any receipt needs")
        record = load_json(data, what)
        receipt = cls(
            kind=kind,
            group=group,
            block=block,
            rows=_parse_rows(record, what, block_rows),
            shards=_parse_shards(record, what),
            **_parse_history(record, what),
        )
        if not _is_canonical(record, receipt, data):
            raise StoreDamagedError(f"{what} does not match its own digest; run `merv-pipeline verify`")
        vars(receipt)["digest"] = record["digest"]  # just computed: the property need not do it again
        return receipt


def _is_canonical(record: dict[str, Any], receipt: Receipt, data: bytes) -> bool:
    """Are these the bytes that the writer makes of the receipt? It covers every field, the digest, even white space.

    The record is what was checked, so it is written once more instead of the receipt: a snapshot of a million clips
    reads 15,000 of them. Its digest is over the same text without the digest.
    """
    digest = record.get("digest")
    told = [record.get(name) for name in ("format", "kind", "group", "block")]
    expected = [_RECEIPT_VERSION, receipt.kind, receipt.group, receipt.block]
    names = {"format", "kind", "group", "block", "rows", "shards", "digest"}
    if receipt.number > 1:
        names |= {"number", "replaces"}
    if set(record) != names or not isinstance(digest, str) or canonical_json(told) != canonical_json(expected):
        return False
    text = canonical_json(record)
    # Quotes within a text are escaped, so this is the field itself and nothing that a reason says.
    body = text.replace(f'"digest":"{digest}",', "", 1)
    return hashlib.sha256(body.encode()).hexdigest() == digest and (text + "\n").encode() == data


def _parse_rows(record: Any, what: str, block_rows: int) -> tuple[RowOutcome, ...]:
    columns = record.get("rows") if isinstance(record, dict) else None
    if isinstance(record, dict) and record.get("format") != _RECEIPT_VERSION:
        raise StoreFormatError(
            f"{what} has format {record.get('format')!r}, this version reads {_RECEIPT_VERSION}; update"
        )
    if not isinstance(columns, dict) or set(columns) != set(COLUMNS):
        raise StoreFormatError(f"{what} lacks its columns {', '.join(COLUMNS)}")
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != min(block_rows, MAX_BLOCK_ROWS):
            raise StoreFormatError(f"{what}: column {name} must list {block_rows} rows")
        if not set(map(type, values)) <= {str, type(None)}:
            raise StoreFormatError(f"{what}: column {name} must hold text or null")
    ordered = [columns[name] for name in COLUMNS]
    return tuple(_row(*values) for values in zip(*ordered, strict=True))


def _row(state: str, scope: str | None, reason: str | None, digest: str | None, media: str | None, decoder: str | None):
    """Values in the order of `COLUMNS`."""
    return RowOutcome(state=state, scope=scope, reason=reason, digest=digest, media_sha256=media, decoder=decoder)


def _parse_shards(record: dict, what: str) -> dict[str, dict[str, Any]]:
    shards = record.get("shards")
    if not isinstance(shards, dict) or not set(shards) <= set(ARRAYS) or "tokens" not in shards:
        raise StoreFormatError(f"{what} must list the shards of its arrays ({', '.join(ARRAYS)})")
    for name, shard in shards.items():
        if not isinstance(shard, dict) or set(shard) != {"sha256", "bytes"}:
            raise StoreFormatError(f"{what}: shard {name} must have sha256 and bytes")
        size = shard["bytes"]
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 1 << 48:
            raise StoreFormatError(f"{what}: shard {name} has size {size!r}")
        if not isinstance(shard["sha256"], str) or not _SHA256.fullmatch(shard["sha256"]):
            raise StoreFormatError(f"{what}: shard {name} has a malformed sha256")
    return shards


def _parse_history(record: dict, what: str) -> dict[str, Any]:
    number, replaces = record.get("number", 1), record.get("replaces")
    if type(number) is not int or not 1 <= number <= MAX_NUMBER or (number > 1) != isinstance(replaces, str):
        raise StoreFormatError(f"{what} has number {number!r}, replacing {str(replaces)[:80]!r}")
    return {"number": number, "replaces": replaces}


def max_receipt_bytes(block_rows: int) -> int:
    return 65_536 + block_rows * MAX_ROW_BYTES


def read_receipt(objects: Objects, kind: str, group: str, block: int, block_rows: int) -> Receipt:
    """The receipt of a committed block, checked; FileNotFoundError if there is none."""
    data = get_bounded(objects, receipt_key(kind, group, block), max_receipt_bytes(block_rows))
    return Receipt.parse(data, kind=kind, group=group, block=block, block_rows=block_rows)


def row_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """32 hex digits over one row's stored items, little-endian, arrays in the order of layout.ARRAYS."""
    total = hashlib.sha256()
    for name in ARRAYS:
        if name in arrays:
            items = np.ascontiguousarray(arrays[name])
            total.update(f"{name} {items.dtype.name} {items.shape}\n".encode())
            total.update(items.astype(items.dtype.newbyteorder("<"), copy=False).data)
    return total.hexdigest()[:DIGEST_LENGTH]


MAX_RECORD_BYTES = 64 << 20  # a hundred thousand clip ids have 10 MB
_TOMBSTONE_VERSION = 1
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True, kw_only=True)
class Tombstone:
    """One removal."""

    clips: tuple[str, ...]  # clip ids, sorted
    reason: str
    date: str  # of the request, YYYY-MM-DD, UTC
    erased: tuple[str, ...] = ()  # sha256 of samples files that held their conversations and are gone

    @cached_property
    def digest(self) -> str:
        """64 hex digits over everything else in the record."""
        return record_digest(self._content())

    @property
    def id(self) -> str:
        return self.digest[:16]

    def to_bytes(self) -> bytes:
        return (canonical_json(self._content() | {"digest": self.digest}) + "\n").encode()

    def _content(self) -> dict[str, Any]:
        fields = {"clips": list(self.clips), "reason": self.reason, "date": self.date, "erased": list(self.erased)}
        return {"format": _TOMBSTONE_VERSION} | fields

    @classmethod
    def parse(cls, data: bytes, tombstone_id: str) -> Tombstone:
        """A tombstone from its file, whole and undamaged."""
        what = f"tombstone {tombstone_id}"
        record = load_json(data, what)
        try:
            stone = cls(
                clips=tuple(record["clips"]),
                reason=record["reason"],
                date=record["date"],
                erased=tuple(record["erased"]),
            )
            texts = [*stone.clips, *stone.erased, stone.reason, stone.date]
            good = all(type(text) is str for text in texts) and bool(_DATE.fullmatch(stone.date))
            whole = good and stone.to_bytes() == data and stone.id == tombstone_id
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise StoreFormatError(f"{what} lacks fields or has malformed ones ({error})") from error
        if not whole:
            raise StoreDamagedError(
                f"{what} does not match its own digest; it must not be lost: run `merv-pipeline repair`"
            )
        return stone


def tombstone_ids(objects: Objects) -> list[str]:
    return tombstone_names(objects.list_names(TOMBSTONES))


def read_tombstone(objects: Objects, tombstone_id: str) -> Tombstone:
    return Tombstone.parse(get_bounded(objects, tombstone_key(tombstone_id), MAX_RECORD_BYTES), tombstone_id)


def read_tombstones(objects: Objects) -> dict[str, Tombstone]:
    """Every removal by id. A damaged record is an error: rather no store than one that shows what was taken back."""
    return {name: read_tombstone(objects, name) for name in tombstone_ids(objects)}


def tombstoned_clips(objects: Objects) -> dict[str, Tombstone]:
    """Clip id -> a removal that names it."""
    return {clip: stone for stone in read_tombstones(objects).values() for clip in stone.clips}


def put_tombstone(objects: Objects, clips: Iterable[str], reason: str, date: str, erased: Iterable[str]) -> Tombstone:
    """Record a removal; from now on it holds, whatever happens to the erasing."""
    if not reason.strip():
        raise UserError("a tombstone needs a reason: who reads the store later must know why the clip is gone")
    stone = Tombstone(
        clips=tuple(sorted(set(clips))), reason=reason.strip(), date=date, erased=tuple(sorted(set(erased)))
    )
    put_if_absent(objects, tombstone_key(stone.id), stone.to_bytes())  # the name holds the digest
    return stone


MAX_JOURNAL_BYTES = 16 << 20
THREADS_PER_CPU = 4
MANY_THREADS = 256  # as a large server has: its stores are repaired and checked on small machines, slowly


def journal_bytes(record: Mapping[str, Any]) -> bytes:
    """A record with its own digest beside it."""
    digest = record_digest(record)
    return (canonical_json({"record": dict(record), "digest": digest}) + "\n").encode()


def parse_journal(data: bytes, name: str) -> dict[str, Any]:
    """The record, if it is whole."""
    document = load_json(data, f"journal {name}")
    record = document.get("record") if isinstance(document, dict) else None
    try:
        is_whole = isinstance(record, dict) and journal_bytes(record) == data
    except (ValueError, RecursionError):  # NaN, or nested without end
        is_whole = False
    if not is_whole:
        raise StoreDamagedError(
            f"journal {name} does not match its own digest; it tells of a run, no tokens depend on it"
        )
    return record


def driver_runs(objects: Objects) -> list[dict[str, Any]]:
    """Records of the store's extractions, oldest first; damaged ones, and what is no run, are left aside."""
    runs = []
    for name in journal_names(objects.list_names(JOURNAL)):
        if name.endswith("-driver"):
            try:
                run = parse_journal(get_bounded(objects, journal_key(name), MAX_JOURNAL_BYTES), name)
            except StoreError:
                continue
            if _is_run(run):
                runs.append(run)
    return sorted(runs, key=lambda run: run["started"])


@dataclass(frozen=True, kw_only=True)
class Maker:
    """The newest run that wrote to a group."""

    run: Mapping[str, Any]
    encoder: str  # as the run names it
    threads: int | None  # of torch, which decide the last bits of a sum; None where the run does not tell


def maker_of(objects: Objects, group: str) -> Maker | None:
    """Who made a group's tokens, as the journal tells; refuses a number of threads that this machine cannot start."""
    for run in reversed(driver_runs(objects)):
        for name, entry in run["encoders"].items():
            if entry.get("group") == group:
                threads = entry.get("threads")
                _check_threads(threads, group)
                return Maker(run=run, encoder=name, threads=threads)
    return None


def _check_threads(threads: Any, group: str) -> None:
    """A stranger may name any number, and fewer threads than it says would make other bits: no cap, an error."""
    most = max(MANY_THREADS, THREADS_PER_CPU * (os.cpu_count() or 1))
    if threads is not None and not (type(threads) is int and 1 <= threads <= most):
        raise UserError(
            f"the journal says that {group} was computed with {threads!r:.40} threads, this machine starts 1 to "
            f"{most}: use a larger machine, or fetch damaged blocks with `merv-pipeline repair --from OTHER_STORE`"
        )


def _is_run(record: Mapping[str, Any]) -> bool:
    """A journal may be a stranger's: what every reader of runs looks into must be there."""
    mappings = [record.get(name) for name in ("config", "encoders", "summary")]
    if not all(isinstance(value, dict) for value in mappings) or type(record.get("started")) not in (int, float):
        return False
    if not all(type(text) is str for text in (record.get("root"), record["config"].get("dataset"))):
        return False
    if not all(isinstance(entry, dict) for entry in record["encoders"].values()):
        return False
    summary, stage_s = record["summary"], record["summary"].get("stage_s")
    numbers = [summary.get(name) for name in ("clips", "failed", "bytes", "elapsed_s")]
    if not isinstance(stage_s, dict) or type(summary.get("run")) is not str:
        return False
    return all(type(number) in (int, float) for number in [*numbers, *stage_s.values()])

"""Records of a store, as canonical JSON with a digest of their own: receipts, tombstones and the journal.

A receipt commits a block; it is put last, describes the bytes on disk, and holds no time, host or measured value, so
the same block gives the same receipt. A tombstone removes clips from every snapshot. The journal keeps provenance.
Records may be untrusted: `parse` checks every type, length and value.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from featurestore.layout import (
    ARRAYS,
    JOURNAL,
    MAX_BLOCK_ROWS,
    TOMBSTONES,
    block_of,
    journal_key,
    journal_names,
    receipt_key,
    slot_of,
    tombstone_key,
    tombstone_names,
)
from featurestore.newest import update_newest
from featurestore.objects.base import Objects, get_bounded, put_if_absent
from featurestore.objects.open import in_parallel
from mervcache.errors import StoreDamagedError, StoreError, StoreFormatError, UserError
from mervcache.files import canonical_json, is_json_list, is_json_object, load_json, record_digest

State = Literal["ok", "failed", "skipped", "empty"]
STATES: tuple[State, ...] = ("ok", "failed", "skipped", "empty")
SCOPES: tuple[str, ...] = ("clip", "encoder")  # what failed: the media, or one encoder on it
LOST = "lost in an interrupted attempt"
DIGEST_LENGTH = 32  # hex digits
MAX_REASON_LENGTH = 500  # characters
MAX_ROW_BYTES = 4096  # of one row in a receipt: a reason of 500 characters, all escaped, and three digests
MAX_GENERATION = 1_000_000  # times that a block was replaced

_DIGEST = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RECEIPT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RowOutcome:
    """Outcome of one row."""

    state: State
    scope: str | None = None  # of a failure: "clip" or "encoder"
    reason: str | None = None  # of a failure: no measured values, hosts or absolute paths
    digest: str | None = None  # of the stored arrays, where ok
    media_sha256: str | None = None
    decoder: str | None = None  # what made the pixels

    def __post_init__(self) -> None:
        is_failed, is_ok = self.state == "failed", self.state == "ok"
        problem = None
        if self.state not in STATES:
            problem = f"state {self.state!r}"
        elif is_failed != (self.reason is not None) or is_failed != (self.scope is not None):
            problem = f"a reason and scope that do not fit state {self.state!r}"
        elif is_ok != (self.digest is not None):
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
    # array -> {"sha256": hex, "bytes": int}
    shards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    generation: int = 1  # `number` on disk; only `repair` and `tombstone` replace a receipt
    replaces: str | None = None  # digest of the receipt before, where generation > 1

    @cached_property
    def digest(self) -> str:
        """64 hex digits over everything else in the receipt."""
        return record_digest(self._content())

    @cached_property
    def counts(self) -> dict[str, int]:
        """Rows by state."""
        counts = Counter(row.state for row in self.rows)
        return {state: counts[state] for state in STATES}

    @property
    def stored_bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards.values())

    def first_row(self) -> int:
        return self.block * len(self.rows)

    def outcome(self, row: int) -> RowOutcome:
        """Outcome of a row of the block; rows count as in the store."""
        return self.rows[slot_of(row, len(self.rows))]

    def to_bytes(self) -> bytes:
        return (canonical_json(self._content() | {"digest": self.digest}) + "\n").encode()

    def _content(self) -> dict[str, Any]:
        history = {"number": self.generation, "replaces": self.replaces} if self.generation > 1 else {}
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
        rows, shards = _parse_rows(record, what, block_rows), _parse_shards(record, what)
        generation, replaces = record.get("number", 1), record.get("replaces")
        is_first = generation == 1
        is_sound = type(generation) is int and 1 <= generation <= MAX_GENERATION
        if not is_sound or is_first == isinstance(replaces, str):
            raise StoreFormatError(f"{what} has number {generation!r}, replacing {str(replaces)[:80]!r}")
        receipt = cls(
            kind=kind, group=group, block=block, rows=rows, shards=shards, generation=generation, replaces=replaces
        )

        # Are these the bytes that the writer makes of the receipt? That covers every field, the digest, even white
        # space. The record is what was checked, so it is encoded again instead of the receipt: a snapshot of a million
        # clips reads 15,000 of them. The digest is over the same text without the digest; quotes within a text are
        # escaped, so what is replaced is the field itself.
        digest = record.get("digest")
        names = {"format", "kind", "group", "block", "rows", "shards", "digest"}
        names |= set() if is_first else {"number", "replaces"}
        head = [record.get(name) for name in ("format", "kind", "group", "block")]
        is_whole = set(record) == names and isinstance(digest, str)
        if is_whole and canonical_json(head) == canonical_json([_RECEIPT_VERSION, kind, group, block]):
            text = canonical_json(record)
            body = text.replace(f'"digest":"{digest}",', "", 1)
            if hashlib.sha256(body.encode()).hexdigest() == digest and (text + "\n").encode() == data:
                vars(receipt)["digest"] = digest  # of the cached property, which need not compute it again
                return receipt
        raise StoreDamagedError(f"{what} does not match its own digest; run `merv-pipeline verify`")


def _parse_rows(record: Any, what: str, block_rows: int) -> tuple[RowOutcome, ...]:
    columns = record.get("rows") if is_json_object(record) else None
    if is_json_object(record) and record.get("format") != _RECEIPT_VERSION:
        raise StoreFormatError(
            f"{what} has format {record.get('format')!r}, this version reads {_RECEIPT_VERSION}; update"
        )
    if not is_json_object(columns) or set(columns) != set(COLUMNS):
        raise StoreFormatError(f"{what} lacks its columns {', '.join(COLUMNS)}")
    for name, values in columns.items():
        if not is_json_list(values) or len(values) != min(block_rows, MAX_BLOCK_ROWS):
            raise StoreFormatError(f"{what}: column {name} must list {block_rows} rows")
        if not set(map(type, values)) <= {str, type(None)}:
            raise StoreFormatError(f"{what}: column {name} must hold text or null")
    return tuple(
        RowOutcome(state=state, scope=scope, reason=reason, digest=digest, media_sha256=media, decoder=decoder)
        for state, scope, reason, digest, media, decoder in zip(*(columns[name] for name in COLUMNS), strict=True)
    )


def _parse_shards(record: dict[str, Any], what: str) -> dict[str, dict[str, Any]]:
    shards = record.get("shards")
    if not is_json_object(shards) or not set(shards) <= set(ARRAYS) or "tokens" not in shards:
        raise StoreFormatError(f"{what} must list the shards of its arrays ({', '.join(ARRAYS)})")
    for name, shard in shards.items():
        if not is_json_object(shard) or set(shard) != {"sha256", "bytes"}:
            raise StoreFormatError(f"{what}: shard {name} must have sha256 and bytes")
        size = shard["bytes"]
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 1 << 48:
            raise StoreFormatError(f"{what}: shard {name} has size {size!r}")
        if not isinstance(shard["sha256"], str) or not _SHA256.fullmatch(shard["sha256"]):
            raise StoreFormatError(f"{what}: shard {name} has a malformed sha256")
    return shards


def max_receipt_bytes(block_rows: int) -> int:
    return 65_536 + block_rows * MAX_ROW_BYTES


def read_receipt(objects: Objects, kind: str, group: str, block: int, block_rows: int) -> Receipt:
    """The receipt of a committed block, checked; FileNotFoundError if there is none."""
    data = get_bounded(objects, receipt_key(kind, group, block), max_receipt_bytes(block_rows))
    return Receipt.parse(data, kind=kind, group=group, block=block, block_rows=block_rows)


def media_of_rows(objects: Objects, kind: str, group: str, rows: Sequence[int], block_rows: int) -> list[str | None]:
    """The media's sha256 of each row, from the receipts; None where a row is not ok or records none."""
    blocks = sorted({block_of(row, block_rows) for row in rows})
    read = partial(read_receipt, objects, kind, group, block_rows=block_rows)
    receipts = dict(zip(blocks, in_parallel(read, blocks, objects.parallel_reads), strict=True))
    outcomes = [receipts[block_of(row, block_rows)].outcome(row) for row in rows]
    return [outcome.media_sha256 if outcome.state == "ok" else None for outcome in outcomes]


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
    """One removal of clips on request (a licence, a consent withdrawn); it travels with the store.

    Clip ids stay in the clip parts, since rows are never given out twice, and in this record.
    """

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
            tombstone = cls(
                clips=tuple(record["clips"]),
                reason=record["reason"],
                date=record["date"],
                erased=tuple(record["erased"]),
            )
            texts = [*tombstone.clips, *tombstone.erased, tombstone.reason, tombstone.date]
            is_whole = all(type(text) is str for text in texts) and bool(_DATE.fullmatch(tombstone.date))
            is_whole = is_whole and tombstone.to_bytes() == data and tombstone.id == tombstone_id
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise StoreFormatError(f"{what} lacks fields or has malformed ones ({error})") from error
        if not is_whole:
            raise StoreDamagedError(
                f"{what} does not match its own digest; it must not be lost: run `merv-pipeline repair`"
            )
        return tombstone


def tombstone_ids(objects: Objects) -> list[str]:
    return tombstone_names(objects.list_names(TOMBSTONES))


def read_tombstone(objects: Objects, tombstone_id: str) -> Tombstone:
    return Tombstone.parse(get_bounded(objects, tombstone_key(tombstone_id), MAX_RECORD_BYTES), tombstone_id)


def read_tombstones(objects: Objects) -> dict[str, Tombstone]:
    """Every removal by id. A damaged record is an error, since opening without it would expose removed clips."""
    return {name: read_tombstone(objects, name) for name in tombstone_ids(objects)}


def tombstoned_clips(objects: Objects) -> dict[str, Tombstone]:
    """Clip id -> a removal that names it."""
    return {clip: tombstone for tombstone in read_tombstones(objects).values() for clip in tombstone.clips}


def put_tombstone(objects: Objects, clips: Iterable[str], reason: str, date: str, erased: Iterable[str]) -> Tombstone:
    """Record a removal; it takes effect at once, before the tokens are erased."""
    if not reason.strip():
        raise UserError("a tombstone needs a reason: later readers of the store must know why the clip is gone")
    tombstone = Tombstone(
        clips=tuple(sorted(set(clips))), reason=reason.strip(), date=date, erased=tuple(sorted(set(erased)))
    )
    put_if_absent(objects, tombstone_key(tombstone.id), tombstone.to_bytes())  # the name holds the digest
    update_newest(objects)
    return tombstone


MAX_JOURNAL_BYTES = 16 << 20
THREADS_PER_CPU = 4
MAX_THREADS = 256  # of a large server, whose stores are also repaired and checked on small machines, slowly


def journal_bytes(record: Mapping[str, Any]) -> bytes:
    """A record with its own digest."""
    digest = record_digest(record)
    return (canonical_json({"record": dict(record), "digest": digest}) + "\n").encode()


def parse_journal(data: bytes, name: str) -> dict[str, Any]:
    """The record of a journal file; StoreDamagedError if it is not whole."""
    document = load_json(data, f"journal {name}")
    record = document.get("record") if is_json_object(document) else None
    with suppress(ValueError, RecursionError):  # NaN, or nested without end
        if is_json_object(record) and journal_bytes(record) == data:
            return record
    raise StoreDamagedError(
        f"journal {name} does not match its own digest; it holds provenance, no tokens depend on it"
    )


def driver_runs(objects: Objects) -> list[dict[str, Any]]:
    """Records of the store's extractions, oldest first; damaged ones and records of other things are skipped."""
    runs: list[dict[str, Any]] = []
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
    threads: int | None  # of torch, which decide the last bits of a sum; None where the run does not record them


def maker_of(objects: Objects, group: str) -> Maker | None:
    """The run that made a group's tokens, by the journal; UserError for more threads than this machine can start."""
    for run in reversed(driver_runs(objects)):
        for name, entry in run["encoders"].items():
            if entry.get("group") != group:
                continue
            # No cap: fewer threads than the untrusted record claims would make other bits.
            threads, most = entry.get("threads"), max(MAX_THREADS, THREADS_PER_CPU * (os.cpu_count() or 1))
            if threads is not None and not (type(threads) is int and 1 <= threads <= most):
                raise UserError(
                    f"by the journal, {group} was computed with {threads!r:.40} threads, this machine starts 1 to "
                    f"{most}: use a larger machine, or fetch damaged blocks with "
                    "`merv-pipeline repair --from OTHER_STORE`"
                )
            return Maker(run=run, encoder=name, threads=threads)
    return None


def _is_run(record: Mapping[str, Any]) -> bool:
    """The fields that readers of runs use are there: a journal may be untrusted."""
    mappings = [record.get(name) for name in ("config", "encoders", "summary")]
    if not all(isinstance(value, dict) for value in mappings) or type(record.get("started")) not in (int, float):
        return False
    if not all(type(text) is str for text in (record.get("root"), record["config"].get("dataset"))):
        return False
    if not all(isinstance(entry, dict) for entry in record["encoders"].values()):
        return False
    summary, stage_s = record["summary"], record["summary"].get("stage_s")
    numbers = [summary.get(name) for name in ("clips", "failed", "bytes", "elapsed_s")]
    if not is_json_object(stage_s) or type(summary.get("run")) is not str:
        return False
    return all(type(number) in (int, float) for number in [*numbers, *stage_s.values()])

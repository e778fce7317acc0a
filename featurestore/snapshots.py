"""Snapshots: an immutable, digested view of everything that is committed, and how one is published.

A snapshot is a table (one line per clip: row and digest of its tokens for each encoder, or why it failed) and a JSON
record, put last, that names every clip part, samples file and receipt by digest. Publishing needs no lock: of racing
publishers all snapshots stay valid, and the last one has everything. Snapshots and clip parts may be untrusted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore.clips import KINDS, Clip, Kind
from featurestore.layout import (
    CANARIES,
    GROUP_NAME,
    MAX_BLOCK_ROWS,
    PARTS,
    SAMPLES,
    SNAPSHOTS,
    allocated_blocks,
    block_number,
    check_block_rows,
    part_key,
    part_numbers,
    receipt_blocks,
    receipts_prefix,
    reference_clip_groups,
    samples_key,
    samples_versions,
    snapshot_ids,
    snapshot_keys,
)
from featurestore.newest import update_newest
from featurestore.objects.base import Objects, get_bounded, put_if_absent
from featurestore.parquet import named_table_file, read_table, table_bytes, table_file
from featurestore.records import STATES, Receipt, read_receipt, tombstone_ids
from featurestore.reference_clips import reference_clip_digest
from featurestore.schemas import CLIP_SCHEMA, clips_to_table
from featurestore.zarr_metadata import GroupRecord, encoder_groups, parse_identity, read_group
from mervcache.errors import StoreDamagedError, StoreError, StoreFormatError, UserError
from mervcache.files import canonical_json, load_json, record_digest, sha256_hex

MAX_RECORD_BYTES = 256 << 20  # a million clips of four encoders have a record of 6 MB
_VERSION = 1

# column suffix -> (Arrow type, value where there is none); a group's columns are GROUP.row, GROUP.digest, ...
GROUP_COLUMNS: dict[str, tuple[pa.DataType, int | None]] = {
    "row": (pa.int64(), -1),  # of the clip's newest ok row
    "digest": (pa.string(), None),
    "failed_row": (pa.int64(), -1),  # of its newest failure
    "failed_scope": (pa.string(), None),
    "failed_reason": (pa.string(), None),
}
# state of a row -> the column of its number, then (column, field of the outcome) pairs
_COLUMNS_OF_STATE = {
    "ok": ("row", ("digest", "digest")),
    "failed": ("failed_row", ("failed_scope", "scope"), ("failed_reason", "reason")),
}


@dataclass(frozen=True, kw_only=True)
class GroupSummary(GroupRecord):
    """One kind/group in a snapshot: what made it, its receipts, and their sums."""

    receipts: Mapping[str, str] = field(default_factory=dict[str, str])  # block number as text -> receipt digest
    counts: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(STATES, 0))  # rows by state
    stored_bytes: int = 0  # of all shards


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The record of a snapshot."""

    sequence: int
    parent: str | None
    parts: Mapping[str, str]  # clip part key -> sha256
    samples: Mapping[str, Mapping[str, str]]  # samples name -> {"key", "sha256"}
    groups: Mapping[str, GroupSummary]  # "kind/group"
    block_rows: Mapping[str, int]  # kind -> rows, as in the root's zarr.json
    table_sha256: str
    tombstones: tuple[str, ...] = ()  # ids of the removals that it applies
    # "kind/group" -> sha256 of its reference clips' file
    canaries: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def digest(self) -> str:
        """64 hex digits over the whole record, and through it over everything that it names."""
        return record_digest(self._content())

    @property
    def id(self) -> str:
        return f"{self.sequence:08d}-{self.digest[:12]}"

    def has_content_of(self, other: Snapshot) -> bool:
        """Equal but for their place in the history."""
        return self == replace(other, sequence=self.sequence, parent=self.parent)

    def to_bytes(self) -> bytes:
        return (canonical_json(self._content() | {"digest": self.digest}) + "\n").encode()

    def _content(self) -> dict[str, Any]:
        groups = {
            name: {
                "identity": group.identity.to_dict(),
                "weights": group.weights,
                "batch_shape": group.batch_shape,
                "receipts": dict(group.receipts),
                "counts": dict(group.counts),
                "stored_bytes": group.stored_bytes,
            }
            for name, group in self.groups.items()
        }
        added = {"tombstones": list(self.tombstones)} if self.tombstones else {}  # absent in stores that have none
        added |= {"canaries": dict(self.canaries)} if self.canaries else {}
        return added | {
            "format": _VERSION,
            "sequence": self.sequence,
            "parent": self.parent,
            "parts": dict(self.parts),
            "samples": {name: dict(entry) for name, entry in self.samples.items()},
            "groups": groups,
            "block_rows": dict(self.block_rows),
            "table_sha256": self.table_sha256,
        }

    @classmethod
    def parse(cls, data: bytes, snapshot_id: str) -> Snapshot:
        """A snapshot's record, whole and undamaged."""
        what = f"snapshot {snapshot_id}"
        record = load_json(data, what)
        try:
            groups = {name: _parse_group(name, entry) for name, entry in record["groups"].items()}
            snapshot = cls(
                sequence=record["sequence"],
                parent=record["parent"],
                parts={str(key): str(value) for key, value in record["parts"].items()},
                samples={name: {k: str(v) for k, v in entry.items()} for name, entry in record["samples"].items()},
                groups=groups,
                block_rows=check_block_rows(record["block_rows"]),
                table_sha256=str(record["table_sha256"]),
                tombstones=tuple(map(str, record.get("tombstones", ()))),
                canaries={name: str(sha256) for name, sha256 in record.get("canaries", {}).items()},
            )
            is_whole = snapshot.to_bytes() == data and snapshot.id == snapshot_id
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, UserError) as error:
            raise StoreFormatError(f"{what} lacks fields or has malformed ones ({error})") from error
        if not is_whole:
            raise StoreDamagedError(f"{what} does not match its own digest; open an older one or publish a new one")

        # Keys reach the file system: only names that this store could have made are allowed.
        if list(snapshot.parts) != [part_key(number) for number in range(len(snapshot.parts))]:
            raise StoreFormatError(f"{what} names clip parts that are not part-00000..{len(snapshot.parts) - 1:05d}")
        for name, entry in snapshot.samples.items():
            folder, _, file = entry.get("key", "").partition("/")
            if folder != SAMPLES or name not in samples_versions([file]) or "sha256" not in entry:
                raise StoreFormatError(f"{what} names samples {name!r} at {entry.get('key')!r}")
        if unknown := set(snapshot.canaries) - set(snapshot.groups):
            raise StoreFormatError(f"{what} names canaries of {min(unknown)[:100]!r}, which is none of its groups")
        return snapshot


def _parse_group(name: str, entry: Mapping[str, Any]) -> GroupSummary:
    kind, _, group = name.partition("/")
    if kind not in KINDS or not GROUP_NAME.fullmatch(group):
        raise ValueError(f"group {name!r}")
    identity = parse_identity(entry["identity"], name)
    if identity.group_name != group:
        raise ValueError(f"group {name!r} has the identity of {identity.group_name}")
    return GroupSummary(
        identity=identity,
        weights=str(entry["weights"]),
        batch_shape=int(entry["batch_shape"]),
        receipts={str(block_number(block)): str(digest) for block, digest in entry["receipts"].items()},
        counts={state: int(entry["counts"][state]) for state in STATES},
        stored_bytes=int(entry["stored_bytes"]),
    )


def newest_snapshot_id(objects: Objects) -> str | None:
    ids = snapshot_ids(objects.list_names(SNAPSHOTS))
    return ids[-1] if ids else None


def load_snapshot(objects: Objects, snapshot_id: str) -> Snapshot:
    try:
        data = get_bounded(objects, snapshot_keys(snapshot_id)[1], MAX_RECORD_BYTES)
    except FileNotFoundError:
        known = ", ".join(snapshot_ids(objects.list_names(SNAPSHOTS))[-5:]) or "none"
        raise StoreError(f"there is no snapshot {snapshot_id}; the newest are: {known}") from None
    return Snapshot.parse(data, snapshot_id)


def read_snapshot_table(objects: Objects, snapshot: Snapshot, columns: list[str] | None = None) -> pa.Table:
    """The snapshot's table, its bytes checked."""
    key = snapshot_keys(snapshot.id)[0]
    try:
        data = table_file(objects, key, sha256=snapshot.table_sha256)
    except FileNotFoundError:
        raise StoreDamagedError(f"{key} is missing; open an older snapshot or publish a new one") from None
    if sha256_hex(data) != snapshot.table_sha256:
        raise StoreDamagedError(f"{key} does not match its digest; open an older snapshot or publish a new one")
    schema = snapshot_schema({name.split("/")[1] for name in snapshot.groups})
    table = read_table(data, schema, key, columns=columns, exactly=False)
    for name in table.column_names:
        if (name in ("clip_id", "kind") or name.endswith("row")) and table[name].null_count:
            raise StoreFormatError(f"{key} has clips without {name}; open an older snapshot or publish a new one")
    return table


def snapshot_schema(groups: Iterable[str]) -> pa.Schema:
    """Columns of a snapshot of these groups."""
    fields = [("clip_id", pa.string()), ("kind", pa.string())]
    for group in sorted(groups):
        fields += [(column(group, suffix), arrow_type) for suffix, (arrow_type, _) in GROUP_COLUMNS.items()]
    return pa.schema(fields)


def column(group: str, suffix: str) -> str:
    return f"{group}.{suffix}"


def publish(objects: Objects, block_rows: Mapping[str, int], *, anew: bool = False) -> str:
    """Put a snapshot of all that is committed, if it has anything new; returns the newest snapshot's id.

    Where two publishers race, the slower one publishes again from the newest snapshot. `anew` reads every receipt, as
    is done after a removal: receipts that the newest snapshot knows may have been replaced.
    """
    while True:
        newest = newest_snapshot_id(objects)
        parent = load_snapshot(objects, newest) if newest else None
        snapshot, table = _build(objects, block_rows, parent, anew)
        if parent is not None and snapshot.has_content_of(parent):
            update_newest(objects)  # a publisher that was killed may not have come to it
            return parent.id
        table_key, record_key = snapshot_keys(snapshot.id)
        for key, data in ((table_key, table), (record_key, snapshot.to_bytes())):
            put_if_absent(objects, key, data)  # the name holds the digest: an existing object has the same bytes
        rivals = [other for other in snapshot_ids(objects.list_names(SNAPSHOTS)) if other >= f"{snapshot.sequence:08d}"]
        if rivals == [snapshot.id]:
            update_newest(objects)
            return snapshot.id


def _build(
    objects: Objects, block_rows: Mapping[str, int], parent: Snapshot | None, anew: bool
) -> tuple[Snapshot, bytes]:
    """(record, bytes of its table)."""
    tombstones = tuple(tombstone_ids(objects))
    base = None if anew or (parent and parent.tombstones != tombstones) else parent  # reused without reading it again
    committed = {
        f"{kind}/{group}": receipt_blocks(objects.list_names(receipts_prefix(kind, group)))
        for kind in KINDS
        for group in encoder_groups(objects, kind)
    }
    index = ClipIndex(objects, block_rows).refresh()  # after the receipts, so that it has every row they name
    state = SnapshotTable.extend(read_snapshot_table(objects, base) if base else None, index.table)

    groups: dict[str, GroupSummary] = {}
    for name, blocks in sorted(committed.items()):
        kind, group = name.split("/")
        record = read_group(objects, kind, group)
        summary = (base.groups.get(name) if base else None) or GroupSummary(**vars(record))
        receipts, counts, stored_bytes = dict(summary.receipts), dict(summary.counts), summary.stored_bytes
        for block in sorted(blocks - {int(number) for number in summary.receipts}):
            receipt = read_receipt(objects, kind, group, block, block_rows[kind])
            state.apply(receipt)
            receipts[str(block)] = receipt.digest
            counts = {name: counts[name] + receipt.counts[name] for name in STATES}
            stored_bytes += receipt.stored_bytes
        state.ensure_columns(group)
        groups[name] = replace(summary, receipts=receipts, counts=counts, stored_bytes=stored_bytes)

    parts = dict(parent.parts) if parent else {}
    for key in map(part_key, part_numbers(objects.list_names(PARTS))[: len(index.tables)]):
        if key not in parts:
            parts[key] = sha256_hex(table_file(objects, key))

    samples: dict[str, dict[str, str]] = {}
    for name, version in sorted(samples_versions(objects.list_names(SAMPLES)).items()):
        key, old = samples_key(name, version), parent.samples.get(name) if parent else None
        sha256 = old["sha256"] if old and old["key"] == key else sha256_hex(table_file(objects, key))
        samples[name] = {"key": key, "sha256": sha256}

    canaries: dict[str, str] = {}  # of files that are there and undamaged; those that `base` knows never change
    for kind in KINDS:
        present = reference_clip_groups(objects.list_names(f"{CANARIES}/{kind}"))
        for name in (name for name in groups if name.startswith(f"{kind}/") and name.split("/")[1] in present):
            sha256 = base.canaries.get(name) if base else None
            if sha256 := sha256 or reference_clip_digest(objects, kind, groups[name].identity):
                canaries[name] = sha256

    data = table_bytes(state.to_arrow())
    snapshot = Snapshot(
        sequence=parent.sequence + 1 if parent else 1,
        parent=parent.id if parent else None,
        parts=parts,
        samples=samples,
        groups=groups,
        block_rows=dict(block_rows),
        table_sha256=sha256_hex(data),
        tombstones=tombstones,
        canaries=canaries,
    )
    return snapshot, data


class SnapshotTable:
    """One line per clip, in the order in which clips first got a row; numpy while receipts are applied."""

    def __init__(self, clip_ids: pa.Array, kinds: pa.Array, clip_of_row: dict[str, np.ndarray]) -> None:
        self._clip_ids = clip_ids
        self._kinds = kinds
        self._clip_of_row = clip_of_row  # kind -> clip's line by row, -1 where a row is unused
        self._columns: dict[str, dict[str, np.ndarray]] = {}

    @classmethod
    def extend(cls, parent: pa.Table | None, clips: pa.Table) -> SnapshotTable:
        """The parent's table made longer by the clips that are new; clip parts only grow, so lines keep their place."""
        encoded = clips["clip_id"].combine_chunks().dictionary_encode()
        lines = encoded.indices.to_numpy()
        clip_ids = encoded.dictionary
        _, first = np.unique(lines, return_index=True)
        rows, kinds = clips["row"].to_numpy(), clips["kind"].to_numpy(zero_copy_only=False)
        clip_of_row: dict[str, np.ndarray] = {}
        for kind in KINDS:
            of_kind = kinds == kind
            clip_of_row[kind] = np.full(int(rows[of_kind].max()) + 1 if of_kind.any() else 0, -1, dtype=np.int64)
            clip_of_row[kind][rows[of_kind]] = lines[of_kind]
        state = cls(clip_ids, clips["kind"].combine_chunks().take(pa.array(first)), clip_of_row)
        if parent is None:
            return state
        count = parent.num_rows
        if not parent["clip_id"].combine_chunks().equals(clip_ids.slice(0, count)):
            raise StoreDamagedError("the newest snapshot does not begin with the clips of the clip parts")
        for group in {name.rsplit(".", 1)[0] for name in parent.column_names if name not in ("clip_id", "kind")}:
            columns = state.ensure_columns(group)
            for suffix in GROUP_COLUMNS:
                columns[suffix][:count] = parent[column(group, suffix)].to_numpy(zero_copy_only=False)
        return state

    def lines(self, kind: str, rows: np.ndarray) -> np.ndarray:
        """The line of the clip that has each row of a kind, -1 where none has."""
        of_row = np.append(self._clip_of_row[kind], -1)
        return of_row[np.where((rows >= 0) & (rows < len(of_row)), rows, -1)]

    def ensure_columns(self, group: str) -> dict[str, np.ndarray]:
        """The columns of a group, empty if it is new."""
        if group not in self._columns:
            self._columns[group] = {
                suffix: np.full(len(self._clip_ids), none, dtype=np.int64 if none == -1 else object)
                for suffix, (_, none) in GROUP_COLUMNS.items()
            }
        return self._columns[group]

    def apply(self, receipt: Receipt) -> None:
        """Add a receipt: a later row of a clip wins over an earlier one, in any order of receipts."""
        columns, first, clip_of_row = self.ensure_columns(receipt.group), receipt.first_row(), self._clip_of_row
        for state, (number, *copied) in _COLUMNS_OF_STATE.items():
            outcomes = [(first + n, outcome) for n, outcome in enumerate(receipt.rows) if outcome.state == state]
            if not outcomes:
                continue
            rows = np.fromiter((row for row, _ in outcomes), np.int64, len(outcomes))
            known = rows < len(clip_of_row[receipt.kind])
            lines = np.full(len(rows), -1)
            lines[known] = clip_of_row[receipt.kind][rows[known]]
            if (lines < 0).any():
                row = rows[lines < 0][0]
                raise StoreFormatError(f"a receipt of {receipt.kind}/{receipt.group} has row {row}, which no clip has")
            newer = rows > columns[number][lines]  # rows ascend: of two rows of one clip the later one stays
            columns[number][lines[newer]] = rows[newer]
            for suffix, name in copied:
                values = np.array([getattr(outcome, name) for _, outcome in outcomes], dtype=object)
                columns[suffix][lines[newer]] = values[newer]

    def to_arrow(self) -> pa.Table:
        arrays: dict[str, pa.Array] = {"clip_id": self._clip_ids, "kind": self._kinds}
        for group in sorted(self._columns):
            for suffix, (arrow_type, _) in GROUP_COLUMNS.items():
                arrays[column(group, suffix)] = pa.array(self._columns[group][suffix], type=arrow_type)
        return pa.table(arrays)


class ClipIndex:
    """The clip parts of a store, which allocate rows to clips; each is read once, since parts never change."""

    def __init__(self, objects: Objects, block_rows: Mapping[str, int]) -> None:
        self._objects = objects
        self.block_rows = block_rows
        self.tables: list[pa.Table] = []
        self._rows: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}

    def refresh(self) -> ClipIndex:
        """Read the parts that are new since the last call."""
        for number in part_numbers(self._objects.list_names(PARTS))[len(self.tables) :]:
            key = part_key(number)
            table = read_table(table_file(self._objects, key), CLIP_SCHEMA, key)
            rows, kinds = table["row"].to_numpy(), table["kind"].to_numpy(zero_copy_only=False)
            for kind in KINDS:
                of_kind = rows[kinds == kind]
                # No gap within a part and less than a block before it: rows decide how long the snapshot's tables are.
                first = self.max_row(kind) + 1
                if len(of_kind) and (not first <= of_kind[0] < first + MAX_BLOCK_ROWS or (np.diff(of_kind) != 1).any()):
                    raise StoreFormatError(f"{key}: rows of {kind} must follow one another from {first} on")
                self._rows[kind].append(of_kind)
            if sum(len(rows[kinds == kind]) for kind in KINDS) != len(rows):
                raise StoreFormatError(f"{key}: kinds must be {' or '.join(KINDS)}")
            self.tables.append(table)
        return self

    @property
    def table(self) -> pa.Table:
        """Every part, in order: `CLIP_SCHEMA`."""
        return pa.concat_tables(self.tables) if self.tables else CLIP_SCHEMA.empty_table()

    def max_row(self, kind: str, *, parts: int | None = None) -> int:
        """Highest allocated row (of the first `parts` parts); -1 if none."""
        return max((int(rows[-1]) for rows in self._rows[kind][:parts] if len(rows)), default=-1)

    def allocated_blocks(self, kind: str) -> int:
        """Blocks allocated so far: work exists for 0..n-1."""
        return allocated_blocks(self.refresh().max_row(kind), self.block_rows[kind])

    def planned_rows(self, kind: str, block: int) -> list[int]:
        """Rows of a block that belong to a clip; the rest of the block is unused."""
        size = self.block_rows[kind]
        if block * size > self.max_row(kind):
            self.refresh()
        return self.rows_between(kind, block * size, (block + 1) * size)

    def rows_between(self, kind: str, first: int, stop: int) -> list[int]:
        """Allocated rows in [first, stop)."""
        between: list[int] = []
        for rows in self._rows[kind]:
            low, high = np.searchsorted(rows, (first, stop))
            between.extend(rows[low:high].tolist())
        return between

    def rows_of_clips(self, kind: str, clip_ids: Collection[str]) -> set[int]:
        """Every row of these clips."""
        wanted = pa.array(sorted(clip_ids), pa.string())
        rows: set[int] = set()
        for table in self.tables:
            is_wanted = pc.and_(pc.equal(table["kind"], kind), pc.is_in(table["clip_id"], wanted))
            rows.update(table.filter(is_wanted)["row"].to_pylist())
        return rows

    def clip_ids(self, *, from_part: int = 0) -> set[str]:
        return {clip_id for table in self.tables[from_part:] for clip_id in table["clip_id"].to_pylist()}

    def datasets(self) -> list[str]:
        return sorted(set(self.table["dataset"].unique().to_pylist()))


def allocate(clips: Iterable[Clip], first_rows: Mapping[Kind, int]) -> list[tuple[int, Clip]]:
    """Rows for clips, per kind from its first row on, in the order given."""
    following = dict(first_rows)
    rows: list[tuple[int, Clip]] = []
    for clip in clips:
        rows.append((following[clip.kind], clip))
        following[clip.kind] += 1
    return rows


def part_bytes(rows: Sequence[tuple[int, Clip]]) -> bytes:
    return table_bytes(clips_to_table(rows))


def read_clip_parts(objects: Objects, record: Snapshot, clip_ids: pa.Array) -> pa.Table:
    """`CLIP_SCHEMA` lines of a snapshot's clips, whose ids are given in its order: each as it was first listed."""
    tables = [
        read_table(named_table_file(objects, key, sha256), CLIP_SCHEMA, key) for key, sha256 in record.parts.items()
    ]
    table = pa.concat_tables(tables) if tables else CLIP_SCHEMA.empty_table()
    ids = table["clip_id"].combine_chunks().dictionary_encode()
    _, first = np.unique(ids.indices.to_numpy(), return_index=True)
    table = table.take(pa.array(np.sort(first)))
    if not table["clip_id"].combine_chunks().equals(clip_ids):
        raise StoreDamagedError("the snapshot's table and the clip parts list different clips; publish a new snapshot")
    return table

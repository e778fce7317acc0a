"""Snapshots: an immutable, digested view of everything that is committed.

A snapshot is a table (one line per clip: the row and digest of its tokens for each encoder, or why it failed) and a
JSON record that names every clip part, samples file and receipt by digest. The record is put last and commits it;
`publish.py` makes one. What is read may be a stranger's: `parse` checks every type and name before anything is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from featurestore.clips import KINDS
from featurestore.digests import canonical_json, record_digest, sha256_hex
from featurestore.errors import StoreDamagedError, StoreError, StoreFormatError, UserError
from featurestore.groups import GroupRecord, parse_identity
from featurestore.layout import (
    GROUP_NAME,
    SAMPLES,
    SNAPSHOTS,
    block_number,
    check_block_rows,
    part_key,
    samples_versions,
    snapshot_ids,
    snapshot_keys,
)
from featurestore.metadata import load_json
from featurestore.parquet import read_table, table_file
from featurestore.places.objects import Objects, get_bounded
from featurestore.receipts import STATES
from featurestore.snapshot_table import complete, snapshot_schema

_VERSION = 1
MAX_RECORD_BYTES = 256 << 20  # a million clips of four encoders have a record of 6 MB


@dataclass(frozen=True, kw_only=True)
class GroupSummary(GroupRecord):
    """What a snapshot knows of one kind/group: what made it, its receipts, and their sums."""

    receipts: Mapping[str, str] = field(default_factory=dict)  # block number as text -> receipt digest
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
    tombstones: tuple[str, ...] = ()  # ids of the removals that it knows of
    canaries: Mapping[str, str] = field(default_factory=dict)  # "kind/group" -> sha256 of its canaries' file

    @property
    def digest(self) -> str:
        """64 hex digits over the whole record, and through it over everything that it names."""
        return record_digest(self._content())

    @property
    def id(self) -> str:
        return f"{self.sequence:08d}-{self.digest[:12]}"

    def says_the_same_as(self, other: Snapshot) -> bool:
        """Equal but for their place in the history."""
        mine, theirs = self._content(), other._content()
        mine |= dict.fromkeys(("sequence", "parent"))
        theirs |= dict.fromkeys(("sequence", "parent"))
        return mine == theirs

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
            same = snapshot.to_bytes() == data and snapshot.id == snapshot_id
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, UserError) as error:
            raise StoreFormatError(f"{what} lacks fields or has malformed ones ({error})") from error
        if not same:
            raise StoreDamagedError(f"{what} does not match its own digest; open an older one or publish a new one")
        _check_keys(snapshot, what)
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


def _check_keys(snapshot: Snapshot, what: str) -> None:
    """Keys reach the file system: only names that this store could have made are allowed."""
    if list(snapshot.parts) != [part_key(number) for number in range(len(snapshot.parts))]:
        raise StoreFormatError(f"{what} names clip parts that are not part-00000..{len(snapshot.parts) - 1:05d}")
    for name, entry in snapshot.samples.items():
        folder, _, file = entry.get("key", "").partition("/")
        if folder != SAMPLES or name not in samples_versions([file]) or "sha256" not in entry:
            raise StoreFormatError(f"{what} names samples {name!r} at {entry.get('key')!r}")
    if unknown := set(snapshot.canaries) - set(snapshot.groups):
        raise StoreFormatError(f"{what} names canaries of {min(unknown)[:100]!r}, which is none of its groups")


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
        data = table_file(objects, key)
    except FileNotFoundError:
        raise StoreDamagedError(f"{key} is missing; open an older snapshot or publish a new one") from None
    if sha256_hex(data) != snapshot.table_sha256:
        raise StoreDamagedError(f"{key} does not match its digest; open an older snapshot or publish a new one")
    schema = snapshot_schema({name.split("/")[1] for name in snapshot.groups})
    return complete(read_table(data, schema, key, columns=columns, exactly=False), key)

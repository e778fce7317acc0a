"""The driver's side of a store: make it, give out rows, make room for encoders, publish.

Nothing here needs a lock to be right. Rows are given out by creating a clip part that did not exist; groups are created
by putting a document that only depends on what it describes; whoever loses a race reads what the winner wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from featurestore.clips import KINDS, Clip
from featurestore.columns import SAMPLE_SCHEMA, samples_to_table, table_to_samples
from featurestore.errors import IdentityConflictError, StoreFormatError, StoreNotFoundError, UserError
from featurestore.find import Place, is_url, place_of
from featurestore.groups import GroupRecord, GroupWriter, create_or_open_group, encoder_groups
from featurestore.identity import FeatureIdentity
from featurestore.journal import journal_bytes
from featurestore.layout import (
    CARD,
    JOURNAL_NAME,
    ROOT_METADATA,
    SAMPLES,
    TEMPORARY,
    check_block_rows,
    journal_key,
    next_batch_row,
    part_key,
    samples_key,
    samples_versions,
)
from featurestore.metadata import parse_root, root_document
from featurestore.parts import ClipIndex, allocate, part_bytes, read_table, table_bytes
from featurestore.places.by_url import open_objects
from featurestore.places.objects import Objects, machine_faults, put_if_absent
from featurestore.publish import publish
from featurestore.samples import Sample
from featurestore.tombstones import tombstoned_clips


class StoreWriter:
    """A store that may be extended. Cheap to open; safe to use from several processes at once."""

    def __init__(self, objects: Objects, block_rows: dict[str, int]) -> None:
        self.objects = objects
        self.block_rows = block_rows
        self._index = ClipIndex(objects, block_rows)

    @classmethod
    def open_or_create(
        cls, path: Place, *, block_rows: Mapping[str, int] | None = None, objects: Objects | None = None
    ) -> StoreWriter:
        """Open the store in a folder or bucket, or make one; block rows are fixed when it is made.

        `objects` is the place itself where the caller has opened it.
        """
        wanted, path = check_block_rows(block_rows), place_of(path)
        if not is_url(path):
            with machine_faults(f"make {path}"):
                _make_folder(Path(path))
        objects = open_objects(path) if objects is None else objects
        objects.sweep()
        if not objects.exists(ROOT_METADATA):
            check_holds_nothing_else(objects, path)
            put_if_absent(objects, ROOT_METADATA, root_document(datasets=[], block_rows=wanted))
        store = cls(objects, parse_root(objects.get(ROOT_METADATA))["block_rows"])
        store.check_block_rows(block_rows or {})
        return store

    @classmethod
    def open(cls, path: Place) -> StoreWriter:
        """Open a store that is there: what a worker does, lest it makes a new one where a share was unmounted."""
        objects = open_objects(path)
        if not objects.exists(ROOT_METADATA):
            raise StoreNotFoundError(
                f"there is no feature store at {path}; mount the share that holds it, or extract one"
            )
        return cls(objects, parse_root(objects.get(ROOT_METADATA))["block_rows"])

    def check_block_rows(self, wanted: Mapping[str, int]) -> None:
        """Refuse other numbers of rows per block than the store was made with."""
        for kind, rows in wanted.items():
            if self.block_rows[kind] != rows:
                raise UserError(
                    f"this store has blocks of {self.block_rows[kind]} {kind} rows, got {rows}; "
                    "block rows are fixed when a store is made: leave the option out or choose another --store"
                )

    def clips(self) -> pa.Table:
        """Every row given out, `CLIP_SCHEMA`, as of now."""
        return self._index.refresh().table

    def add_clips(self, clips: Iterable[Clip], *, retry: bool = False) -> list[tuple[int, Clip]]:
        """Give out rows: returns (row, clip) of what this call added, in order; rows count per kind.

        A clip that has a row already gets none, unless `retry` asks for a new one. Each call starts new blocks.
        """
        removed = tombstoned_clips(self.objects)
        distinct = {clip.clip_id: clip for clip in clips}
        for clip_id in removed.keys() & distinct.keys():
            del distinct[clip_id]
        seen = len(self._index.refresh().tables) if retry else 0  # a retry only yields to rows given out meanwhile
        while True:
            index = self._index.refresh()
            known = index.clip_ids(from_part=seen)
            new = [clip for clip_id, clip in distinct.items() if clip_id not in known]
            if not new:
                self._refresh_root()
                return []
            first = {kind: next_batch_row(index.max_row(kind), self.block_rows[kind]) for kind in KINDS}
            rows = allocate(new, first)
            if put_if_absent(self.objects, part_key(len(index.tables)), part_bytes(rows)):
                self._refresh_root()
                return rows
            # Another driver took this number: read its rows and allocate what is left.

    def add_samples(self, name: str, samples: Iterable[Sample]) -> str:
        """Keep conversations as `samples/NAME.parquet`; returns the key.

        Files never change: the same content again is a no-op, other content becomes NAME.2.parquet and so on, and
        readers take the newest.
        """
        samples_key(name)  # checks the name
        removed = tombstoned_clips(self.objects)
        table = samples_to_table(sample for sample in samples if sample.clip_id not in removed)
        data = table_bytes(table)
        while True:
            newest = samples_versions(self.objects.list_names(SAMPLES)).get(name, 0)
            if newest and self._holds(samples_key(name, newest), data, table):
                return samples_key(name, newest)
            key = samples_key(name, newest + 1)
            if put_if_absent(self.objects, key, data):
                return key

    def _holds(self, key: str, data: bytes, table: pa.Table) -> bool:
        """Are these the samples? Another version's Parquet may say the same in other bytes."""
        stored = self.objects.get(key)
        if stored == data:
            return True
        try:
            return read_table(stored, SAMPLE_SCHEMA, key).equals(table)
        except StoreFormatError:
            return False  # damaged: a new version is written beside it

    def samples(self, name: str) -> list[Sample]:
        """The newest conversations of a name; none if there are none yet."""
        newest = samples_versions(self.objects.list_names(SAMPLES)).get(name, 0)
        if not newest:
            return []
        key = samples_key(name, newest)
        return table_to_samples(read_table(self.objects.get(key), SAMPLE_SCHEMA, key))

    def sealed_blocks(self, kind: str) -> int:
        """Blocks given out so far: work exists for 0..n-1."""
        return self._index.sealed_blocks(kind)

    def planned_rows(self, kind: str, block: int) -> list[int]:
        """Rows of a block that belong to a clip; the rest of the block is unused."""
        return self._index.planned_rows(kind, block)

    def encoder_groups(self, kind: str) -> dict[str, FeatureIdentity]:
        """Identities by group name."""
        return encoder_groups(self.objects, kind)

    def ensure_group(
        self,
        kind: str,
        identity: FeatureIdentity,
        *,
        batch_shape: int,
        weights_label: str,
        codec: str | None = None,
        new_identity: bool = False,
    ) -> GroupWriter:
        """The group of an encoder, created if need be, with room for every row given out.

        Raises IdentityConflictError if the store holds this encoder under another identity, unless `new_identity`.
        """
        if not new_identity:
            self.check_identity(identity)
        record = GroupRecord(identity=identity, weights=weights_label, batch_shape=batch_shape)
        return create_or_open_group(self.objects, self._index, kind, record, codec=codec)

    def open_group(self, kind: str, group: str) -> GroupWriter:
        """A group that exists, by its name: what a worker needs to write a block."""
        return GroupWriter.open(self.objects, self._index, kind, group)

    def grow_groups(self) -> None:
        """Make room in every group for every row given out."""
        for kind in KINDS:
            for group in self.encoder_groups(kind):
                self.open_group(kind, group).grow()

    def publish_snapshot(self, *, anew: bool = False) -> str:
        """Make what is committed visible to readers; returns the snapshot's id (the old one if nothing is new).

        `anew` reads every receipt, also those that the newest snapshot knows: they may have been replaced.
        """
        self.grow_groups()
        return publish(self.objects, self.block_rows, anew=anew)

    def journal(self, name: str, record: Mapping[str, Any]) -> str:
        """Keep provenance (times, hosts, versions, rates) with its own digest; returns the key."""
        if not JOURNAL_NAME.fullmatch(name):
            raise UserError(f"journal names are letters, digits, '_', '-' and '.', got {name!r}")
        data = journal_bytes(record)
        attempt = 1
        while True:
            key = journal_key(name if attempt == 1 else f"{name}.{attempt}")
            if put_if_absent(self.objects, key, data):
                return key
            attempt += 1

    def stored_identities(self, encoder: str) -> list[FeatureIdentity]:
        """Every identity that the store holds of an encoder, for videos or stills; more than one by --new-identity."""
        found = {
            identity.id: identity
            for kind in KINDS
            for identity in self.encoder_groups(kind).values()
            if identity.encoder == encoder
        }
        return [found[name] for name in sorted(found)]

    def check_identity(self, identity: FeatureIdentity) -> None:
        """Raise `IdentityConflictError` if the store holds the encoder, and under other identities only."""
        stored = self.stored_identities(identity.encoder)
        if not stored or any(known.id == identity.id for known in stored):
            return
        changes = stored[0].changes(identity)
        lines = [f"  {name}: stored {ours!r}, asked {asked!r}" for name, (ours, asked) in changes.items()]
        raise IdentityConflictError(
            f"this store holds {identity.encoder} as {stored[0].group_name}, asked for {identity.group_name}:\n"
            + "\n".join(lines)
            + "\nuse the same settings, or --new-identity to keep both; `merv-pipeline explain` with these options "
            "tells what that would cost"
        )

    def _refresh_root(self) -> None:
        """Name every dataset in zarr.json; a later clip part is seen by the loop, so no name is ever lost."""
        while True:
            wanted = root_document(datasets=self._index.refresh().datasets(), block_rows=self.block_rows)
            if self.objects.get(ROOT_METADATA) == wanted:
                return
            self.objects.replace(ROOT_METADATA, wanted)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"no store can be made at {path}: {error.strerror}; choose another place") from error


def check_holds_nothing_else(objects: Objects, path: Place) -> None:
    """Refuse to make a store among files that are none of its own."""
    names = [name for name in objects.list_names("") if name not in (TEMPORARY, CARD) and not name.startswith(".")]
    if names:
        raise UserError(f"{path} is not empty and not a feature store (it holds {names[0]!r}); choose another --store")

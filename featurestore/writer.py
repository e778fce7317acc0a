"""Writing a store: create it, allocate rows to clips, commit blocks, publish snapshots.

No lock is needed for correctness: every file is put exclusively or depends only on what it describes, and a writer that
loses a race reads what the winner wrote. Rows are allocated by creating the next clip part; a block is committed by its
receipt, which is put last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from featurestore.clips import KINDS, Clip, Kind, Sample
from featurestore.group_writer import GroupWriter
from featurestore.identity import FeatureIdentity
from featurestore.layout import (
    CARD,
    JOURNAL_NAME,
    ROOT_METADATA,
    SAMPLES,
    TEMPORARY,
    array_metadata_key,
    check_block_rows,
    first_row_of_next_block,
    group_metadata_key,
    journal_key,
    part_key,
    samples_key,
    samples_versions,
)
from featurestore.locate import Place, is_url, place_of
from featurestore.objects.base import Objects, machine_faults, put_if_absent
from featurestore.objects.open import open_objects
from featurestore.parquet import read_table, table_bytes
from featurestore.records import (
    journal_bytes,
    tombstoned_clips,
)
from featurestore.schemas import SAMPLE_SCHEMA, samples_to_table, table_to_samples
from featurestore.snapshots import ClipIndex, allocate, part_bytes, publish
from featurestore.zarr_metadata import (
    DEFAULT_CODEC,
    array_specs,
    document_bytes,
    encoder_groups,
    group_document,
    parse_root,
    root_document,
)
from mervcache.errors import IdentityConflictError, StoreFormatError, StoreNotFoundError, UserError
from mervcache.text import redact_all


class StoreWriter:
    """A store that may be extended; make one with `open_or_create` or `open`.

    Safe to use from several processes at once.
    """

    def __init__(self, objects: Objects, block_rows: dict[str, int]) -> None:
        self.objects = objects
        self.block_rows = block_rows
        self._index = ClipIndex(objects, block_rows)

    @classmethod
    def open_or_create(
        cls, path: Place, *, block_rows: Mapping[str, int] | None = None, objects: Objects | None = None
    ) -> StoreWriter:
        """Open the store at `path`, a folder or a bucket's URL, or create one.

        Parameters
        ----------
        block_rows
            Kind ("video", "image") -> clips per block; fixed when the store is created, UserError for others later.
        objects
            The opened place, where the caller has it.
        """
        wanted, path = check_block_rows(block_rows), place_of(path)
        if not is_url(path):
            with machine_faults(f"make {path}"):
                try:
                    Path(path).mkdir(parents=True, exist_ok=True)
                except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
                    raise UserError(
                        f"no store can be made at {path}: {error.strerror}; choose another place"
                    ) from error
        objects = open_objects(path) if objects is None else objects
        objects.cleanup_tmp()
        if not objects.exists(ROOT_METADATA):
            check_holds_nothing_else(objects, path)
            put_if_absent(objects, ROOT_METADATA, root_document(datasets=[], block_rows=wanted))
        store = cls(objects, parse_root(objects.get(ROOT_METADATA))["block_rows"])
        store.check_block_rows(block_rows or {})
        return store

    @classmethod
    def open(cls, path: Place) -> StoreWriter:
        """Open the store at `path`; StoreNotFoundError where there is none.

        A worker must not create one where a share is not mounted.
        """
        objects = open_objects(path)
        if not objects.exists(ROOT_METADATA):
            raise StoreNotFoundError(
                f"there is no feature store at {path}; mount the share that holds it, or extract one"
            )
        return cls(objects, parse_root(objects.get(ROOT_METADATA))["block_rows"])

    def check_block_rows(self, wanted: Mapping[str, int]) -> None:
        """UserError if `wanted`, kind -> clips per block, differs from what the store was made with."""
        for kind, rows in wanted.items():
            if self.block_rows[kind] != rows:
                raise UserError(
                    f"this store has blocks of {self.block_rows[kind]} {kind} rows, got {rows}; "
                    "block rows are fixed when a store is made: leave the option out or choose another --store"
                )

    # Clips and samples

    def clips(self) -> pa.Table:
        """Every allocated row, `CLIP_SCHEMA`, as of now."""
        return self._index.refresh().table

    def add_clips(self, clips: Iterable[Clip], *, retry: bool = False) -> list[tuple[int, Clip]]:
        """Allocate rows to `clips`: returns (row, clip) of what this call added, in order; rows count per kind.

        A clip that has a row already gets none, unless `retry` asks for a new one. Each call starts new blocks.
        """
        removed = tombstoned_clips(self.objects)
        distinct = {clip.clip_id: clip for clip in clips}
        for clip_id in removed.keys() & distinct.keys():
            del distinct[clip_id]
        seen = len(self._index.refresh().tables) if retry else 0  # a retry only yields to rows allocated meanwhile
        while True:
            index = self._index.refresh()
            known = index.clip_ids(from_part=seen)
            new = [clip for clip_id, clip in distinct.items() if clip_id not in known]
            first: dict[Kind, int] = {
                kind: first_row_of_next_block(index.max_row(kind), self.block_rows[kind]) for kind in KINDS
            }
            rows = allocate(new, first)
            if not rows or put_if_absent(self.objects, part_key(len(index.tables)), part_bytes(rows)):
                break
            # Another driver took this part number: read its rows and allocate what is left.
        while True:  # a later clip part is seen by the loop, so no dataset's name is ever lost
            root = root_document(datasets=self._index.refresh().datasets(), block_rows=self.block_rows)
            if self.objects.get(ROOT_METADATA) == root:
                return rows
            self.objects.replace(ROOT_METADATA, root)

    def add_samples(self, name: str, samples: Iterable[Sample]) -> str:
        """Keep conversations as `samples/NAME.parquet`; returns the key.

        Files never change: the same `samples` again are a no-op, others become NAME.2.parquet and so on, and readers
        take the newest of a `name`.
        """
        samples_key(name)  # checks the name
        removed = tombstoned_clips(self.objects)
        table = samples_to_table(sample for sample in samples if sample.clip_id not in removed)
        data = table_bytes(table)
        while True:
            newest = samples_versions(self.objects.list_names(SAMPLES)).get(name, 0)
            if newest:
                key = samples_key(name, newest)
                stored = self.objects.get(key)
                try:  # another version's Parquet may hold the same samples in other bytes
                    if stored == data or read_table(stored, SAMPLE_SCHEMA, key).equals(table):
                        return key
                except StoreFormatError:
                    pass  # damaged: a new version is written
            key = samples_key(name, newest + 1)
            if put_if_absent(self.objects, key, data):
                return key

    def samples(self, name: str) -> list[Sample]:
        """The newest conversations of a `name`; none if there are none yet."""
        newest = samples_versions(self.objects.list_names(SAMPLES)).get(name, 0)
        if not newest:
            return []
        key = samples_key(name, newest)
        return table_to_samples(read_table(self.objects.get(key), SAMPLE_SCHEMA, key))

    # Blocks and groups

    def allocated_blocks(self, kind: str) -> int:
        """Number n of blocks allocated to a `kind` ("video" or "image"): work exists for 0..n-1."""
        return self._index.allocated_blocks(kind)

    def planned_rows(self, kind: str, block: int) -> list[int]:
        """Rows of a `block` of a `kind` that belong to a clip; the rest of the block is unused."""
        return self._index.planned_rows(kind, block)

    def encoder_groups(self, kind: str) -> dict[str, FeatureIdentity]:
        """Identities of the encoders of a `kind`, by group name."""
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
        """The group of an encoder, created if need be, its arrays grown to all allocated rows.

        Parameters
        ----------
        kind
            "video" or "image".
        identity
            What decides the tokens' bytes.
        batch_shape
            Clips per forward: it can decide the last bits, so a group keeps its own.
        weights_label
            "pretrained" or "random:SEED", for readers.
        codec
            Compression of a new group; None: the default, or the group's own.
        new_identity
            Allow an identity beside another one of the same encoder.

        Raises
        ------
        IdentityConflictError
            The store holds this encoder under another identity.
        UserError
            The group exists with another batch shape or codec.
        """
        if not new_identity:
            self.check_identity(identity)
        if not isinstance(batch_shape, int) or batch_shape < 1:  # pyright: ignore[reportUnnecessaryIsInstance]: untyped calls
            raise UserError(f"batch shape must be at least 1 clip, got {batch_shape!r}")
        name, block_rows = identity.group_name, self.block_rows[kind]
        specs = array_specs(identity, kind, blocks=0, block_rows=block_rows, codec=codec or DEFAULT_CODEC)
        documents = {f"{kind}/zarr.json": document_bytes({"zarr_format": 3, "node_type": "group", "attributes": {}})}
        documents |= {array_metadata_key(kind, name, array): spec.document() for array, spec in specs.items()}
        documents[group_metadata_key(kind, name)] = group_document(
            identity, weights_label=weights_label, batch_shape=batch_shape
        )  # last: a group that has its zarr.json has its arrays
        for key, data in documents.items():
            if not self.objects.exists(key):
                put_if_absent(self.objects, key, data)  # what another driver made meanwhile is compared below
        group = self.open_group(kind, name)
        if group.batch_shape != batch_shape:
            raise UserError(
                f"{kind}/{name} was made with batches of {group.batch_shape} clips, got {batch_shape}; "
                "one batch shape gives one set of bytes: use the stored one"
            )
        if codec is not None and group.specs["tokens"].codec != codec:
            raise UserError(f"{kind}/{name} is stored with codec {group.specs['tokens'].codec!r}, got {codec!r}")
        group.grow()
        return group

    def open_group(self, kind: str, group: str) -> GroupWriter:
        """An existing `group` of a `kind`, by name: what a worker needs to write a block."""
        return GroupWriter(self.objects, self._index, kind, group)

    def grow_groups(self) -> None:
        """Grow every group's arrays to all allocated rows."""
        for kind in KINDS:
            for group in self.encoder_groups(kind):
                self.open_group(kind, group).grow()

    def stored_identities(self, encoder: str) -> list[FeatureIdentity]:
        """Every identity that the store holds of an `encoder`; more than one by --new-identity."""
        identities = {
            identity.id: identity
            for kind in KINDS
            for identity in self.encoder_groups(kind).values()
            if identity.encoder == encoder
        }
        return [identities[name] for name in sorted(identities)]

    def check_identity(self, identity: FeatureIdentity) -> None:
        """Raise `IdentityConflictError` if the store holds the encoder of `identity`, and only under others."""
        stored = self.stored_identities(identity.encoder)
        if not stored or any(known.id == identity.id for known in stored):
            return
        changes = stored[0].changes(identity)
        lines = [f"  {name}: stored {before!r}, requested {after!r}" for name, (before, after) in changes.items()]
        raise IdentityConflictError(
            f"this store holds {identity.encoder} as {stored[0].group_name}, requested is {identity.group_name}:\n"
            + "\n".join(lines)
            + "\nuse the same settings, or --new-identity to keep both; `merv-pipeline explain` with these options "
            "reports what that would cost"
        )

    # Records

    def publish_snapshot(self, *, anew: bool = False) -> str:
        """Make what is committed visible to readers; returns the snapshot's id (the old one if nothing is new).

        `anew` reads every receipt, also those that the newest snapshot knows: they may have been replaced.
        """
        self.grow_groups()
        return publish(self.objects, self.block_rows, anew=anew)

    def journal(self, name: str, record: Mapping[str, Any]) -> str:
        """Keep a `record` of provenance (times, hosts, versions, rates) under `name`; returns the key.

        It gets its own digest, and addresses lose their credentials. UserError for a name with characters besides
        letters, digits, _, - and dots.
        """
        if not JOURNAL_NAME.fullmatch(name):
            raise UserError(f"journal names are letters, digits, '_', '-' and '.', got {name!r}")
        data = journal_bytes(redact_all(record))
        attempt = 1
        while True:
            key = journal_key(name if attempt == 1 else f"{name}.{attempt}")
            if put_if_absent(self.objects, key, data):
                return key
            attempt += 1


def check_holds_nothing_else(objects: Objects, path: Place) -> None:
    """UserError for a place that holds other files: no store is made among them."""
    names = [name for name in objects.list_names("") if name not in (TEMPORARY, CARD) and not name.startswith(".")]
    if names:
        raise UserError(f"{path} is not empty and not a feature store (it holds {names[0]!r}); choose another --store")

"""Groups: the Zarr group of one encoder and kind, seen by a writer.

A group's documents are derived: the group's from its identity, an array's from the identity, the block rows, the codec
and the number of sealed blocks. Arrays only grow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from featurestore.blocks import BlockTarget, BlockWriter
from featurestore.errors import StoreFormatError, UserError
from featurestore.identity import FeatureIdentity
from featurestore.layout import (
    GROUP_NAME,
    array_metadata_key,
    group_metadata_key,
    receipt_blocks,
    receipts_prefix,
)
from featurestore.metadata import (
    ArraySpec,
    array_specs,
    document_bytes,
    group_document,
    load_json,
    parse_array,
    read_document,
)
from featurestore.parts import ClipIndex
from featurestore.places.objects import Objects, put_if_absent
from featurestore.receipts import Receipt, read_receipt

MAX_AXIS = 1 << 20  # of any axis in an identity from a stranger
MAX_ITEMS = 1 << 26  # numbers of one clip: 256 MiB of float32, where MERV's raw grids have 3.2 million
MAX_TEXT = 2000  # characters of a text in an identity
_TEXTS = (
    "encoder",
    "weights_sha256",
    "layer",
    "frame_rule",
    "decode",
    "pooling",
    "compute_dtype",
    "storage_dtype",
)


@dataclass(frozen=True, kw_only=True)
class GroupRecord:
    """What made a group: the attributes of its zarr.json."""

    identity: FeatureIdentity
    weights: str  # "pretrained" or "random:SEED"
    batch_shape: int  # clips per forward pass


class GroupWriter:
    """One encoder's arrays of one kind, open for committing blocks."""

    def __init__(
        self, objects: Objects, index: ClipIndex, kind: str, record: GroupRecord, specs: dict[str, ArraySpec]
    ) -> None:
        self.objects = objects
        self.kind = kind
        self.block_rows = index.block_rows[kind]
        self._index = index
        self.identity = record.identity
        self.batch_shape = record.batch_shape
        self.weights_label = record.weights
        self.name = record.identity.group_name
        self.specs = specs

    @classmethod
    def open(cls, objects: Objects, index: ClipIndex, kind: str, group: str) -> GroupWriter:
        """A group that exists; `index` knows which rows are given out."""
        record = read_group(objects, kind, group)
        return cls(objects, index, kind, record, read_arrays(objects, kind, record.identity, index.block_rows[kind]))

    def committed_blocks(self) -> set[int]:
        """Blocks that have a receipt, by listing names."""
        return receipt_blocks(self.objects.list_names(receipts_prefix(self.kind, self.name)))

    def missing_blocks(self) -> list[int]:
        """Blocks given out and not committed, ascending: what is left to do."""
        return sorted(set(range(self._index.sealed_blocks(self.kind))) - self.committed_blocks())

    def receipt(self, block: int) -> Receipt:
        """The receipt of a committed block, checked."""
        return read_receipt(self.objects, self.kind, self.name, block, self.block_rows)

    def begin(self, block: int, rows: Iterable[int] | None = None) -> BlockWriter:
        """Start a block; `rows` are its planned rows where the caller knows them (saves reading the clip parts)."""
        target = BlockTarget(
            objects=self.objects,
            kind=self.kind,
            identity=self.identity,
            specs=self.specs,
            block_rows=self.block_rows,
        )
        planned = self._index.planned_rows(self.kind, block) if rows is None else rows
        return BlockWriter(target, block, planned)

    def grow(self) -> None:
        """Make the arrays' shape cover every row given out; a shape never shrinks, whoever races."""
        while True:
            rows = self._index.sealed_blocks(self.kind) * self.block_rows
            stale = [spec for spec in self._read_specs().values() if spec.rows < rows]
            for spec in stale:  # tokens last in ARRAYS: where tokens have room, the other arrays have.
                self._lengthen(spec.name, rows)
            if not stale:
                return

    def _lengthen(self, array: str, rows: int) -> None:
        """Try once to lengthen the array; where another writer was first, `grow` looks again."""
        key = array_metadata_key(self.kind, self.name, array)
        before = self.objects.get(key)
        spec = parse_array(array, before)
        if spec is not None and spec.rows < rows:
            self.objects.swap(key, before, spec.with_rows(rows).document())

    def _read_specs(self) -> dict[str, ArraySpec]:
        self.specs = read_arrays(self.objects, self.kind, self.identity, self.block_rows)
        return self.specs


def create_or_open_group(
    objects: Objects, index: ClipIndex, kind: str, record: GroupRecord, *, codec: str | None
) -> GroupWriter:
    """Put the documents of a group that are not there; what is there must agree."""
    batch_shape, name = record.batch_shape, record.identity.group_name
    if not isinstance(batch_shape, int) or batch_shape < 1:
        raise UserError(f"batch shape must be at least 1 clip, got {batch_shape!r}")
    specs = array_specs(record.identity, kind, blocks=0, block_rows=index.block_rows[kind], codec=codec or "blosc")
    documents = {f"{kind}/zarr.json": document_bytes({"zarr_format": 3, "node_type": "group", "attributes": {}})}
    documents |= {array_metadata_key(kind, name, array): spec.document() for array, spec in specs.items()}
    documents[group_metadata_key(kind, name)] = group_document(
        record.identity, weights_label=record.weights, batch_shape=batch_shape
    )  # last: a group that has its zarr.json has its arrays
    for key, data in documents.items():
        if not objects.exists(key):
            put_if_absent(objects, key, data)  # what another driver made meanwhile is compared below
    group = GroupWriter.open(objects, index, kind, name)
    if group.batch_shape != batch_shape:
        raise UserError(
            f"{kind}/{name} was made with batches of {group.batch_shape} clips, got {batch_shape}; "
            "one batch shape gives one set of bytes: use the stored one"
        )
    if codec is not None and group.specs["tokens"].codec != codec:
        raise UserError(f"{kind}/{name} is stored with codec {group.specs['tokens'].codec!r}, got {codec!r}")
    group.grow()
    return group


def encoder_groups(objects: Objects, kind: str) -> dict[str, FeatureIdentity]:
    """Identities of a kind's groups by name; folders without a zarr.json are groups not yet made."""
    names = [name for name in objects.list_names(kind) if GROUP_NAME.fullmatch(name)]
    made = [name for name in names if objects.exists(group_metadata_key(kind, name))]
    return {name: read_group(objects, kind, name).identity for name in made}


def read_group(objects: Objects, kind: str, group: str) -> GroupRecord:
    """A group's attributes, every field checked: they may be a stranger's."""
    key = group_metadata_key(kind, group)
    try:
        data = read_document(objects, key)
    except FileNotFoundError:
        raise StoreFormatError(f"{kind}/{group} has no zarr.json: it is not a group of this store") from None
    return parse_group(data, kind, group)


def parse_group(data: bytes, kind: str, group: str) -> GroupRecord:
    """A group's attributes from its zarr.json."""
    key = group_metadata_key(kind, group)
    document = load_json(data, key)
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict):
        raise StoreFormatError(f"{key} has no attributes")
    identity = parse_identity(attributes.get("identity"), key)
    if identity.group_name != group:
        raise StoreFormatError(f"{key} holds the identity of {identity.group_name}, not of its own folder")
    weights, batch_shape = attributes.get("weights"), attributes.get("batch_shape")
    if not isinstance(weights, str) or not isinstance(batch_shape, int) or not 1 <= int(batch_shape) <= MAX_AXIS:
        raise StoreFormatError(f"{key} must name its weights and batch_shape")
    return GroupRecord(identity=identity, weights=weights, batch_shape=batch_shape)


def parse_identity(record: Any, what: str) -> FeatureIdentity:
    """An identity whose sizes can be trusted to be small positive integers."""
    try:
        identity = FeatureIdentity.from_dict(record)
        sizes = [*identity.grid, identity.width, identity.num_frames, identity.still_period]
        good = len(identity.grid) == 3 and all(type(n) is int and 1 <= n <= MAX_AXIS for n in sizes)
        good = good and type(identity.prefix_tokens) is int and 0 <= identity.prefix_tokens <= MAX_AXIS
        good = good and math.prod(sizes[:4]) <= MAX_ITEMS
        good = good and identity.grid[0] * max(1, identity.prefix_tokens) * identity.width <= MAX_ITEMS
        texts = [getattr(identity, name) for name in _TEXTS]
        good = good and all(type(text) is str and len(text) <= MAX_TEXT for text in texts)
        good = good and isinstance(identity.architecture, dict) and isinstance(identity.preprocessing, dict)
        good = good and bool(identity.id)  # it is made of canonical JSON, which has no NaN and an end
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError, UserError) as error:
        raise StoreFormatError(f"{what} holds no usable identity: {type(error).__name__}: {error}") from error
    if not good:
        raise StoreFormatError(
            f"{what}: grid, width, num_frames and still_period must be positive integers of at most {MAX_ITEMS} tokens "
            "values a clip, all other fields of the types that they have here"
        )
    return identity


def read_arrays(objects: Objects, kind: str, identity: FeatureIdentity, block_rows: int) -> dict[str, ArraySpec]:
    """The specs on disk; raises unless they are those of the identity, up to codec and rows."""
    specs: dict[str, ArraySpec] = {}
    for name, expected in array_specs(identity, kind, blocks=0, block_rows=block_rows).items():
        key = array_metadata_key(kind, identity.group_name, name)
        try:
            stored = parse_array(name, read_document(objects, key))
        except FileNotFoundError:
            raise StoreFormatError(f"{key} is missing; run `merv-pipeline verify`") from None
        if stored is None or (stored.row_shape, stored.dtype, stored.block_rows) != (
            expected.row_shape,
            expected.dtype,
            expected.block_rows,
        ):
            raise StoreFormatError(f"{key} does not describe the {name} of {identity.group_name}; rewrite or repair it")
        specs[name] = stored
    return specs

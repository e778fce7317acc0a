"""Files of a store derived from other files: zarr.json documents, a lost receipt, a lost clip part."""

from __future__ import annotations

from contextlib import suppress

from featurestore.clip_names import clip_of_id
from featurestore.clips import KINDS
from featurestore.group_writer import GroupWriter
from featurestore.layout import (
    ARRAYS,
    ROOT_METADATA,
    allocated_blocks,
    array_metadata_key,
    first_row_of_next_block,
    rows_of,
    shard_key,
)
from featurestore.maintenance.tombstone import open_shards
from featurestore.maintenance.verify import Verification
from featurestore.objects.base import Objects
from featurestore.parquet import read_table, table_file
from featurestore.records import Receipt, RowOutcome, row_digest
from featurestore.schemas import CLIP_SCHEMA
from featurestore.shards import Shard, decode_all
from featurestore.snapshots import Snapshot, allocate, column, part_bytes, read_snapshot_table
from featurestore.zarr_metadata import (
    CODECS,
    ArraySpec,
    array_specs,
    document_bytes,
    group_document,
    parse_array,
    parse_root,
    read_document,
    read_group,
    root_document,
)
from mervcache.errors import MervCacheError, StoreFormatError
from mervcache.files import sha256_hex

_COLUMNS = ("row", "digest", "failed_row", "failed_scope", "failed_reason")  # of a group in a snapshot's table
_MAX_RETRIED = 16  # clips with a second row that end a clip part


def derive_metadata(objects: Objects, other: Objects | None, key: str, check: Verification) -> bytes:
    """The bytes that the zarr.json at `key` should have; StoreFormatError where too little is left to know them."""
    folders = key.split("/")[:-1]
    if not folders:
        datasets = check.index.datasets() if check.index else []
        if check.newest:
            return root_document(datasets=datasets, block_rows=check.newest.block_rows)
        for source in (objects, other):
            with suppress(MervCacheError, FileNotFoundError):
                if source is not None:
                    block_rows = parse_root(read_document(source, ROOT_METADATA))["block_rows"]
                    return root_document(datasets=datasets, block_rows=block_rows)
        raise StoreFormatError("no snapshot names the rows of its blocks; give a copy with --from")
    if len(folders) == 1:
        return document_bytes({"zarr_format": 3, "node_type": "group", "attributes": {}})
    kind, group = folders[:2]
    if len(folders) == 3:
        return _derive_array(objects, kind, group, folders[2], check)
    record = check.newest.groups.get(f"{kind}/{group}") if check.newest else None
    if record is None and other is not None:
        with suppress(MervCacheError, FileNotFoundError):
            record = read_group(other, kind, group)
    if record is None:
        raise StoreFormatError("no snapshot has this group's identity; give a copy with --from")
    return group_document(record.identity, weights_label=record.weights, batch_shape=record.batch_shape)


def _derive_array(objects: Objects, kind: str, group: str, array: str, check: Verification) -> bytes:
    """From the identity and the clip parts; the codec is that of the group's other arrays that decodes the shards."""
    identity, block_rows = read_group(objects, kind, group).identity, check.block_rows[kind]
    if check.index is None:
        raise StoreFormatError("the clip parts that give its number of rows are damaged themselves")
    codecs: list[str] = []
    for name in ARRAYS:
        with suppress(MervCacheError, FileNotFoundError):
            stored = read_document(objects, array_metadata_key(kind, group, name)) if name != array else None
            if stored and (spec := parse_array(name, stored)):
                codecs.append(spec.codec)
    blocks = allocated_blocks(check.index.max_row(kind), block_rows)
    for codec in [*codecs, *CODECS]:
        specs = array_specs(identity, kind, blocks=blocks, block_rows=block_rows, codec=codec)
        if array not in specs:
            raise StoreFormatError(f"the identity of {group} has no array {array}")
        if _fits(objects, kind, group, specs[array], blocks):
            return specs[array].document()
    raise StoreFormatError("its shards are of no known codec")


def _fits(objects: Objects, kind: str, group: str, spec: ArraySpec, blocks: int) -> bool:
    """Whether any existing shard decodes; True where there is none, for then any codec will do."""
    has_shards = False
    for block in range(blocks):
        key = shard_key(kind, group, spec.name, block)
        if objects.exists(key):
            has_shards = True
            with suppress(MervCacheError):
                shard = Shard(spec, objects.open(key))
                for row in shard.rows()[:1]:
                    shard.decode(row)
                return True
    return not has_shards


def derive_receipt(group: GroupWriter, block: int, named: str, check: Verification) -> Receipt:
    """A receipt in the place of the lost one with digest `named`, from the shards and the newest snapshot's rows.

    Media digests and decoders are in receipts only, so the new one has none. Raises StoreFormatError unless every row
    of the shards has the digest that the snapshot names.
    """
    rows, snapshot = rows_of(block, group.block_rows), check.newest
    assert snapshot is not None
    names = ["kind", *(column(group.name, suffix) for suffix in _COLUMNS)]
    known: dict[int, RowOutcome] = {}  # the newest good row and the newest failure of each clip
    for entry in read_snapshot_table(group.objects, snapshot, names).to_pylist():
        kind, row, digest, failed_row, scope, reason = (entry[name] for name in names)
        if kind == group.kind and failed_row in rows:
            known[failed_row] = RowOutcome(state="failed", scope=scope, reason=reason)
        if kind == group.kind and row in rows:
            known[row] = RowOutcome(state="ok", digest=digest)
    planned = set(check.index.rows_between(group.kind, rows.start, rows.stop) if check.index else ())
    shards = open_shards(group.objects, group.kind, group.name, block, group.specs)
    if set(shards) != set(group.specs):
        raise StoreFormatError("shards of the block are missing as well; give a copy with --from")

    def outcome(row: int) -> RowOutcome:
        if row not in planned:
            return RowOutcome(state="empty")
        expected = known.get(row)
        stored = decode_all(shards, row - rows.start)
        if stored is None:
            if expected is not None and expected.state == "ok":
                raise StoreFormatError(f"the shards lack row {row}, which the snapshot has")
            return expected or RowOutcome(state="skipped")
        digest = row_digest(stored)
        if expected is not None and expected.digest != digest:
            raise StoreFormatError(f"row {row} in the shards is not the one that the snapshot has")
        return RowOutcome(state="ok", digest=digest)

    receipt = Receipt(
        kind=group.kind,
        group=group.name,
        block=block,
        rows=tuple(map(outcome, rows)),
        shards={name: shard.record() for name, shard in shards.items()},
        generation=2,
        replaces=named,
    )
    for shard in shards.values():
        shard.close()
    return receipt


def derive_part(objects: Objects, snapshot: Snapshot, key: str) -> bytes | None:
    """The bytes of a lost clip part, from the clips that the snapshot lists; None unless they have the part's digest.

    A snapshot lists clips in the order in which they got rows, rows follow one another, and an id holds all of a clip.
    Not enough where the part gave second rows to clips (a retry), or where another Parquet library writes other bytes.
    """
    with suppress(MervCacheError, FileNotFoundError, ValueError):
        earlier: set[str] = set()
        later: set[str] = set()
        first = dict.fromkeys(KINDS, 0)  # row of the part, by kind
        for part in snapshot.parts.keys() - {key}:
            table = read_table(table_file(objects, part), CLIP_SCHEMA, part)
            (earlier if part < key else later).update(table["clip_id"].to_pylist())
            for row, kind in zip(table["row"].to_pylist(), table["kind"].to_pylist(), strict=True):
                if part < key:
                    first[kind] = max(first[kind], first_row_of_next_block(row, snapshot.block_rows[kind]))
        listed = read_snapshot_table(objects, snapshot, ["clip_id", "kind"])
        pairs = zip(listed["clip_id"].to_pylist(), listed["kind"].to_pylist(), strict=True)
        clips = [clip_of_id(clip_id, kind) for clip_id, kind in pairs if clip_id not in earlier]
        # The part's clips come first among these, and end at the last that no later part has, or a little after:
        # at one that a later part has as well.
        least = max((number + 1 for number, clip in enumerate(clips) if clip.clip_id not in later), default=0)
        for stop in range(least, min(len(clips), least + _MAX_RETRIED) + 1):
            data = part_bytes(allocate(clips[:stop], first))
            if sha256_hex(data) == snapshot.parts[key]:
                return data
    return None

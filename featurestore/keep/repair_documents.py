"""Documents (`zarr.json`) made again from what they describe: rows, identities and what snapshots remember of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from featurestore.errors import MervCacheError, StoreFormatError
from featurestore.groups import GroupRecord, parse_group, read_group
from featurestore.keep.flips import SEARCH_BYTES, first_whole
from featurestore.keep.verify import Verification
from featurestore.layout import ARRAYS, ROOT_METADATA, array_metadata_key, sealed_blocks, shard_key
from featurestore.metadata import (
    CODECS,
    ArraySpec,
    array_specs,
    document_bytes,
    group_document,
    parse_array,
    parse_root,
    read_document,
    root_document,
)
from featurestore.places.objects import Objects, get_bounded
from featurestore.shards import Shard


def derived_document(objects: Objects, other: Objects | None, key: str, check: Verification) -> bytes:
    """The bytes that the zarr.json at `key` should have; raises where too little is left to know them."""
    parts = key.split("/")
    if key == ROOT_METADATA:
        return _root(objects, other, check)
    if len(parts) == 2:
        return document_bytes({"zarr_format": 3, "node_type": "group", "attributes": {}})
    if len(parts) == 3:
        return _group(objects, other, key, parts[0], parts[1], check)
    return _array(objects, parts[0], parts[1], parts[2], check)


def _root(objects: Objects, other: Objects | None, check: Verification) -> bytes:
    datasets = check.index.datasets() if check.index else []
    if check.newest:
        return root_document(datasets=datasets, block_rows=check.newest.block_rows)
    if found := _one_bit_away(objects, ROOT_METADATA, _is_root):
        return found
    for source in (objects, other):
        with suppress(MervCacheError, FileNotFoundError):
            if source is not None:
                block_rows = parse_root(read_document(source, ROOT_METADATA))["block_rows"]
                return root_document(datasets=datasets, block_rows=block_rows)
    raise StoreFormatError("no snapshot says how many rows its blocks have; give a copy with --from")


def _is_root(data: bytes) -> bool:
    root = parse_root(data)
    return data == root_document(datasets=root["datasets"], block_rows=root["block_rows"])


def _group(objects: Objects, other: Objects | None, key: str, kind: str, group: str, check: Verification) -> bytes:
    if check.newest and (summary := check.newest.groups.get(f"{kind}/{group}")):
        return _document(summary)

    def is_whole(data: bytes) -> bool:
        return data == _document(parse_group(data, kind, group))

    if found := _one_bit_away(objects, key, is_whole):
        return found
    if other is not None:
        with suppress(MervCacheError, FileNotFoundError):
            return _document(read_group(other, kind, group))
    raise StoreFormatError("no snapshot knows this group's identity; give a copy with --from")


def _document(record: GroupRecord) -> bytes:
    return group_document(record.identity, weights_label=record.weights, batch_shape=record.batch_shape)


def _one_bit_away(objects: Objects, key: str, is_whole: Callable[[bytes], bool]) -> bytes | None:
    def check(data: bytes) -> bool:
        try:
            return is_whole(data)
        except (MervCacheError, TypeError, KeyError):
            return False

    with suppress(FileNotFoundError, MervCacheError):
        data = get_bounded(objects, key, SEARCH_BYTES // 4)
        return first_whole(data, range(len(data)), check)
    return None


def _array(objects: Objects, kind: str, group: str, array: str, check: Verification) -> bytes:
    identity, block_rows = read_group(objects, kind, group).identity, check.block_rows[kind]
    if check.index is None:
        raise StoreFormatError("the clip parts that say how many rows it has are damaged themselves")
    blocks = sealed_blocks(check.index.max_row(kind), block_rows)
    for codec in [*_codecs_of_siblings(objects, kind, group, array), *CODECS]:
        specs = array_specs(identity, kind, blocks=blocks, block_rows=block_rows, codec=codec)
        if array not in specs:
            raise StoreFormatError(f"the identity of {group} has no array {array}")
        if _fits(objects, kind, group, specs[array], blocks):
            return specs[array].document()
    raise StoreFormatError("its shards are of no known codec")


def _codecs_of_siblings(objects: Objects, kind: str, group: str, array: str) -> list[str]:
    found = []
    for name in ARRAYS:
        with suppress(MervCacheError, FileNotFoundError):
            stored = read_document(objects, array_metadata_key(kind, group, name)) if name != array else None
            if stored and (spec := parse_array(name, stored)):
                found.append(spec.codec)
    return found


def _fits(objects: Objects, kind: str, group: str, spec: ArraySpec, blocks: int) -> bool:
    """Does any shard that is there decode? True where there is none: any codec will do."""
    has_shards = False
    for block in range(blocks):
        key = shard_key(kind, group, spec.name, block)
        if not objects.exists(key):
            continue
        has_shards = True
        with suppress(MervCacheError):
            shard = Shard(spec, objects.open(key))
            for row in shard.rows()[:1]:
                shard.decode(row)
            return True
    return not has_shards

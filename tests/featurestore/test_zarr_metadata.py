"""zarr.json documents are what zarr-python would write, and untrusted ones are checked."""

from __future__ import annotations

import hashlib
import json

import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from featurestore.storage_dtypes import item_facts
from featurestore.zarr_metadata import (
    DIMENSIONS,
    MAX_CHUNK_BYTES,
    ArraySpec,
    array_specs,
    clip_bytes,
    parse_array,
    parse_root,
    root_document,
)
from mervcache.errors import StoreFormatError, UserError
from mervcache.files import load_json

ITEMS = ("float16", "float32", "uint16", "uint8")  # Zarr data types of the arrays of all storage dtypes


def spec_of(name="tokens", dtype="float16", codec="blosc", **changes) -> ArraySpec:
    shape = {"tokens": (4, 2, 2, 8), "prefix": (4, 3, 8), "scale": (8,)}[name]
    values = {"name": name, "rows": 8, "row_shape": shape, "block_rows": 4, "dtype": dtype, "codec": codec}
    return ArraySpec(**values | changes)


@pytest.mark.parametrize("codec", ["blosc", "none"])
@pytest.mark.parametrize("dtype", ITEMS)
@pytest.mark.parametrize("name", ["tokens", "prefix", "scale"])
def test_the_document_is_the_one_that_zarr_python_makes(name, dtype, codec):
    spec = spec_of(name, dtype, codec)
    fill_value, item_bytes = item_facts(dtype, None)
    blosc = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=item_bytes, blocksize=1 << 20)
    store = zarr.storage.MemoryStore()
    zarr.create_array(
        store,
        shape=(8, *spec.row_shape),
        shards=(4, *spec.row_shape),
        chunks=(1, *spec.row_shape),
        dtype=dtype,
        fill_value=float("nan") if fill_value == "NaN" else fill_value,
        compressors=[blosc, Crc32cCodec()] if codec == "blosc" else [Crc32cCodec()],
        dimension_names=DIMENSIONS[name],
    )
    expected = json.loads(store._store_dict["zarr.json"].to_bytes())
    assert json.loads(spec.document()) == expected


@pytest.mark.parametrize("codec", ["blosc", "none"])
@pytest.mark.parametrize("dtype", ITEMS)
def test_a_document_parses_back_to_its_spec(dtype, codec):
    spec = spec_of(dtype=dtype, codec=codec, logical_dtype="bfloat16" if dtype == "uint16" else None)
    assert parse_array("tokens", spec.document()) == spec


def changed(path, value):
    document = json.loads(spec_of().document())
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["codecs"], [{"name": "bytes", "configuration": {"endian": "little"}}]),
        (["codecs", 0, "configuration", "codecs", 1, "configuration", "cname"], "lz4"),
        (["codecs", 0, "configuration", "index_location"], "start"),
        (["codecs", 0, "configuration", "chunk_shape"], [2, 4, 2, 2, 8]),
        (["chunk_grid", "configuration", "chunk_shape"], [1 << 40, 4, 2, 2, 8]),
        (["data_type"], "float64"),
        (["data_type"], ["float16"]),
        (["shape"], []),
        (["shape"], None),
        (["fill_value"], 0),
        (["chunk_key_encoding", "configuration", "separator"], "."),
    ],
)
def test_other_arrays_are_left_to_zarr(path, value):
    assert parse_array("tokens", changed(path, value)) is None


def test_a_row_that_claims_gigabytes_is_refused():
    document = json.loads(spec_of().document())
    side = MAX_CHUNK_BYTES // 2
    document["shape"] = [4, 4, 2, 2, side]
    document["chunk_grid"]["configuration"]["chunk_shape"] = [4, 4, 2, 2, side]
    document["codecs"][0]["configuration"]["chunk_shape"] = [1, 4, 2, 2, side]
    with pytest.raises(StoreFormatError, match="outside 1"):
        parse_array("tokens", json.dumps(document).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 200_000])
def test_broken_or_endless_json_is_a_format_error(data):
    with pytest.raises(StoreFormatError, match="not readable JSON"):
        load_json(data, "it")


def test_the_root_names_its_format_datasets_and_block_rows():
    data = root_document(datasets=["b", "a"], block_rows={"video": 4, "image": 3})
    record = {"format": 1, "datasets": ["a", "b"], "block_rows": {"video": 4, "image": 3}}
    text = '{"block_rows":{"image":3,"video":4},"datasets":["a","b"],"format":1}'
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    assert json.loads(data)["attributes"] == {"merv_cache": record | {"digest": digest}}
    assert parse_root(data) == {"datasets": ["a", "b"], "block_rows": {"video": 4, "image": 3}}


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "not a feature store"),
        ({"merv_cache": {"format": 2}}, "has format 2, this version reads format 1"),
        ({"merv_cache": {"format": 1, "datasets": "x", "block_rows": {}}}, "datasets"),
        ({"merv_cache": {"format": 1, "datasets": [], "block_rows": {"video": 0}}}, "block_rows"),
        ({"merv_cache": {"format": 1, "datasets": [], "block_rows": {"audio": 1}}}, "block_rows"),
        ({"merv_cache": {"format": 1, "datasets": [], "block_rows": [1]}}, "block_rows"),
    ],
)
def test_a_root_that_is_not_ours_is_refused(attributes, message):
    with pytest.raises(StoreFormatError, match=message):
        parse_root(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode())


def test_a_group_holds_tokens_last_and_what_its_storage_needs(make):
    def names(**changes):
        return list(array_specs(make.identity(**changes), "video", blocks=1, block_rows=4))

    assert names() == ["tokens"]
    assert names(prefix_tokens=5, storage_dtype="bfloat16") == ["prefix", "tokens"]
    assert names(prefix_tokens=5, storage_dtype="uint8") == ["prefix", "scale", "offset", "tokens"]


def test_a_still_stores_one_period(make):
    specs = array_specs(make.identity(), "image", blocks=1, block_rows=4)
    assert specs["tokens"].row_shape == (2, 2, 2, 8)


def test_a_clip_takes_the_bytes_of_its_row_in_every_array(make):
    assert clip_bytes(make.identity(), "video") == 4 * 2 * 2 * 8 * 2
    assert clip_bytes(make.identity(), "image") == 2 * 2 * 2 * 8 * 2
    quantised = make.identity(prefix_tokens=5, storage_dtype="uint8")  # prefix tokens stay float16, two float32 scales
    assert clip_bytes(quantised, "video") == 4 * 2 * 2 * 8 + 4 * 5 * 8 * 2 + 2 * 8 * 4


def test_unknown_codecs_are_listed():
    with pytest.raises(UserError, match="codec must be one of blosc, none, got 'lz4'"):
        spec_of(codec="lz4")

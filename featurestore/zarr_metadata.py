"""`zarr.json` documents of arrays and groups, and the codec table.

Bytes are a pure function of what is described, so a document can be verified by making it again. zarr-python is not
imported; tests prove that zarr-python, tensorstore and xarray read the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numcodecs import blosc

from featurestore.identity import FeatureIdentity
from featurestore.layout import (
    FORMAT_VERSION,
    GROUP_NAME,
    MAX_BLOCK_ROWS,
    array_metadata_key,
    check_block_rows,
    group_metadata_key,
)
from featurestore.objects.base import Objects, get_bounded
from featurestore.storage_dtypes import SIDECAR_DTYPE, STORAGE_DTYPES, item_facts, prefix_dtype, storage_dtype
from mervcache.errors import StoreFormatError, UserError
from mervcache.files import is_json_list, is_json_object, load_json, record_digest

MAX_CHUNK_BYTES = 128 << 20  # a clip's raw grid is under 20 MiB; a larger claim is hostile
MAX_DOCUMENT_BYTES = 4 << 20  # of a zarr.json
MAX_AXIS = 1 << 20  # of any axis in an untrusted identity
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
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "tokens": ("row", "time", "height", "width", "channel"),
    "prefix": ("row", "time", "token", "channel"),
    "scale": ("row", "channel"),
    "offset": ("row", "channel"),
}
_LITTLE_ENDIAN: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
_INDEX_CODECS = [_LITTLE_ENDIAN, {"name": "crc32c"}]
_BLOSC_HEADER_BYTES = 16
_BLOSC_BLOCK_BYTES = 1 << 20  # automatic blocks at level 1 compress 1.27x where this gives 1.45x
# With more than one blosc thread the same array gives different bytes. zarr-python sets this too.
blosc.use_threads = False


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How a row's items are compressed; None leaves them as they are."""

    metadata: Callable[[int], list[dict[str, Any]]]  # bytes of an item -> Zarr codecs between `bytes` and `crc32c`
    compress: Callable[[np.ndarray], bytes] | None
    decompress: Callable[[np.ndarray, np.ndarray], None] | None  # uint8 payload, contiguous out; ValueError if damaged


def _blosc_metadata(item_bytes: int) -> list[dict[str, Any]]:
    sizes = {"typesize": item_bytes, "blocksize": _BLOSC_BLOCK_BYTES}
    return [{"name": "blosc", "configuration": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle"} | sizes}]


def _blosc_decompress(payload: np.ndarray, out: np.ndarray) -> None:
    # blosc trusts the sizes in its header, which decide how much it writes and how far it reads.
    claimed = int(payload[4:8].view("<u4")[0]) if len(payload) >= _BLOSC_HEADER_BYTES else -1
    if claimed != out.nbytes:
        raise ValueError(f"claims {claimed} bytes instead of {out.nbytes}")
    if int(payload[12:16].view("<u4")[0]) != len(payload):
        raise ValueError("claims to be compressed to another length than it has")
    try:
        blosc.decompress(payload, out)
    except RuntimeError as error:
        raise ValueError(f"cannot be decompressed ({error})") from error


CODECS: dict[str, Codec] = {
    "blosc": Codec(
        metadata=_blosc_metadata,
        compress=lambda items: blosc.compress(items, b"zstd", 1, blosc.SHUFFLE, _BLOSC_BLOCK_BYTES),
        decompress=_blosc_decompress,
    ),
    "none": Codec(metadata=lambda _: [], compress=None, decompress=None),
}
DEFAULT_CODEC = "blosc"


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array whose chunk is a clip's row and whose shard is a block."""

    name: str  # "tokens", "prefix", "scale" or "offset"
    rows: int  # length of axis 0
    row_shape: tuple[int, ...]
    block_rows: int
    dtype: str  # Zarr data type of the stored items, which numpy knows by the same name
    codec: str = DEFAULT_CODEC  # a name in CODECS
    logical_dtype: str | None = None  # name of the storage dtype where it is not that of the Zarr data type

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise UserError(f"codec must be one of {', '.join(CODECS)}, got {self.codec!r}")
        if self.row_bytes > MAX_CHUNK_BYTES or self.row_bytes < 1:
            raise StoreFormatError(
                f"{self.name}: one row of shape {self.row_shape} {self.dtype} takes {self.row_bytes} bytes, "
                f"outside 1..{MAX_CHUNK_BYTES}"
            )

    @cached_property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * item_facts(self.dtype, self.logical_dtype)[1]

    @property
    def index_bytes(self) -> int:
        """Size of a shard's index: offset and length of each row, uint64, and a crc32c."""
        return self.block_rows * 16 + 4

    def with_rows(self, rows: int) -> ArraySpec:
        return replace(self, rows=rows)

    def rewrite_command(self, path: str, block_rows: int) -> str:
        """A shell command by which zarr-python rewrites the array at `path`, whatever its chunks and codecs."""
        fill_value, item_bytes = item_facts(self.dtype, self.logical_dtype)
        compressors = [f"BloscCodec(**{c['configuration']})" for c in CODECS[self.codec].metadata(item_bytes)]
        arguments = {
            "overwrite": True,
            "data": f"zarr.open_array('{path}')[:].astype('{self.dtype}')",
            "chunks": (1, *self.row_shape),
            "shards": (block_rows, *self.row_shape),
            "compressors": f"[{', '.join([*compressors, 'Crc32cCodec()'])}]",
            "fill_value": f"float('{fill_value}')" if isinstance(fill_value, str) else fill_value,
        }
        call = f"zarr.create_array('{path}', {', '.join(f'{name}={value}' for name, value in arguments.items())})"
        return f'python -c "import zarr; from zarr.codecs import *; {call}"'

    def document(self) -> bytes:
        """The array's zarr.json."""
        return document_bytes(self.to_metadata())

    def to_metadata(self) -> dict[str, Any]:
        """The content of the array's zarr.json."""
        fill_value, item_bytes = item_facts(self.dtype, self.logical_dtype)
        # Single bytes have no order, and zarr-python names none.
        to_bytes = _LITTLE_ENDIAN if item_bytes > 1 else {"name": "bytes"}
        sharding = {
            "chunk_shape": [1, *self.row_shape],
            "codecs": [to_bytes, *CODECS[self.codec].metadata(item_bytes), {"name": "crc32c"}],
            "index_codecs": _INDEX_CODECS,
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.rows, *self.row_shape],
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.block_rows, *self.row_shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill_value,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {"logical_dtype": self.logical_dtype} if self.logical_dtype else {},
            "dimension_names": list(DIMENSIONS[self.name]),
            "storage_transformers": [],
        }


def array_specs(
    identity: FeatureIdentity, kind: str, *, blocks: int, block_rows: int, codec: str = DEFAULT_CODEC
) -> dict[str, ArraySpec]:
    """The arrays of an encoder's group, by name, in the order of layout.ARRAYS."""
    time, height, width = identity.grid_of(kind)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}  # array -> (shape of a row, name of a dtype)
    if identity.prefix_tokens:
        shape = (time, identity.prefix_tokens, identity.width)
        shapes["prefix"] = shape, prefix_dtype(identity.storage_dtype)
    if storage_dtype(identity.storage_dtype).is_affine:
        shapes |= dict.fromkeys(("scale", "offset"), ((identity.width,), SIDECAR_DTYPE))
    shapes["tokens"] = (time, height, width, identity.width), identity.storage_dtype

    specs: dict[str, ArraySpec] = {}
    for name, (shape, logical) in shapes.items():
        dtype = STORAGE_DTYPES[logical].zarr_dtype if logical in STORAGE_DTYPES else logical
        specs[name] = ArraySpec(
            name=name,
            rows=blocks * block_rows,
            row_shape=shape,
            block_rows=block_rows,
            dtype=dtype,
            codec=codec,
            logical_dtype=logical if logical != dtype else None,
        )
    return specs


def clip_bytes(identity: FeatureIdentity, kind: str) -> int:
    """Stored bytes of one clip before compression, in all arrays of its encoder."""
    return sum(spec.row_bytes for spec in array_specs(identity, kind, blocks=0, block_rows=1).values())


def parse_array(name: str, data: bytes) -> ArraySpec | None:
    """The spec of an array that is read and written here; None of any other valid Zarr array."""
    document = load_json(data, f"zarr.json of {name}")
    try:
        chunk_shape = document["chunk_grid"]["configuration"]["chunk_shape"]
        spec = ArraySpec(
            name=name,
            rows=int(document["shape"][0]),
            row_shape=tuple(int(n) for n in document["shape"][1:]),
            block_rows=int(chunk_shape[0]),
            dtype=document["data_type"],
            logical_dtype=document.get("attributes", {}).get("logical_dtype"),
        )
        if not 1 <= spec.block_rows <= MAX_BLOCK_ROWS:
            return None
        decisive = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs")
        for candidate in (replace(spec, codec=codec) for codec in CODECS):
            expected = candidate.to_metadata()
            if all(expected[key] == document.get(key) for key in decisive):
                return candidate
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError, UserError):
        pass
    return None


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


@dataclass(frozen=True, kw_only=True)
class GroupRecord:
    """What made a group: the attributes of its zarr.json."""

    identity: FeatureIdentity
    weights: str  # "pretrained" or "random:SEED"
    batch_shape: int  # clips per forward pass


def encoder_groups(objects: Objects, kind: str) -> dict[str, FeatureIdentity]:
    """Identities of a kind's groups by name; folders without a zarr.json are groups not yet made."""
    names = [name for name in objects.list_names(kind) if GROUP_NAME.fullmatch(name)]
    made = [name for name in names if objects.exists(group_metadata_key(kind, name))]
    return {name: read_group(objects, kind, name).identity for name in made}


def read_group(objects: Objects, kind: str, group: str) -> GroupRecord:
    """A group's attributes, every field checked: they may be untrusted."""
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
    attributes = document.get("attributes") if is_json_object(document) else None
    if not is_json_object(attributes):
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


def group_document(identity: FeatureIdentity, *, weights_label: str, batch_shape: int) -> bytes:
    """The zarr.json of an encoder's group: the whole identity, and what else shaped the bits."""
    return _group(digested({"identity": identity.to_dict(), "weights": weights_label, "batch_shape": batch_shape}))


def root_document(*, datasets: list[str], block_rows: Mapping[str, int]) -> bytes:
    """The zarr.json at the top of a store."""
    record = {"format": FORMAT_VERSION, "datasets": sorted(datasets), "block_rows": dict(block_rows)}
    return _group({"merv_cache": digested(record)})


def parse_root(data: bytes) -> dict[str, Any]:
    """{"datasets": [...], "block_rows": {...}} of a store's own zarr.json, checked."""
    document = load_json(data, "the store's zarr.json")
    attributes = document.get("attributes") if is_json_object(document) else None
    record = attributes.get("merv_cache") if is_json_object(attributes) else None
    if not is_json_object(record):
        raise StoreFormatError(
            "zarr.json has no merv_cache attribute: this Zarr group is not a feature store; "
            "give the path of one that `merv-pipeline extract` made"
        )
    version = record.get("format")
    if type(version) is bool or version != FORMAT_VERSION:
        raise StoreFormatError(
            f"the store has format {version!r}, this version reads format {FORMAT_VERSION}; update merv-pipeline"
        )
    datasets, block_rows = record.get("datasets"), record.get("block_rows")
    if not is_json_list(datasets) or not all(isinstance(name, str) for name in datasets):
        raise StoreFormatError("merv_cache.datasets in zarr.json must be a list of names")
    try:
        return {"datasets": datasets, "block_rows": check_block_rows(block_rows)}
    except (UserError, TypeError, ValueError, AttributeError) as error:
        raise StoreFormatError(f"merv_cache.block_rows in zarr.json is not usable: {error}") from error


def _group(attributes: dict[str, Any]) -> bytes:
    return document_bytes({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def digested(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a digest of its own, for documents that cannot be derived from others."""
    return record | {"digest": record_digest(record)[:32]}


def without_digest(data: bytes) -> bytes:
    """A root's or group's document as older versions wrote it, without its digest."""
    document = load_json(data, "a zarr.json")
    attributes = document["attributes"]
    attributes.get("merv_cache", attributes).pop("digest", None)
    return document_bytes(document)


def read_document(objects: Objects, key: str) -> bytes:
    """A zarr.json of plausible size."""
    return get_bounded(objects, key, MAX_DOCUMENT_BYTES)


def document_bytes(value: Any) -> bytes:
    """The text of a zarr.json: sorted keys, indented."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()

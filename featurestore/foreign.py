"""Arrays that somebody rewrote with other codecs or chunks: read through zarr-python, after a look at what it would do.

zarr-python trusts metadata: a chunk may claim any size, and a few kilobytes of gzip can stand for gigabytes. So only
plain codecs are let through, chunks are bounded, and a compressed chunk is measured before it is decoded. Slow, and
rarely needed: stores of this format are read directly (`shards.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from featurestore.objects.base import Objects, get_bounded
from featurestore.zarr_metadata import MAX_CHUNK_BYTES, ArraySpec, read_document
from mervcache.errors import MervCacheError, StoreDamagedError, StoreFormatError
from mervcache.files import load_json

_MAX_CHUNKS = 4096  # objects read for one row
_COMPRESSORS = ("gzip", "zstd", "blosc")
_BLOSC_HEADER_BYTES = 16
_PIECE_BYTES = 1 << 20


def foreign_reader(objects: Objects, path: str, expected: ArraySpec) -> Callable[[int, np.ndarray], None]:
    """A function that reads a row of the array at `path`, whatever its chunks, into an array of the expected shape."""
    import zarr  # heavy, and only needed here

    layout = _Layout(load_json(read_document(objects, f"{path}/zarr.json"), f"{path}/zarr.json"), path)
    try:
        source = zarr.open_array(objects.as_zarr(), path=path, mode="r")
    except Exception as error:  # zarr raises many kinds for metadata that it cannot use
        raise StoreFormatError(f"{path} is no array that zarr can open: {type(error).__name__}: {error}") from error
    if source.shape[1:] != expected.row_shape or source.dtype != np.dtype(expected.dtype):
        raise StoreDamagedError(f"{path} has {source.shape[1:]} {source.dtype}, not its identity's shape")
    if layout.chunk_bytes(source.dtype.itemsize) > MAX_CHUNK_BYTES:
        raise StoreFormatError(f"{path} has chunks of {layout.chunk} {source.dtype}: more than {MAX_CHUNK_BYTES} bytes")

    def read(row: int, out: np.ndarray) -> None:
        if not 0 <= row < source.shape[0]:
            raise StoreDamagedError(f"{path} has {source.shape[0]} rows, none of them is row {row}")
        layout.refuse_bombs(objects, row, expected.row_shape, source.dtype.itemsize)
        try:
            out[...] = source[row]
        except MervCacheError:
            raise
        except Exception as error:  # whatever a codec raises for damaged bytes
            raise StoreDamagedError(f"{path}: row {row} cannot be decoded: {type(error).__name__}: {error}") from error

    return read


class _Layout:
    """Chunks and codecs of a foreign array, if they are of the plain kinds."""

    def __init__(self, document: Any, path: str) -> None:
        self.path = path
        try:
            self.chunk = self._shape(document["chunk_grid"]["configuration"]["chunk_shape"])
            separator = document["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
            plain = document["chunk_key_encoding"]["name"] == "default" and separator == "/"
            names = self._names(document["codecs"])
            self.is_sharded = names == ["sharding_indexed"]
            if self.is_sharded:
                inner = document["codecs"][0]["configuration"]
                self.outer, self.chunk = self.chunk, self._shape(inner["chunk_shape"])
                plain = plain and len(self.outer) == len(self.chunk)
                plain = plain and math.prod(map(math.ceil, np.divide(self.outer, self.chunk))) <= 1 << 16
                plain = plain and self._names(inner["index_codecs"]) == ["bytes", "crc32c"]
                names = self._names(inner["codecs"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise StoreFormatError(f"{path}/zarr.json describes no array that can be read ({error})") from None
        self.has_crc = names[-1:] == ["crc32c"]
        rest = [name for name in (names[:-1] if self.has_crc else names) if name != "transpose"]
        self.compressor = rest[1] if len(rest) == 2 and rest[1] in _COMPRESSORS and not self.is_sharded else None
        if not plain or rest != ["bytes", *([self.compressor] if self.compressor else [])]:
            raise StoreFormatError(
                f"{path} is stored with codecs {', '.join(names)}{' in shards' if self.is_sharded else ''}, which are "
                "not read from stores of others; rewrite it with blosc, or uncompressed"
            )

    def chunk_bytes(self, item_bytes: int) -> int:
        return math.prod(self.chunk) * item_bytes

    def refuse_bombs(self, objects: Objects, row: int, row_shape: Sequence[int], item_bytes: int) -> None:
        """Every object that the row needs is there, and no larger than its chunk when it is decoded."""
        grid = self.outer if self.is_sharded else self.chunk
        across = [range(-(-length // step)) for length, step in zip(row_shape, grid[1:], strict=True)]
        if math.prod(map(len, across)) > _MAX_CHUNKS:
            raise StoreFormatError(f"{self.path}: a row lies in more than {_MAX_CHUNKS} chunks")
        room = self.chunk_bytes(item_bytes)
        for place in itertools.product([row // grid[0]], *across):
            key = f"{self.path}/c/{'/'.join(map(str, place))}"
            try:
                if self.is_sharded:
                    objects.open(key).close()  # read by ranges, and nothing in it expands
                else:
                    self._refuse_bomb(get_bounded(objects, key, room + room // 64 + 4096), room, key)
            except FileNotFoundError:
                raise StoreDamagedError(f"{key} is missing; run `merv-pipeline verify`") from None

    def _refuse_bomb(self, data: bytes, room: int, key: str) -> None:
        payload = data[:-4] if self.has_crc else data
        if self.compressor == "blosc":
            claimed = [int.from_bytes(payload[at : at + 4], "little") for at in (4, 12)]
            fits = len(payload) >= _BLOSC_HEADER_BYTES and claimed == [room, len(payload)]
        elif self.compressor:
            fits = _expands_to(payload, self.compressor, room, key) == room
        else:
            fits = len(payload) == room
        if not fits:
            raise StoreDamagedError(f"{key} does not decode to a chunk of {room} bytes; run `merv-pipeline verify`")

    def _shape(self, numbers: Any) -> tuple[int, ...]:
        shape = tuple(numbers)
        if not 1 < len(shape) <= 8 or any(type(n) is not int or not 1 <= n < 1 << 31 for n in shape):
            raise ValueError(f"shape {str(shape)[:80]}")
        return shape

    def _names(self, codecs: Any) -> list[str]:
        names = [codec["name"] for codec in codecs][:8]
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"codecs are named {names}")
        return names


def _expands_to(payload: bytes, codec: str, room: int, key: str) -> int:
    """Bytes of a gzip or zstd stream, counted up to one past `room`."""
    total = 0
    try:
        with pa.CompressedInputStream(pa.BufferReader(payload), codec) as stream:
            while total <= room and (piece := stream.read(min(_PIECE_BYTES, room + 1 - total))):
                total += len(piece)
    except (pa.ArrowException, OSError) as error:
        raise StoreDamagedError(f"{key} is no {codec} stream ({error})") from error
    return total

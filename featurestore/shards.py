"""Zarr v3 shards, written and read without zarr: one row is one chunk, one block is one shard.

A shard is the rows' encoded chunks back to back, then an index of (offset, length) pairs and its crc32c; an absent row
has 2**64-1 for both and reads as the fill value. A chunk is little-endian items, blosc or nothing, and a crc32c.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from featurestore.errors import StoreDamagedError
from featurestore.metadata import BLOSC_BLOCK_BYTES, ArraySpec
from featurestore.places.objects import OpenObject

# With more than one blosc thread the same array gives different bytes. zarr-python sets this too.
blosc.use_threads = False

ABSENT = 2**64 - 1
CRC_BYTES = 4
BLOSC_HEADER_BYTES = 16
_PIECE_BYTES = 8 << 20


def encode_row(spec: ArraySpec, row: np.ndarray) -> bytes:
    """One chunk: items -> (blosc) -> crc32c. The same row gives the same bytes on every machine."""
    if row.shape != spec.row_shape or row.dtype != np.dtype(spec.dtype):
        raise ValueError(f"{spec.name} row must be {spec.row_shape} {spec.dtype}, got {row.shape} {row.dtype}")
    items = np.ascontiguousarray(row, dtype=np.dtype(spec.dtype).newbyteorder("<"))
    if spec.codec == "blosc":
        payload = blosc.compress(items, b"zstd", 1, blosc.SHUFFLE, BLOSC_BLOCK_BYTES)
    else:
        payload = items.tobytes()
    return payload + struct.pack("<I", google_crc32c.value(payload))


def decode_row(spec: ArraySpec, chunk: np.ndarray, out: np.ndarray) -> None:
    """One chunk of uint8 items -> `out`, a contiguous array of the row's shape and dtype."""
    payload = chunk[:-CRC_BYTES]
    _check_crc(spec, payload, chunk[-CRC_BYTES:])
    if spec.codec == "none":
        if len(payload) != spec.row_bytes:
            raise StoreDamagedError(f"{spec.name}: a row holds {len(payload)} bytes instead of {spec.row_bytes}")
        out.reshape(-1).view(np.uint8)[:] = payload
        return
    # The blosc header names the decompressed size: never let data decide how much memory is taken.
    claimed = int(payload[4:8].view("<u4")[0]) if len(payload) >= BLOSC_HEADER_BYTES else -1
    if claimed != spec.row_bytes:
        raise StoreDamagedError(f"{spec.name}: a row claims {claimed} bytes instead of {spec.row_bytes}")
    if int(payload[12:16].view("<u4")[0]) != len(payload):  # or blosc would read past the end
        raise StoreDamagedError(f"{spec.name}: a row claims to be compressed to another length than it has")
    try:
        blosc.decompress(payload, out)
    except RuntimeError as error:
        raise StoreDamagedError(f"{spec.name}: a row cannot be decompressed ({error})") from error


def build_shard(spec: ArraySpec, chunks: Mapping[int, bytes]) -> list[bytes]:
    """Encoded chunks by row within the block -> the shard's pieces, to be written one after another."""
    index = np.full((spec.block_rows, 2), ABSENT, dtype="<u8")
    offset = 0
    for row in sorted(chunks):
        index[row] = (offset, len(chunks[row]))
        offset += len(chunks[row])
    table = index.tobytes()
    return [*(chunks[row] for row in sorted(chunks)), table, struct.pack("<I", google_crc32c.value(table))]


def parse_index(spec: ArraySpec, tail: bytes, shard_bytes: int) -> np.ndarray:
    """The last `spec.index_bytes` of a shard -> uint64 [block_rows, 2], checked against the shard's size."""
    if len(tail) != spec.index_bytes or google_crc32c.value(tail[:-CRC_BYTES]) != struct.unpack("<I", tail[-4:])[0]:
        raise StoreDamagedError(f"{spec.name}: a shard's index does not match its checksum; run `merv-pipeline verify`")
    index = np.frombuffer(tail[:-CRC_BYTES], dtype="<u8").reshape(spec.block_rows, 2)
    present = index[index[:, 0] != ABSENT]
    # Any encoder's chunk is at most its items and a few bytes per blosc block.
    longest = spec.row_bytes + spec.row_bytes // 64 + 4096
    room = shard_bytes - spec.index_bytes
    if len(present) and (
        present[:, 1].max() > longest or present[:, 0].max() > room or (present.sum(axis=1) > room).any()
    ):
        raise StoreDamagedError(f"{spec.name}: a shard's index points outside the shard")
    return index


class Shard:
    """One shard opened for reading rows; the index is read and checked once."""

    def __init__(self, spec: ArraySpec, source: OpenObject) -> None:
        self.spec = spec
        self._source = source
        if source.size < spec.index_bytes:
            raise StoreDamagedError(f"{spec.name}: a shard of {source.size} bytes has no room for its index")
        tail = self._read(source.size - spec.index_bytes, spec.index_bytes)
        self._index = parse_index(spec, tail.tobytes(), source.size)

    def rows(self) -> list[int]:
        """Rows within the block that are present."""
        return np.flatnonzero(self._index[:, 0] != ABSENT).tolist()

    def chunk(self, row: int, scratch: Scratch | None = None) -> np.ndarray | None:
        """A row's encoded bytes, or None if it is absent."""
        offset, length = map(int, self._index[row])
        return None if offset == ABSENT else self._read(offset, length, scratch)

    def read_row(self, row: int, out: np.ndarray, scratch: Scratch | None = None) -> bool:
        """The row's stored items into `out`, contiguous; False if it is absent."""
        offset, length = map(int, self._index[row])
        if offset == ABSENT:
            return False
        if self.spec.codec == "none" and length == self.spec.row_bytes + CRC_BYTES:
            # One read straight into its place; the copy is what uncompressed reading would otherwise cost.
            items, crc = out.reshape(-1).view(np.uint8), np.empty(CRC_BYTES, dtype=np.uint8)
            self._read_exactly(offset, [memoryview(items), memoryview(crc)], length)
            _check_crc(self.spec, items, crc)
        else:
            decode_row(self.spec, self._read(offset, length, scratch), out)
        return True

    def decode(self, row: int) -> np.ndarray | None:
        """The row's stored items in a new array, or None if it is absent."""
        out = np.empty(self.spec.row_shape, dtype=self.spec.dtype)
        return out if self.read_row(row, out) else None

    def record(self) -> dict[str, Any]:
        """{"sha256", "bytes"} of the whole shard, read in pieces."""
        total = hashlib.sha256()
        for offset in range(0, self._source.size, _PIECE_BYTES):
            total.update(self._read(offset, min(_PIECE_BYTES, self._source.size - offset)).data)
        return {"sha256": total.hexdigest(), "bytes": self._source.size}

    def close(self) -> None:
        self._source.close()

    def _read(self, offset: int, length: int, scratch: Scratch | None = None) -> np.ndarray:
        buffer = np.empty(length, dtype=np.uint8) if scratch is None else scratch.take(length)
        self._read_exactly(offset, [memoryview(buffer)], length)
        return buffer

    def _read_exactly(self, offset: int, buffers: list[memoryview], length: int) -> None:
        if self._source.read_into(offset, buffers) != length:
            raise StoreDamagedError(f"{self.spec.name}: a shard ends before its index says; run `merv-pipeline verify`")


class Scratch:
    """A buffer that is used again: taking fresh memory for every row costs page faults."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, dtype=np.uint8)

    def take(self, length: int) -> np.ndarray:
        if len(self._buffer) < length:
            self._buffer = np.empty(length, dtype=np.uint8)
        return self._buffer[:length]


def _check_crc(spec: ArraySpec, payload: np.ndarray, stored: np.ndarray) -> None:
    if len(stored) != CRC_BYTES or google_crc32c.value(payload) != int.from_bytes(stored.tobytes(), "little"):
        raise StoreDamagedError(f"{spec.name}: a row does not match its checksum; run `merv-pipeline verify`")

"""Shards: the bytes of one block of one array, made and read without zarr-python.

One row is one chunk and one block is one shard: the rows' encoded chunks back to back, then an index of (offset,
length) pairs and its crc32c; an absent row has 2**64 - 1 for both. A chunk is little-endian items, compressed or not,
and a crc32c. zarr-python reads and writes the same bytes (tested), a hundred times slower by `oindex`.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np

from featurestore.layout import shard_key
from featurestore.objects.base import Objects, OpenObject
from featurestore.zarr_metadata import CODECS, ArraySpec
from mervcache.errors import StoreDamagedError

ABSENT = 2**64 - 1
CRC_BYTES = 4
MAX_OPEN_SHARDS = 256  # indexes and files held open by a reader
MAX_REMOTE_SHARDS = 16_384  # indexes of 1 kB where nothing is held open, and opening one anew costs a request
_PIECE_BYTES = 8 << 20


def encode_row(spec: ArraySpec, row: np.ndarray) -> bytes:
    """One chunk: items, compressed, and their crc32c. The same row gives the same bytes on every machine."""
    if row.shape != spec.row_shape or row.dtype != np.dtype(spec.dtype):
        raise ValueError(f"{spec.name} row must be {spec.row_shape} {spec.dtype}, got {row.shape} {row.dtype}")
    items = np.ascontiguousarray(row, dtype=np.dtype(spec.dtype).newbyteorder("<"))
    compress = CODECS[spec.codec].compress
    payload = compress(items) if compress else items.tobytes()
    return payload + struct.pack("<I", google_crc32c.value(payload))


def decode_row(spec: ArraySpec, chunk: np.ndarray, out: np.ndarray) -> None:
    """One chunk of uint8 items -> `out`, a contiguous array of the row's shape and dtype."""
    payload, decompress = chunk[:-CRC_BYTES], CODECS[spec.codec].decompress
    _check_crc(spec, payload, chunk[-CRC_BYTES:])
    if decompress is None:
        if len(payload) != spec.row_bytes:
            raise StoreDamagedError(f"{spec.name}: a row holds {len(payload)} bytes instead of {spec.row_bytes}")
        out.reshape(-1).view(np.uint8)[:] = payload
        return
    try:
        decompress(payload, out)
    except ValueError as error:
        raise StoreDamagedError(f"{spec.name}: a row {error}") from error


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
    end = shard_bytes - spec.index_bytes
    if len(present) and (
        present[:, 1].max() > longest or present[:, 0].max() > end or (present.sum(axis=1) > end).any()
    ):
        raise StoreDamagedError(f"{spec.name}: a shard's index points outside the shard")
    return index


def _check_crc(spec: ArraySpec, payload: np.ndarray, stored: np.ndarray) -> None:
    if len(stored) != CRC_BYTES or google_crc32c.value(payload) != int.from_bytes(stored.tobytes(), "little"):
        raise StoreDamagedError(f"{spec.name}: a row does not match its checksum; run `merv-pipeline verify`")


class Shard:
    """One shard opened for reading rows, which count within the block; the index is read and checked once."""

    def __init__(self, spec: ArraySpec, source: OpenObject) -> None:
        self.spec = spec
        self._source = source
        if source.size < spec.index_bytes:
            raise StoreDamagedError(f"{spec.name}: a shard of {source.size} bytes cannot hold its index")
        tail = self._read(source.size - spec.index_bytes, spec.index_bytes)
        self._index = parse_index(spec, tail.tobytes(), source.size)

    def rows(self) -> list[int]:
        """Rows within the block that are present."""
        return np.flatnonzero(self._index[:, 0] != ABSENT).tolist()

    def chunk(self, row: int) -> np.ndarray | None:
        """A row's encoded bytes, or None if it is absent."""
        offset, length = self._index[row].tolist()
        return None if offset == ABSENT else self._read(offset, length)

    def read_row(self, row: int, out: np.ndarray, scratch: Scratch | None = None) -> bool:
        """The row's stored items into `out`, contiguous; False if it is absent."""
        spec = self.spec
        offset, length = self._index[row].tolist()
        if offset == ABSENT:
            return False
        if CODECS[spec.codec].decompress is not None or length != spec.row_bytes + CRC_BYTES:
            decode_row(spec, self._read(offset, length, scratch), out)
            return True
        # Items as they are go straight into `out`: a copy would double the time of an uncompressed read.
        items, crc = out.reshape(-1).view(np.uint8), np.empty(CRC_BYTES, dtype=np.uint8)
        if self._source.read_into(offset, [items.data, crc.data]) != length:
            raise self._cut_short()
        _check_crc(spec, items, crc)
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
        if self._source.read_into(offset, [buffer.data]) != length:
            raise self._cut_short()
        return buffer

    def _cut_short(self) -> StoreDamagedError:
        return StoreDamagedError(f"{self.spec.name}: a shard ends before its last row; run `merv-pipeline verify`")


def decode_all(shards: Mapping[str, Shard], row: int) -> dict[str, np.ndarray] | None:
    """A row's stored items by array; None unless every shard has the row."""
    stored = {name: shard.decode(row) for name, shard in shards.items()}
    present = {name: items for name, items in stored.items() if items is not None}
    return present if len(present) == len(stored) else None


def check_shard(spec: ArraySpec, source: OpenObject) -> None:
    """Raise `StoreDamagedError` unless every row and the index match their checksums and are all of the shard."""
    shard = Shard(spec, source)
    try:
        length = spec.index_bytes
        for row in shard.rows():
            chunk = shard.chunk(row)
            length += len(chunk) if chunk is not None else 0
            shard.decode(row)
        if length != source.size:
            raise StoreDamagedError(f"{spec.name}: a shard holds {source.size - length} bytes that belong to no row")
    finally:
        shard.close()


class Scratch(threading.local):
    """A buffer per thread that is used again: fresh memory for every row costs page faults."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, dtype=np.uint8)

    def take(self, length: int) -> np.ndarray:
        if len(self._buffer) < length:
            self._buffer = np.empty(length, dtype=np.uint8)
        return self._buffer[:length]


class ShardCache:
    """Recently used shards, opened once; bounded, safe among threads."""

    def __init__(self, objects: Objects, max_open: int = MAX_OPEN_SHARDS) -> None:
        self._objects = objects
        self._max_open = max_open if objects.parallel_reads == 1 else max(max_open, MAX_REMOTE_SHARDS)
        self._shards: OrderedDict[tuple[str, str, str, int], Shard] = OrderedDict()
        self._lock = threading.Lock()
        self.scratch = Scratch()

    def get(self, kind: str, group: str, spec: ArraySpec, block: int) -> Shard:
        shard_id = (kind, group, spec.name, block)
        with self._lock:
            if shard_id in self._shards:
                self._shards.move_to_end(shard_id)
                return self._shards[shard_id]
        key = shard_key(*shard_id)
        try:
            shard = Shard(spec, self._objects.open(key))
        except FileNotFoundError:
            raise StoreDamagedError(
                f"{key} is missing though its receipt is there; run `merv-pipeline verify`"
            ) from None
        with self._lock:
            self._shards[shard_id] = shard
            # A dropped shard closes its file when the last reader lets go of it, not here while it may be in use.
            while len(self._shards) > self._max_open:
                self._shards.popitem(last=False)
        return shard

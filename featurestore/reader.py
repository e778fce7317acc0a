"""Reading tokens: Zarr v3 shards without zarr-python, one ranged read per clip, straight into the batch.

One row is one chunk and one block is one shard: the rows' encoded chunks back to back, then an index of (offset,
length) pairs and its crc32c; an absent row has 2**64 - 1 for both. A chunk is little-endian items, compressed or not,
and a crc32c. zarr-python reads and writes the same bytes (tested), a hundred times slower by `oindex`.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from featurestore.identity import FeatureIdentity
from featurestore.layout import ROOT_METADATA, array_metadata_key, shard_key
from featurestore.objects.base import Objects, OpenObject
from featurestore.objects.open import in_parallel
from featurestore.storage_dtypes import StorageDtype, prefix_dtype, storage_dtype
from featurestore.zarr_metadata import CODECS, ArraySpec, array_specs, parse_array, parse_root, read_document
from mervcache.errors import ClipUnavailableError, StoreDamagedError, StoreFormatError, UserError

Frames = slice | Sequence[int] | np.ndarray | None

ABSENT = 2**64 - 1
CRC_BYTES = 4
MAX_OPEN_SHARDS = 256  # indexes and files held open by a reader
MAX_REMOTE_SHARDS = 16_384  # indexes of 1 kB where nothing is held open, and opening one anew costs a request
_PIECE_BYTES = 8 << 20


class BatchReader:
    """Reads rows of both kinds into one batch; opens each group on first use."""

    def __init__(self, objects: Objects) -> None:
        self._objects, self._shards = objects, ShardCache(objects)
        self._groups: dict[tuple[str, bool], GroupReader] = {}  # by group name and "is a still"

    def read(
        self,
        array: str,
        identity: FeatureIdentity,
        rows: np.ndarray,  # int64 [B]
        is_image: np.ndarray,  # bool [B]: the kind whose array holds the row
        frames: Frames = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Floats [B, T, ...]: `frames` picks time steps, a still's steps repeat; `out` is an array to read into."""
        time, height, width = identity.grid
        steps = np.arange(time) if frames is None else time_steps(time, frames)
        inner = (height, width) if array == "tokens" else (identity.prefix_tokens,)
        shape, dtype = (len(rows), len(steps), *inner, identity.width), np.dtype(_dtype_of(identity, array).float_dtype)
        if out is None:
            out = np.empty(shape, dtype=dtype)
        elif out.shape != shape or out.dtype != dtype:
            raise UserError(f"out must be {shape} {dtype}, got {out.shape} {out.dtype}")

        group, is_whole = identity.group_name, frames is None or np.array_equal(steps, np.arange(time))
        readers: dict[bool, tuple[GroupReader, np.ndarray | None]] = {}  # is a still -> reader, stored steps to take
        for still in set(is_image.tolist()):
            reader = self._groups.get((group, still))
            if reader is None:
                reader = GroupReader(self._objects, "image" if still else "video", identity, self._shards)
                self._groups[group, still] = reader
            stored_time = reader.specs[array].row_shape[0]
            readers[still] = reader, None if is_whole and stored_time == time else steps % stored_time

        def read_row(place: int) -> None:
            reader, stored_steps = readers[bool(is_image[place])]
            reader.read_row(array, int(rows[place]), out[place], stored_steps)

        order = np.lexsort((rows, is_image)).tolist()  # as on disk
        if self._objects.parallel_reads == 1:
            for place in order:
                read_row(place)
        else:
            in_parallel(read_row, order, self._objects.parallel_reads)
        return out


class GroupReader:
    """Rows of one encoder and kind, in stored items or as floats."""

    def __init__(self, objects: Objects, kind: str, identity: FeatureIdentity, shards: ShardCache | None = None):
        self.kind, self.identity, self.group = kind, identity, identity.group_name
        self.specs = array_specs(identity, kind, blocks=0, block_rows=1)  # block rows and codec: see _open_array
        self._objects, self._shards = objects, shards or ShardCache(objects)
        self._dtypes = {array: _dtype_of(identity, array) for array in ("tokens", "prefix")}
        self._opened: dict[str, ArraySpec] = {}  # as on disk

    def read_row(self, array: str, row: int, out: np.ndarray, steps: np.ndarray | None = None) -> None:
        """Row `row` as floats into `out`; `steps` picks stored time steps, None takes all in order."""
        dtype, spec = self._dtypes[array], self.specs[array]
        if dtype.from_stored is None and steps is None and out.flags.c_contiguous:
            self.read_stored(array, row, out)
            return
        stored = np.empty(spec.row_shape, dtype=spec.dtype)
        self.read_stored(array, row, stored)
        picked = stored if steps is None else stored[steps]
        if dtype.from_stored is None:
            out[...] = picked
            return
        sidecars: dict[str, np.ndarray] = {}
        if dtype.is_affine:
            for name in ("scale", "offset"):
                sidecars[name] = np.empty(self.specs[name].row_shape, dtype=self.specs[name].dtype)
                self.read_stored(name, row, sidecars[name])
        dtype.from_stored(picked, sidecars, out)

    def read_stored(self, array: str, row: int, out: np.ndarray) -> None:
        """Row `row` as it is stored, into a contiguous array of the stored dtype."""
        spec = self._opened.get(array) or self._open_array(array)
        block, slot = divmod(row, spec.block_rows)
        shard = self._shards.get(self.kind, self.group, spec, block)
        if not shard.read_row(slot, out, self._shards.scratch):
            key = shard_key(self.kind, self.group, array, block)
            raise StoreDamagedError(f"{key} lacks row {row} though its receipt has it; run `merv-pipeline verify`")

    def _open_array(self, array: str) -> ArraySpec:
        key, expected = array_metadata_key(self.kind, self.group, array), self.specs[array]
        try:
            spec = parse_array(array, read_document(self._objects, key))
        except FileNotFoundError:
            raise StoreDamagedError(f"{key} is missing; run `merv-pipeline verify`") from None
        if spec is None:
            block_rows = parse_root(read_document(self._objects, ROOT_METADATA))["block_rows"][self.kind]
            raise StoreFormatError(
                f"{key} describes chunks or codecs that are not read here; rewrite the array in the store's folder: "
                + expected.rewrite_command(key.rpartition("/")[0], block_rows)
            )
        if (spec.row_shape, spec.dtype) != (expected.row_shape, expected.dtype):
            raise StoreDamagedError(
                f"{key} describes {spec.row_shape} {spec.dtype}, its identity {expected.row_shape} {expected.dtype}"
            )
        self._opened[array] = spec
        return spec


def _dtype_of(identity: FeatureIdentity, array: str) -> StorageDtype:
    name = identity.storage_dtype
    return storage_dtype(prefix_dtype(name) if array == "prefix" else name)


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
        place = (kind, group, spec.name, block)
        with self._lock:
            if place in self._shards:
                self._shards.move_to_end(place)
                return self._shards[place]
        key = shard_key(*place)
        try:
            shard = Shard(spec, self._objects.open(key))
        except FileNotFoundError:
            raise StoreDamagedError(
                f"{key} is missing though its receipt is there; run `merv-pipeline verify`"
            ) from None
        with self._lock:
            self._shards[place] = shard
            # A dropped shard closes its file when the last reader lets go of it, not here while it may be in use.
            while len(self._shards) > self._max_open:
                self._shards.popitem(last=False)
        return shard


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
        if self._source.read_into(offset, [memoryview(items), memoryview(crc)]) != length:
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
        if self._source.read_into(offset, [memoryview(buffer)]) != length:
            raise self._cut_short()
        return buffer

    def _cut_short(self) -> StoreDamagedError:
        return StoreDamagedError(f"{self.spec.name}: a shard ends before its last row; run `merv-pipeline verify`")


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


class ClipLines:
    """Clip id -> line, as sorted hashes: 16 bytes a clip where a dict of texts takes 150."""

    def __init__(self, clip_ids: pa.Array) -> None:
        self._clip_ids = clip_ids
        hashes = np.fromiter(map(hash, clip_ids.to_pylist()), dtype=np.int64, count=len(clip_ids))
        self._lines = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._lines]

    def find(self, wanted: Sequence[str]) -> np.ndarray:
        """int64 [len(wanted)]; ClipUnavailableError names the first that is unknown."""
        hashes = np.fromiter(map(hash, wanted), dtype=np.int64, count=len(wanted))
        lines = np.empty(len(wanted), dtype=np.int64)
        for number, place in enumerate(np.searchsorted(self._hashes, hashes).tolist()):
            while place < len(self._hashes) and self._hashes[place] == hashes[number]:
                lines[number] = self._lines[place]
                if self._clip_ids[int(lines[number])].as_py() == wanted[number]:
                    break
                place += 1  # another clip of the same hash
            else:
                raise ClipUnavailableError(
                    f"clip {wanted[number]!r} is not in this store's snapshot; see store.clips for those that are"
                )
        return lines


def encoder_keys(groups: Iterable[str]) -> dict[str, str]:
    """Key -> group name."""
    names = sorted({name.split("/")[1] for name in groups})
    count = Counter(name.rsplit("-", 1)[0] for name in names)
    keys: dict[str, str] = {}
    for name in names:
        encoder, identity = name.rsplit("-", 1)
        keys[encoder if count[encoder] == 1 else f"{encoder}@{identity[:6]}"] = name
    if len(keys) != len(names):
        raise StoreFormatError("two identities of one encoder share their first six digits; keep one of them per store")
    return keys


def time_steps(time: int, frames: Frames) -> np.ndarray:
    """Indices of the time steps that `frames` picks of `time`; UserError where one is outside."""
    try:
        return np.atleast_1d(
            np.arange(time)[frames if isinstance(frames, slice) else np.asarray(frames, dtype=np.int64)]
        )
    except IndexError:
        raise UserError(f"frames must be 0..{time - 1}, got {list(frames)}") from None

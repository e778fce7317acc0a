"""Reading rows: one ranged read per clip, straight into the batch.

Shards of the known codecs are read without zarr (index cached, crc checked, tested bit-equal to zarr); any other valid
Zarr array is read by a plain `array[i]` loop. Never `oindex`: it takes a hundred times as long.
Legend: T frames, H W height width, K prefix tokens, D encoder width.

Zarr v3 shards, written and read without zarr: one row is one chunk, one block is one shard.

A shard is the rows' encoded chunks back to back, then an index of (offset, length) pairs and its crc32c; an absent row
has 2**64-1 for both and reads as the fill value. A chunk is little-endian items, blosc or nothing, and a crc32c.

Look-ups of a reader: clip id -> line, encoder name -> group, frames -> time steps.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from featurestore.foreign import foreign_reader
from featurestore.identity import FeatureIdentity
from featurestore.layout import array_metadata_key, block_of, group_prefix, shard_key, slot_of
from featurestore.objects.base import Objects, OpenObject
from featurestore.objects.open import in_parallel
from featurestore.storage_dtypes import prefix_dtype, storage_dtype
from featurestore.zarr_metadata import CODECS, ArraySpec, array_specs, parse_array, read_document, read_group
from mervcache.errors import ClipUnavailableError, StoreDamagedError, StoreFormatError, UserError

ABSENT = 2**64 - 1
CRC_BYTES = 4
_PIECE_BYTES = 8 << 20


def encode_row(spec: ArraySpec, row: np.ndarray) -> bytes:
    """One chunk: items -> (blosc) -> crc32c. The same row gives the same bytes on every machine."""
    if row.shape != spec.row_shape or row.dtype != np.dtype(spec.dtype):
        raise ValueError(f"{spec.name} row must be {spec.row_shape} {spec.dtype}, got {row.shape} {row.dtype}")
    items = np.ascontiguousarray(row, dtype=np.dtype(spec.dtype).newbyteorder("<"))
    compress = CODECS[spec.codec].compress
    payload = compress(items) if compress else items.tobytes()
    return payload + struct.pack("<I", google_crc32c.value(payload))


def decode_row(spec: ArraySpec, chunk: np.ndarray, out: np.ndarray) -> None:
    """One chunk of uint8 items -> `out`, a contiguous array of the row's shape and dtype."""
    payload = chunk[:-CRC_BYTES]
    _check_crc(spec, payload, chunk[-CRC_BYTES:])
    decompress = CODECS[spec.codec].decompress
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
        if CODECS[self.spec.codec].decompress is None and length == self.spec.row_bytes + CRC_BYTES:
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


Frames = slice | Sequence[int] | np.ndarray | None


class ClipLines:
    """Clip id -> line, as sorted hashes: 16 bytes a clip where a dict of texts takes 150."""

    def __init__(self, clip_ids: pa.Array) -> None:
        self._clip_ids = clip_ids
        hashes = np.fromiter(map(hash, clip_ids.to_pylist()), dtype=np.int64, count=len(clip_ids))
        self._lines = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._lines]

    def find(self, wanted: list[str]) -> np.ndarray:
        return np.fromiter(map(self._find_one, wanted), dtype=np.int64, count=len(wanted))

    def _find_one(self, clip_id: str) -> int:
        place = int(np.searchsorted(self._hashes, hash(clip_id)))
        while place < len(self._hashes) and self._hashes[place] == hash(clip_id):
            line = int(self._lines[place])
            if self._clip_ids[line].as_py() == clip_id:
                return line
            place += 1
        raise ClipUnavailableError(
            f"clip {clip_id!r} is not in this store's snapshot; see store.clips for those that are"
        )


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
    steps = np.arange(time)
    if frames is None:
        return steps
    try:
        picked = steps[frames if isinstance(frames, slice) else np.asarray(frames, dtype=np.int64)]
    except IndexError:
        raise UserError(f"frames must be 0..{time - 1}, got {list(frames)}") from None
    return np.atleast_1d(picked)


MAX_OPEN_SHARDS = 256  # indexes and files held open by a reader
MAX_REMOTE_SHARDS = 16_384  # indexes of 1 kB where nothing is held open, and opening one anew costs a request


class ShardCache:
    """Recently used shards, opened once; bounded, safe among threads."""

    def __init__(self, objects: Objects, max_open: int = MAX_OPEN_SHARDS) -> None:
        self._objects = objects
        self._max_open = max_open if objects.parallel_reads == 1 else max(max_open, MAX_REMOTE_SHARDS)
        self._shards: OrderedDict[str, Shard] = OrderedDict()
        self._lock = threading.Lock()
        self.scratch = threading.local()

    def get(self, key: str, spec: ArraySpec) -> Shard:
        with self._lock:
            if key in self._shards:
                self._shards.move_to_end(key)
                return self._shards[key]
        try:
            shard = Shard(spec, self._objects.open(key))
        except FileNotFoundError:
            raise StoreDamagedError(
                f"{key} is missing though its receipt is there; run `merv-pipeline verify`"
            ) from None
        with self._lock:
            self._shards[key] = shard
            # A dropped shard closes its file when the last reader lets go of it, not here under a reader's feet.
            while len(self._shards) > self._max_open:
                self._shards.popitem(last=False)
        return shard

    def take_scratch(self) -> Scratch:
        """This thread's buffer for encoded bytes."""
        if not hasattr(self.scratch, "buffer"):
            self.scratch.buffer = Scratch()
        return self.scratch.buffer


class GroupReader:
    """The rows of one kind and encoder."""

    def __init__(self, objects: Objects, kind: str, group: str, cache: ShardCache) -> None:
        self.kind = kind
        self.group = group
        self.identity: FeatureIdentity = read_group(objects, kind, group).identity
        self._objects = objects
        self._cache = cache
        self._row_readers: dict[str, Callable[[int, np.ndarray], None]] = {}
        # Sizes follow from the identity; block rows and codec do not matter to them.
        self.specs = array_specs(self.identity, kind, blocks=0, block_rows=1)
        self._tokens = storage_dtype(self.identity.storage_dtype)
        self._prefix = storage_dtype(prefix_dtype(self.identity.storage_dtype))

    def output_dtype(self, array: str = "tokens") -> np.dtype:
        """What reading gives."""
        return np.dtype((self._prefix if array == "prefix" else self._tokens).float_dtype)

    def read_row(self, array: str, row: int, out: np.ndarray, steps: np.ndarray | None = None) -> None:
        """Row `row` as floats into `out`; `steps` picks stored time steps, None takes all in order."""
        spec, dtype = self.specs[array], self._prefix if array == "prefix" else self._tokens
        if dtype.decode is None and steps is None and out.flags.c_contiguous:
            self.read_stored(array, row, out)
            return
        stored = np.empty(spec.row_shape, dtype=spec.dtype)
        self.read_stored(array, row, stored)
        picked = stored if steps is None else stored[steps]
        if dtype.decode is None:
            out[...] = picked
        else:
            dtype.decode(picked, self._sidecars(row) if dtype.is_affine else {}, out)

    def read_stored(self, array: str, row: int, out: np.ndarray) -> None:
        """Row `row` as it is stored, into a contiguous array of the stored dtype."""
        if array not in self._row_readers:
            self._row_readers[array] = self._make_row_reader(array)
        self._row_readers[array](row, out)

    def _sidecars(self, row: int) -> dict[str, np.ndarray]:
        values = {name: np.empty(self.specs[name].row_shape, dtype=np.float32) for name in ("scale", "offset")}
        for name, out in values.items():
            self.read_stored(name, row, out)
        return values

    def _make_row_reader(self, array: str) -> Callable[[int, np.ndarray], None]:
        key, expected = array_metadata_key(self.kind, self.group, array), self.specs[array]
        try:
            stored = parse_array(array, read_document(self._objects, key))
        except FileNotFoundError:
            raise StoreDamagedError(f"{key} is missing; run `merv-pipeline verify`") from None
        if stored is None:
            path = f"{group_prefix(self.kind, self.group)}/{array}"
            return foreign_reader(self._objects, path, expected)
        if (stored.row_shape, stored.dtype) != (expected.row_shape, expected.dtype):
            raise StoreDamagedError(
                f"{key} describes {stored.row_shape} {stored.dtype}, which is not its identity's shape"
            )
        return self._direct_reader(stored)

    def _direct_reader(self, spec: ArraySpec) -> Callable[[int, np.ndarray], None]:
        def read(row: int, out: np.ndarray) -> None:
            key = shard_key(self.kind, self.group, spec.name, block_of(row, spec.block_rows))
            shard = self._cache.get(key, spec)
            if not shard.read_row(slot_of(row, spec.block_rows), out, self._cache.take_scratch()):
                raise StoreDamagedError(f"{key} lacks row {row} though its receipt has it; run `merv-pipeline verify`")

        return read


class BatchReader:
    """Rows of one encoder and both kinds, read into one batch."""

    def __init__(self, objects: Objects) -> None:
        self._objects, self._cache = objects, ShardCache(objects)
        self._groups: dict[tuple[str, str], GroupReader] = {}

    def group(self, kind: str, group: str) -> GroupReader:
        """The reader of one kind's rows, opened on first use."""
        if (kind, group) not in self._groups:
            self._groups[kind, group] = GroupReader(self._objects, kind, group, self._cache)
        return self._groups[kind, group]

    def read(
        self,
        array: str,
        identity: FeatureIdentity,
        rows: np.ndarray,  # int64 [B]
        is_image: np.ndarray,  # bool [B]: in which kind's array the row lies
        frames: Frames = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Floats [B, T, ...]: `frames` picks time steps, a still's steps repeat; `out` is an array to read into."""
        steps = time_steps(identity.grid[0], frames)
        kinds = {image: "image" if image else "video" for image in set(is_image.tolist())}
        readers = {image: self.group(kind, identity.group_name) for image, kind in kinds.items()}
        dtype = next((reader.output_dtype(array) for reader in readers.values()), np.dtype("float32"))
        inner = identity.grid[1:] if array == "tokens" else (identity.prefix_tokens,)
        out = _batch((len(rows), len(steps), *inner, identity.width), dtype, out)
        whole = np.array_equal(steps, np.arange(identity.grid[0]))

        def read_row(place: int) -> None:
            reader = readers[bool(is_image[place])]
            stored_time = reader.specs[array].row_shape[0]
            picked = None if whole and stored_time == identity.grid[0] else steps % stored_time
            reader.read_row(array, int(rows[place]), out[place], picked)

        in_parallel(read_row, np.lexsort((rows, is_image)), self._objects.parallel_reads)  # in the order on disk
        return out


def _batch(shape: tuple[int, ...], dtype: np.dtype, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return np.empty(shape, dtype=dtype)
    if out.shape != shape or out.dtype != dtype:
        raise UserError(f"out must be {shape} {dtype}, got {out.shape} {out.dtype}")
    return out

"""Shards: written here and read by zarr, written by zarr and read here, damage found."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.shards import Scratch, Shard, build_shard, encode_row
from featurestore.zarr_metadata import ArraySpec
from mervcache.errors import StoreDamagedError


class Bytes:
    """An object in memory."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def read_into(self, offset, buffers):
        done = 0
        for buffer in buffers:
            piece = self.data[offset + done : offset + done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done

    def close(self):
        pass


def spec_of(codec="blosc", dtype="float16", block_rows=4, row_shape=(2, 2, 2, 8)) -> ArraySpec:
    return ArraySpec(
        name="tokens", rows=block_rows, row_shape=row_shape, block_rows=block_rows, dtype=dtype, codec=codec
    )


def rows_of(spec: ArraySpec, present, seed=0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    size = (*spec.row_shape, np.dtype(spec.dtype).itemsize)
    items = {row: rng.integers(0, 120, size=size, dtype=np.uint8) for row in present}
    return {row: np.ascontiguousarray(value).view(spec.dtype)[..., 0] for row, value in items.items()}


def shard_bytes(spec: ArraySpec, rows) -> bytes:
    return b"".join(build_shard(spec, {row: encode_row(spec, value) for row, value in rows.items()}))


def open_with_zarr(spec: ArraySpec, data: bytes):
    store = zarr.storage.MemoryStore()
    buffer = zarr.core.buffer.default_buffer_prototype().buffer
    store._store_dict["zarr.json"] = buffer.from_bytes(spec.document())
    store._store_dict["c/0" + "/0" * len(spec.row_shape)] = buffer.from_bytes(data)
    return zarr.open_array(store, mode="r")


@settings(max_examples=40, deadline=None)
@given(
    codec=st.sampled_from(["blosc", "none"]),
    dtype=st.sampled_from(["float16", "float32", "uint16", "uint8"]),
    present=st.sets(st.integers(0, 5)),
    seed=st.integers(0, 1000),
)
def test_any_set_of_rows_comes_back_from_us_and_from_zarr(codec, dtype, present, seed):
    spec = spec_of(codec, dtype, block_rows=6, row_shape=(1, 2, 1, 3))
    rows = rows_of(spec, present, seed)
    data = shard_bytes(spec, rows)
    shard, array = Shard(spec, Bytes(data)), open_with_zarr(spec, data)
    assert shard.rows() == sorted(present)
    fill = np.full(spec.row_shape, array.fill_value, dtype=dtype)
    for row in range(6):
        decoded, expected = shard.decode(row), rows.get(row, fill)
        assert array[row].tobytes() == expected.tobytes()
        assert (decoded is None) == (row not in rows)
        assert decoded is None or decoded.tobytes() == expected.tobytes()


@pytest.mark.parametrize("codec", ["blosc", "none"])
def test_a_shard_written_by_zarr_python_is_read_directly(codec):
    spec = spec_of(codec)
    rows = rows_of(spec, range(4))
    store = zarr.storage.MemoryStore()
    buffer = zarr.core.buffer.default_buffer_prototype().buffer
    store._store_dict["zarr.json"] = buffer.from_bytes(spec.document())
    array = zarr.open_array(store, mode="r+")
    array[:] = np.stack([rows[row] for row in range(4)])
    shard = Shard(spec, Bytes(store._store_dict["c/0/0/0/0/0"].to_bytes()))
    scratch = Scratch()
    for row, expected in rows.items():
        out = np.empty(spec.row_shape, dtype=spec.dtype)
        assert shard.read_row(row, out, scratch)
        assert out.tobytes() == expected.tobytes()


def test_a_row_gives_the_same_bytes_from_any_thread_and_at_any_time():
    spec = spec_of(row_shape=(16, 8, 8, 1024))  # 2 MiB: two blosc blocks
    row = np.random.default_rng(0).standard_normal(spec.row_shape).astype(np.float16)
    alone = encode_row(spec, row)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: encode_row(spec, row.copy()), range(8))) == {alone}


def test_a_row_that_is_a_view_is_stored_by_its_values():
    spec = spec_of(row_shape=(4, 1, 1, 2))
    wide = np.arange(16, dtype=np.float16).reshape(8, 1, 1, 2)
    assert encode_row(spec, wide[::2]) == encode_row(spec, wide[::2].copy())


@pytest.mark.parametrize("codec", ["blosc", "none"])
def test_every_flipped_bit_of_a_row_is_found(codec):
    spec = spec_of(codec)
    data = shard_bytes(spec, rows_of(spec, [1]))
    payload = len(data) - spec.index_bytes
    out = np.empty(spec.row_shape, dtype=spec.dtype)
    for bit in range(payload * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StoreDamagedError, match="checksum"):
            Shard(spec, Bytes(bytes(damaged))).read_row(1, out)


def test_every_flipped_bit_of_an_index_and_every_cut_is_found():
    spec = spec_of()
    data = shard_bytes(spec, rows_of(spec, [0, 2]))
    for bit in range((len(data) - spec.index_bytes) * 8, len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StoreDamagedError, match="index"):
            Shard(spec, Bytes(bytes(damaged)))
    for size in (0, 10, len(data) - 1):
        with pytest.raises(StoreDamagedError, match="index"):
            Shard(spec, Bytes(data[:size]))


def forged(spec: ArraySpec, payload: bytes, offset: int, length: int) -> bytes:
    index = np.full((spec.block_rows, 2), 2**64 - 1, dtype="<u8")
    index[0] = (offset, length)
    table = index.tobytes()
    return payload + table + struct.pack("<I", google_crc32c.value(table))


@pytest.mark.parametrize(("offset", "length"), [(0, 1 << 50), (1 << 50, 10), (5, 2**64 - 6), (0, 101), (2**64 - 2, 1)])
def test_an_index_that_points_outside_its_shard_is_refused(offset, length):
    spec = spec_of()
    with pytest.raises(StoreDamagedError, match="points outside"):
        Shard(spec, Bytes(forged(spec, b"x" * 100, offset, length)))


@pytest.mark.parametrize("length", [0, 1, 4, 5, 19])
def test_a_forged_short_row_is_refused(length):
    spec = spec_of()
    payload = b"\0" * max(length - 4, 0)
    chunk = (payload + struct.pack("<I", google_crc32c.value(payload)))[:length]
    out = np.empty(spec.row_shape, dtype=spec.dtype)
    with pytest.raises(StoreDamagedError):
        Shard(spec, Bytes(forged(spec, chunk, 0, length))).read_row(0, out)


def test_a_blosc_header_cannot_claim_more_memory_than_a_row_has():
    spec = spec_of()
    chunk = bytearray(encode_row(spec, rows_of(spec, [0])[0])[:-4])
    chunk[4:8] = struct.pack("<I", 1 << 30)
    data = bytes(chunk) + struct.pack("<I", google_crc32c.value(bytes(chunk)))
    out = np.empty(spec.row_shape, dtype=spec.dtype)
    with pytest.raises(StoreDamagedError, match="claims 1073741824 bytes instead of 128"):
        Shard(spec, Bytes(forged(spec, data, 0, len(data)))).read_row(0, out)

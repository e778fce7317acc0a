"""Crafted Parquet files and pieces of shards of the kept corpus; checksums are right where a case is not about them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.schemas import CLIP_SCHEMA, SAMPLE_SCHEMA
from featurestore.shards import ABSENT, encode_row
from featurestore.zarr_metadata import ArraySpec

SPEC = ArraySpec(name="tokens", rows=4, row_shape=(2, 2, 2, 4), block_rows=4, dtype="float16")
Case = tuple[str, bytes, str, str, str]  # name, bytes, reader, error and words of it, why


def crc(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", store_schema=False, **options)
    return sink.getvalue().to_pybytes()


def clips(rows: int = 1, **changes: Any) -> pa.Table:
    columns = {"row": list(range(rows)), "clip_id": ["lab/a.mp4"] * rows, "dataset": ["lab"] * rows}
    columns |= {"path": ["a.mp4"] * rows, "kind": ["video"] * rows}
    columns |= {name: [None] * rows for name in ("start_s", "end_s", "end_frame")}
    columns |= changes
    arrays = [pa.array(columns[name], CLIP_SCHEMA.field(name).type) for name in CLIP_SCHEMA.names]
    return pa.table(arrays, schema=CLIP_SCHEMA)


def bomb(rows: int, length: int) -> pa.Table:
    """One text, named again and again: kilobytes that stand for terabytes."""
    once = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * length]))
    table = clips(rows, row=[0] * rows)
    for name in ("clip_id", "path"):
        field = pa.field(name, once.type, nullable=False)
        table = table.set_column(table.schema.get_field_index(name), field, once)
    return table


def tables() -> Iterator[Case]:
    sound = parquet(clips())
    yield (
        "part-bomb",
        parquet(bomb(300_000, 100_000)),
        "part",
        "StoreFormatError: in memory",
        "30 GB of one repeated text",
    )
    yield (
        "part-climbs",
        parquet(clips(path=["../../etc/passwd"], clip_id=["lab/../../etc/passwd"])),
        "part",
        "StoreFormatError: no clip",
        "a path that climbs out",
    )
    yield "part-kind", parquet(clips(kind=["audio"])), "part", "StoreFormatError: no clip", "a kind that is not known"
    yield (
        "part-id",
        parquet(clips(clip_id=["lab/b.mp4"])),
        "part",
        "StoreFormatError: does not belong to its own path",
        "one clip under another's id",
    )
    yield (
        "part-span",
        parquet(clips(start_s=[float("nan")])),
        "part",
        "StoreFormatError: no clip",
        "a span that is no number",
    )
    wide = pa.table({f"c{n}": pa.array([1]) for n in range(12)})
    yield "part-columns", parquet(wide), "part", "StoreFormatError: has columns", "columns of somebody else's"
    yield (
        "part-footer",
        sound[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1",
        "part",
        "StoreFormatError: not readable Parquet",
        "a footer longer than the file",
    )
    yield "part-cut", sound[: len(sound) // 2], "part", "StoreFormatError: not readable Parquet", "cut short"
    yield (
        "part-zeros",
        b"PAR1" + bytes(4096) + b"PAR1",
        "part",
        "StoreFormatError: not readable Parquet",
        "nothing between its ends",
    )
    yield (
        "part-encoding",
        parquet(clips(), use_dictionary=False, column_encoding={"row": "DELTA_BINARY_PACKED"}),
        "part",
        "StoreFormatError: not readable Parquet",
        "an encoding that can repeat without storing",
    )
    yield (
        "part-brotli",
        _with_codec(clips(), "brotli"),
        "part",
        "StoreFormatError: not readable Parquet",
        "a codec that this store's writer never takes",
    )
    text = sound.replace(b"a.mp4", b"\xff\xfe.mp"[:5])
    yield "part-text", text, "part", "StoreFormatError", "text that is no UTF-8"


def _with_codec(table: pa.Table, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=codec, store_schema=False)
    return sink.getvalue().to_pybytes()


def conversations() -> Iterator[Case]:
    def samples(turns: list[dict[str, str | None]], **changes: Any) -> bytes:
        record = {
            "sample_id": "1",
            "clip_id": None,
            "stage": "align",
            "split": "train",
            "source": "x",
            "category": None,
        }
        record |= {"turns": turns, "options": [], "answer_index": None} | changes
        return parquet(pa.Table.from_pylist([record], schema=SAMPLE_SCHEMA))

    human, gpt = {"role": "human", "text": "?"}, {"role": "gpt", "text": "."}
    words = "StoreFormatError: no conversation"
    yield (
        "samples-role",
        samples([{"role": "system", "text": "obey"}, gpt]),
        "samples",
        words,
        "a role that is not known",
    )
    yield "samples-order", samples([human, human]), "samples", words, "turns that do not alternate"
    yield "samples-null", samples([human, {"role": "gpt", "text": None}]), "samples", words, "a turn without text"
    yield (
        "samples-answer",
        samples([human, gpt], options=["a"], answer_index=2**40),
        "samples",
        words,
        "an answer that is no option",
    )


def shards() -> Iterator[Case]:
    row = np.random.default_rng(0).standard_normal(SPEC.row_shape).astype(np.float16)
    payload = encode_row(SPEC, row)[:-4]

    def chunk(place: int, number: int) -> bytes:
        return crc(payload[:place] + struct.pack("<I", number) + payload[place + 4 :])

    yield (
        "chunk-claims",
        chunk(4, 2**32 - 1),
        "chunk",
        "StoreDamagedError: claims 4294967295 bytes",
        "4 GB of a few bytes",
    )
    yield (
        "chunk-length",
        chunk(12, 2**31),
        "chunk",
        "StoreDamagedError: compressed to another length",
        "blosc would read past the end",
    )
    yield (
        "chunk-block",
        chunk(8, 2**31 - 1),
        "chunk",
        "StoreDamagedError: cannot be decompressed",
        "a block larger than the row",
    )
    yield "chunk-short", crc(payload[:8]), "chunk", "StoreDamagedError: claims -1 bytes", "no room for blosc's header"
    yield "chunk-crc", payload + b"\0\0\0\0", "chunk", "StoreDamagedError: its checksum", "a checksum that is wrong"

    def index(*pairs: tuple[int, int]) -> bytes:
        table = np.full((SPEC.block_rows, 2), ABSENT, dtype="<u8")
        for row, pair in enumerate(pairs):
            table[row] = pair
        return crc(table.tobytes())

    outside = "StoreDamagedError: points outside the shard"
    yield "index-far", index((2**40, 10)), "index", outside, "a terabyte behind the end"
    yield "index-wraps", index((2**64 - 11, 11)), "index", outside, "offset and length that add up to 0 in 64 bits"
    yield "index-long", index((0, 2**63)), "index", outside, "a row of exabytes"
    yield (
        "index-short",
        index()[:-16],
        "index",
        "StoreDamagedError: does not match its checksum",
        "an index that is cut short",
    )

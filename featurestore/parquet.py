"""Parquet as the store keeps it: fixed bytes for a table, a digest of their own, reading in bounded memory.

The digest stands in the file's footer (key `merv_cache.sha256`, any Parquet reader may ignore it): the sha256 of the
whole file with the digest's own 64 characters as zeros. So every bit is covered before any snapshot names the file.
What is read may be a stranger's: claimed sizes are compared with the file's own size before anything is decoded, since
a few kilobytes of Parquet can stand for terabytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featurestore.objects.base import Objects, get_bounded
from featurestore.parquet_guard import ColumnSize, column_sizes
from mervcache.errors import StoreFormatError
from mervcache.files import sha256_hex

MAX_TABLE_BYTES = 2 << 30  # of a file; ten million clips take 1 GB
_ROW_GROUP_ROWS = 1 << 16
_DIGEST_KEY = b"merv_cache.sha256"
_BLANK = b"0" * 64
_MARK = _DIGEST_KEY + b"\x18\x40"  # then 64 characters: Thrift's header of a text of that length
# A table in memory may have this many bytes, plus so many per byte of its file. Ours have under 30 per byte; columns
# that are all null, the most that an honest file expands, about 100.
_FREE_BYTES = 64 << 20
_EXPANSION = 256
_WORTH_THREADS_BYTES = 4 << 20  # below it none is started: a short program that ends beside a new one may be aborted
_BATCH_ROWS = 1 << 16
_UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, TypeError)


def table_bytes(table: pa.Table) -> bytes:
    """Parquet with fixed options and the file's own digest: the same table gives the same bytes."""
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=3,
        version="2.6",
        data_page_version="1.0",
        use_dictionary=True,
        write_statistics=True,
    ) as writer:
        writer.write_table(table, row_group_size=_ROW_GROUP_ROWS)
        writer.add_key_value_metadata({_DIGEST_KEY: _BLANK})
    data = sink.getvalue()
    start = _digest_place(data)
    assert start is not None
    return data[:start] + sha256_hex(data).encode() + data[start + 64 :]


def own_digest_holds(data: bytes) -> bool | None:
    """Do the bytes match the digest in their own footer? None: there is none (an older version wrote them)."""
    start = _digest_place(data)
    if start is None:
        return None
    blanked = data[:start] + _BLANK + data[start + 64 :]
    return sha256_hex(blanked).encode() == data[start : start + 64]


def _digest_place(data: bytes) -> int | None:
    start = data.rfind(_MARK) + len(_MARK)
    return start if start >= len(_MARK) and start + 64 <= len(data) else None


def table_file(objects: Objects, key: str) -> bytes:
    """The bytes of a Parquet file of believable size."""
    return get_bounded(objects, key, MAX_TABLE_BYTES)


def read_table(
    data: bytes, schema: pa.Schema, what: str, *, columns: list[str] | None = None, exactly: bool = True
) -> pa.Table:
    """The columns of a Parquet file; raises StoreFormatError unless it has `schema` and a believable size.

    `exactly` wants no other columns than those of the schema.
    """
    names = schema.names if columns is None else columns
    limit = _FREE_BYTES + _EXPANSION * len(data)
    sizes = column_sizes(data, set(names), limit, what)  # before pyarrow sees it: some footers end its process
    try:
        file = _open(data)
        stored = file.schema_arrow
        if exactly and not stored.equals(schema, check_metadata=False):
            raise StoreFormatError(f"{what} has columns {_some(stored.names)}, expected {schema.names}")
        for name in names:
            if stored.names.count(name) != 1 or stored.field(name).type != schema.field(name).type:
                raise StoreFormatError(f"{what} lacks the column {name} as {schema.field(name).type}")
        _refuse_bombs(data, sizes, limit, what)
        table = file.read(columns=names, use_threads=len(data) > _WORTH_THREADS_BYTES)
        table.validate(full=True)  # text that is no UTF-8 would only fail where it is printed
    except _UNREADABLE as error:
        raise StoreFormatError(f"{what} is not readable Parquet; restore it from a copy ({error})") from error
    return table


def _open(data: bytes, **options) -> pq.ParquetFile:
    limits = {"thrift_string_size_limit": len(data) + 1024, "thrift_container_size_limit": len(data) + 1024}
    return pq.ParquetFile(pa.BufferReader(data), **limits, **options)


def _some(names: list[str]) -> str:
    return f"{names[:12]}" + (" and more" if len(names) > 12 else "")


def _refuse_bombs(data: bytes, sizes: Mapping[str, ColumnSize], limit: int, what: str) -> None:
    """Compare what the file would take in memory with what it takes on disk."""
    surely = sum(size.plain_bytes + size.values * 16 for size in sizes.values())
    at_most = surely + sum(size.values * size.longest_repeated for size in sizes.values())
    if surely <= limit < at_most:  # texts named by number may repeat without end: count them
        for path, size in sizes.items():
            if size.values * size.longest_repeated > limit // 64:
                surely += _repeated_bytes(data, path, limit)
            else:
                surely += size.values * size.longest_repeated
    if surely > limit:
        raise StoreFormatError(
            f"{what} has {len(data)} bytes and would take more than {limit} in memory: no table of a store does"
        )


def _repeated_bytes(data: bytes, path: str, limit: int) -> int:
    """Bytes of a column's texts, found without making them: lengths of the distinct ones, times their numbers."""
    total = 0
    file = _open(data, read_dictionary=[path])
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[path], use_threads=False):
        array = batch.column(0)
        while not isinstance(array, pa.DictionaryArray):
            if pa.types.is_list(array.type):
                array = array.flatten()
            elif pa.types.is_struct(array.type):
                array = array.field(0)
            else:
                return total + array.nbytes
        lengths = pc.binary_length(array.dictionary).cast(pa.int64())
        total += pc.sum(lengths.take(array.indices)).as_py() or 0
        if total > limit:
            break
    return total

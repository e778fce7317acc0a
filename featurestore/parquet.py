"""Parquet as the store keeps it: the same table gives the same bytes, with a digest of their own.

The digest is in the file's footer (key `merv_cache.sha256`, which any reader may ignore): the sha256 of the whole file
with the digest's own 64 characters as zeros, so every bit is covered before any snapshot names the file.
"""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from featurestore.objects.base import Objects, get_bounded
from featurestore.parquet_guard import check_expansion, column_sizes, open_table
from mervcache.errors import StoreDamagedError, StoreFormatError
from mervcache.files import sha256_hex

MAX_TABLE_BYTES = 2 << 30  # of a file; ten million clips take 1 GB
_ROW_GROUP_ROWS = 1 << 16
_DIGEST_KEY = b"merv_cache.sha256"
_BLANK = b"0" * 64
_MARK = _DIGEST_KEY + b"\x18\x40"  # then 64 characters: Thrift's header of a text of that length
# A table in memory may have this many bytes, plus so many per byte of its file. The store's own have under 30 per
# byte; columns that are all null, the most that a sound file expands, about 100.
_FREE_BYTES = 64 << 20
_EXPANSION = 256
_WORTH_THREADS_BYTES = 4 << 20  # below it none is started: a program that exits while one starts may be aborted
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
    """True if the bytes match the digest in their footer, None if they have none (an older version wrote them)."""
    start = _digest_place(data)
    if start is None:
        return None
    blanked = data[:start] + _BLANK + data[start + 64 :]
    return sha256_hex(blanked).encode() == data[start : start + 64]


def _digest_place(data: bytes) -> int | None:
    start = data.rfind(_MARK) + len(_MARK)
    return start if start >= len(_MARK) and start + 64 <= len(data) else None


def table_file(objects: Objects, key: str, *, sha256: str | None = None) -> bytes:
    """The bytes of a Parquet file of plausible size; the caller checks that they have `sha256`."""
    return get_bounded(objects, key, MAX_TABLE_BYTES, sha256=sha256)


def digested_file(objects: Objects, key: str, sha256: str) -> bytes:
    """The bytes of a file of plausible size that must have this sha256; StoreDamagedError for others."""
    data = get_bounded(objects, key, MAX_TABLE_BYTES)
    if sha256_hex(data) != sha256:
        raise StoreDamagedError(f"{key} does not match the snapshot's digest; run `merv-pipeline verify` on the source")
    return data


def read_table(
    data: bytes, schema: pa.Schema, what: str, *, columns: list[str] | None = None, exactly: bool = True
) -> pa.Table:
    """The columns of a Parquet file; StoreFormatError unless it has `schema` and a plausible size.

    `exactly` allows no other columns than those of the schema.
    """
    names = schema.names if columns is None else columns
    limit = _FREE_BYTES + _EXPANSION * len(data)
    sizes = column_sizes(data, set(names), limit, what)  # before pyarrow sees it: some footers end its process
    try:
        file = open_table(data)
        stored = file.schema_arrow
        if exactly and not stored.equals(schema, check_metadata=False):
            more = " and more" if len(stored.names) > 12 else ""
            raise StoreFormatError(f"{what} has columns {stored.names[:12]}{more}, expected {schema.names}")
        for name in names:
            if stored.names.count(name) != 1 or stored.field(name).type != schema.field(name).type:
                raise StoreFormatError(f"{what} lacks the column {name} as {schema.field(name).type}")
        check_expansion(data, sizes, limit, what)
        table = file.read(columns=names, use_threads=len(data) > _WORTH_THREADS_BYTES)
        table.validate(full=True)  # text that is no UTF-8 would only fail where it is printed
    except _UNREADABLE as error:
        raise StoreFormatError(f"{what} is not readable Parquet; restore it from a copy ({error})") from error
    return table


def named_table_file(objects: Objects, key: str, sha256: str) -> bytes:
    """The bytes of a table that a snapshot names with their digest; StoreDamagedError where they are not there."""
    try:
        data = table_file(objects, key, sha256=sha256)
    except FileNotFoundError:
        raise StoreDamagedError(f"{key} is missing though the snapshot names it; restore it from a copy") from None
    if sha256_hex(data) != sha256:
        raise StoreDamagedError(f"{key} does not match the snapshot's digest; run `merv-pipeline verify`")
    return data

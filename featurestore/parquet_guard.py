"""What an untrusted Parquet file may claim, checked before pyarrow decodes a page.

A few kilobytes of Parquet can claim terabytes, and some footers end pyarrow's process (an uncaught C++ exception). So
footer and page headers are read here first, with a bounded reader of Thrift's compact protocol, and only what the
store's own writer makes is accepted: its codecs, encodings and page types, nothing encrypted or in another file. Field
numbers are those of parquet-format/src/main/thrift/parquet.thrift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mervcache.errors import StoreFormatError

_MAX_PAGES = 100_000  # ten million clips have ten thousand
_MAX_COLUMNS = 100_000  # over all row groups
_MAGIC = b"PAR1"
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2  # PageType
_ENCODINGS = {0, 2, 3, 8}  # PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY: none repeats what it has not stored
_CODECS = {0, 1, 6}  # UNCOMPRESSED, SNAPPY, ZSTD
_TYPES = range(8)
_BYTE_ARRAY = 6
_BATCH_ROWS = 1 << 16
_MAX_DEPTH = 12
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)  # of Thrift


@dataclass
class ColumnSize:
    """Sizes of one column over all row groups."""

    plain_bytes: int = 0  # of all pages, decompressed
    values: int = 0
    longest_repeated: int = 0  # bytes that one text of a dictionary may have; 0 for numbers


@dataclass(frozen=True)
class _Chunk:
    """One column of one row group."""

    path: str  # of the leaf: "turns.list.element.text"
    type: int
    num_values: int
    start: int
    stop: int


def column_sizes(data: bytes, names: set[str], limit: int, what: str) -> Mapping[str, ColumnSize]:
    """Sizes by leaf column of the columns named; StoreFormatError where they pass the limit or cannot be read."""
    sizes: dict[str, ColumnSize] = {}
    pages = total = 0
    try:
        for chunk in _chunks(data, limit, what):
            if chunk.path.split(".")[0] not in names:
                continue
            size = sizes.setdefault(chunk.path, ColumnSize())
            for header in _pages(data, chunk):
                pages += 1
                total += _count(header, size, chunk.type)
                if pages > _MAX_PAGES or total > limit or size.values * 8 > limit:
                    raise StoreFormatError(f"{what} has {len(data)} bytes and claims over {limit} in memory")
    except (IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise StoreFormatError(f"{what} is not readable Parquet; restore it from a copy ({error})") from None
    return sizes


def open_table(data: bytes, **options: Any) -> pq.ParquetFile:
    """pyarrow's view of a file whose `column_sizes` were read, its Thrift values bounded by the file's size."""
    limits = {"thrift_string_size_limit": len(data) + 1024, "thrift_container_size_limit": len(data) + 1024}
    return pq.ParquetFile(pa.BufferReader(data), **limits, **options)


def check_expansion(data: bytes, sizes: Mapping[str, ColumnSize], limit: int, what: str) -> None:
    """Refuse a file that would take more than `limit` bytes in memory."""
    surely = sum(size.plain_bytes + size.values * 16 for size in sizes.values())
    at_most = surely + sum(size.values * size.longest_repeated for size in sizes.values())
    if surely <= limit < at_most:  # texts of a dictionary may repeat without end: count them
        for path, size in sizes.items():
            repeated = size.values * size.longest_repeated
            surely += _repeated_bytes(data, path, limit) if repeated > limit // 64 else repeated
    if surely > limit:
        raise StoreFormatError(
            f"{what} has {len(data)} bytes and would take more than {limit} in memory: no table of a store does"
        )


def _repeated_bytes(data: bytes, path: str, limit: int) -> int:
    """Bytes of a column's texts, found without making them: lengths of the distinct ones, times their numbers."""
    total = 0
    for batch in open_table(data, read_dictionary=[path]).iter_batches(
        batch_size=_BATCH_ROWS, columns=[path], use_threads=False
    ):
        array = batch.column(0)
        while not isinstance(array, pa.DictionaryArray):
            if isinstance(array, pa.ListArray):
                array = array.flatten()
            elif isinstance(array, pa.StructArray):
                array = array.field(0)
            else:
                return total + array.nbytes
        lengths = pc.binary_length(array.dictionary).cast(pa.int64())
        total += pc.sum(lengths.take(array.indices)).as_py() or 0
        if total > limit:
            break
    return total


def _chunks(data: bytes, limit: int, what: str) -> Iterator[_Chunk]:
    length = int.from_bytes(data[-8:-4], "little")  # magic number, pages, footer, its length, magic number
    if len(data) < 12 or data[:4] != _MAGIC or data[-4:] != _MAGIC or length > len(data) - 12:
        raise ValueError("it does not begin and end as Parquet does")
    footer, _ = read_struct(data[-8 - length : -8], 0)
    if not 0 <= footer[3] * 8 <= limit:
        raise StoreFormatError(f"{what} has {len(data)} bytes and claims {footer[3]} rows, over {limit} in memory")
    groups = footer[4]
    if sum(len(group[1]) for group in groups) > _MAX_COLUMNS or sum(group[3] for group in groups) != footer[3]:
        raise ValueError(f"{len(groups)} row groups")
    for group in groups:
        for column in group[1]:
            facts = column[3]
            if 1 in column or 8 in column or 9 in column:
                raise ValueError("a column that is encrypted or in another file")
            if facts[4] not in _CODECS or facts[1] not in _TYPES or not set(facts[2]) <= _ENCODINGS:
                raise ValueError(f"a column of codec {facts[4]}, type {facts[1]}, encodings {facts[2]}")
            start = facts[9]
            if 0 < facts.get(11, 0) < start:
                start = facts[11]
            if not (0 <= facts[5] * 8 <= limit and group[3] >= 0):
                raise ValueError(f"a column of {facts[5]} values")
            path = b".".join(facts[3]).decode()
            yield _Chunk(path, facts[1], facts[5], start, start + facts[7])


def _pages(data: bytes, chunk: _Chunk) -> Iterator[dict[int, Any]]:
    """Headers of a column chunk's pages, in order."""
    if chunk.num_values == 0:
        return  # no page is read, and an empty table has none
    place = chunk.start
    if not 0 < place <= chunk.stop <= len(data):
        raise ValueError("a column outside the file")
    while place < chunk.stop:
        header, place = read_struct(data, place)
        if not 0 <= header[3] <= len(data) or header[2] < 0:
            raise ValueError("a page outside the file")
        yield header
        place += header[3]


def _count(header: Mapping[int, Any], size: ColumnSize, physical_type: int) -> int:
    """Add a page to its column's sizes; returns its decompressed bytes."""
    inner = header.get({_DATA_PAGE: 5, _DICTIONARY_PAGE: 7}.get(header[1], -1))
    if not isinstance(inner, dict) or inner[2] not in _ENCODINGS or inner[1] < 0:
        raise ValueError("a page of another type than this store's writer makes")
    size.plain_bytes += header[2]
    if header[1] == _DATA_PAGE:
        size.values += inner[1]
    elif physical_type == _BYTE_ARRAY:
        size.longest_repeated = max(size.longest_repeated, header[2])
    return header[2]


def read_struct(data: bytes, place: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A struct as {field number: value}, and where it ends; ValueError or IndexError where there is none."""
    if depth > _MAX_DEPTH:
        raise ValueError("too deep")
    found: dict[int, Any] = {}
    field = 0
    while (byte := data[place]) != 0:
        place += 1
        if byte >> 4:
            field += byte >> 4
        else:
            number, place = _integer(data, place)
            field = number
        found[field], place = _value(data, place, byte & 15, depth)
    return found, place + 1


def _value(data: bytes, place: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, place
    if kind == _BYTE:
        return data[place], place + 1
    if kind in (_I16, _I32, _I64):
        return _integer(data, place)
    if kind == _DOUBLE:
        return data[place : place + 8], place + 8
    if kind == _BINARY:
        length, place = _varint(data, place)
        if place + length > len(data):
            raise ValueError("a text past the end")
        return data[place : place + length], place + length
    if kind in (_LIST, _SET):
        return _list(data, place, depth)
    if kind == _STRUCT:
        return read_struct(data, place, depth + 1)
    raise ValueError(f"type {kind}")


def _list(data: bytes, place: int, depth: int) -> tuple[list[Any], int]:
    size, kind = data[place] >> 4, data[place] & 15
    place += 1
    if size == 15:
        size, place = _varint(data, place)
    if size > len(data) - place:  # every element takes a byte
        raise ValueError("a list past the end")
    found: list[Any] = []
    for _ in range(size):
        if kind in (_TRUE, _FALSE):
            value, place = data[place] == _TRUE, place + 1
        else:
            value, place = _value(data, place, kind, depth + 1)
        found.append(value)
    return found, place


def _integer(data: bytes, place: int) -> tuple[int, int]:
    number, place = _varint(data, place)
    return (number >> 1) ^ -(number & 1), place


def _varint(data: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")

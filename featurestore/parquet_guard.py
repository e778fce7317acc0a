"""What a Parquet file says of its sizes, read without decoding a page.

The footer's sizes are claims that the decoder does not check; the page headers are what it allocates by. So both are
read here (parquet-format/src/main/thrift/parquet.thrift names the fields), and only what our writer makes is let
through: its codecs, encodings and kinds of pages, no encryption, no columns in other files.

Thrift's compact protocol, as much of it as Parquet's headers and footer need; bounded, for bytes of strangers.

pyarrow's own look at a footer ends the process where a value is out of its range (an exception of C++ that nobody
catches), so it may only see a footer that was looked at here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mervcache.errors import StoreFormatError

_MAX_DEPTH = 12
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


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
    found = []
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


_MAX_PAGES = 100_000  # ten million clips have ten thousand
_MAX_COLUMNS = 100_000  # over all row groups
_MAGIC = b"PAR1"
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2  # PageType
_ENCODINGS = {0, 2, 3, 8}  # PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY: none repeats what it has not stored
_CODECS = {0, 1, 6}  # UNCOMPRESSED, SNAPPY, ZSTD
_TYPES = range(8)
_BYTE_ARRAY = 6


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
    """Sizes by leaf column of the columns named; raises where they pass the limit, or where nothing can be read."""
    try:
        return _sizes(data, names, limit, what)
    except (IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise StoreFormatError(f"{what} is not readable Parquet; restore it from a copy ({error})") from None


def _sizes(data: bytes, names: set[str], limit: int, what: str) -> dict[str, ColumnSize]:
    sizes: dict[str, ColumnSize] = {}
    pages = total = 0
    for chunk in _chunks(data, limit, what):
        if chunk.path.split(".")[0] not in names:
            continue
        size = sizes.setdefault(chunk.path, ColumnSize())
        for header in _pages(data, chunk):
            pages += 1
            total += _count(header, size, chunk.type)
            if pages > _MAX_PAGES or total > limit or size.values * 8 > limit:
                raise StoreFormatError(f"{what} has {len(data)} bytes and claims over {limit} in memory")
    return sizes


def _chunks(data: bytes, limit: int, what: str) -> Iterator[_Chunk]:
    footer, _ = read_struct(_footer(data), 0)
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


def _footer(data: bytes) -> bytes:
    """Between magic numbers: pages, the footer, its length."""
    length = int.from_bytes(data[-8:-4], "little")
    if len(data) < 12 or data[:4] != _MAGIC or data[-4:] != _MAGIC or length > len(data) - 12:
        raise ValueError("it does not begin and end as Parquet does")
    return data[-8 - length : -8]


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
        raise ValueError("a page of another kind than this store's writer makes")
    size.plain_bytes += header[2]
    if header[1] == _DATA_PAGE:
        size.values += inner[1]
    elif physical_type == _BYTE_ARRAY:
        size.longest_repeated = max(size.longest_repeated, header[2])
    return header[2]

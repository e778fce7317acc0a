"""What a Parquet file's pages say of their sizes, read without decoding one.

The footer's sizes are claims that the decoder does not check; the page headers are what it allocates by. So they are
walked here: a header is a small Thrift struct (compact protocol, parquet-format/src/main/thrift/parquet.thrift).
Only pages of the kinds that our writer makes are let through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featurestore.errors import StoreFormatError

_MAX_PAGES = 100_000  # ten million clips have ten thousand
_MAX_DEPTH = 4
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2  # PageType
_ENCODINGS = {0, 2, 3, 8}  # PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY: none repeats what it has not stored
_CODECS = {"ZSTD", "UNCOMPRESSED", "SNAPPY"}


@dataclass
class ColumnSize:
    """Sizes of one column over all row groups."""

    plain_bytes: int = 0  # of all pages, decompressed
    values: int = 0
    longest_repeated: int = 0  # bytes that one text of a dictionary may have; 0 for numbers


def column_sizes(data: bytes, metadata: Any, names: set[str], limit: int, what: str) -> Mapping[str, ColumnSize]:
    """Sizes by leaf column (`turns.list.element.text`) of the columns named; raises where they pass the limit."""
    if metadata.num_row_groups * metadata.num_columns > _MAX_PAGES or metadata.num_rows * 8 > limit:
        raise StoreFormatError(f"{what} claims {metadata.num_rows} rows in {metadata.num_row_groups} groups: too many")
    sizes: dict[str, ColumnSize] = {}
    pages = total = 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            path = column.path_in_schema
            if path.split(".")[0] not in names:
                continue
            if column.compression not in _CODECS:
                raise StoreFormatError(f"{what} is compressed by {column.compression}, expected ZSTD")
            size = sizes.setdefault(path, ColumnSize())
            for header in _pages(data, column, what):
                pages += 1
                total += _count(header, size, column.physical_type, what)
                if pages > _MAX_PAGES or total > limit or size.values * 8 > limit:
                    raise StoreFormatError(f"{what} has {len(data)} bytes and claims over {limit} in memory")
            if size.values < column.num_values and column.num_values * 8 > limit:
                raise StoreFormatError(f"{what} claims {column.num_values} values in {path}: too many")
    return sizes


def _pages(data: bytes, column: Any, what: str):
    """Headers of a column chunk's pages, in order."""
    if column.num_values == 0:
        return  # no page is read, and an empty table has none
    place = column.data_page_offset
    if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < place:
        place = column.dictionary_page_offset
    stop = place + column.total_compressed_size
    if not 0 < place <= stop <= len(data):
        raise StoreFormatError(f"{what} names a column outside the file")
    while place < stop:
        try:
            header, place = _struct(data, place, 0)
            compressed = header[3]
            if not 0 <= compressed <= len(data) or header[2] < 0:
                raise ValueError("size")
        except (IndexError, KeyError, ValueError, TypeError) as error:
            raise StoreFormatError(f"{what} has a page whose header cannot be read ({error})") from None
        yield header
        place += compressed


def _count(header: Mapping[int, Any], size: ColumnSize, physical_type: str, what: str) -> int:
    """Add a page to its column's sizes; returns its decompressed bytes."""
    inner = header.get({_DATA_PAGE: 5, _DICTIONARY_PAGE: 7}.get(header.get(1), -1))
    if not isinstance(inner, dict) or inner.get(2) not in _ENCODINGS or not isinstance(inner.get(1), int):
        raise StoreFormatError(f"{what} has a page of another kind than this store's writer makes")
    if inner[1] < 0:
        raise StoreFormatError(f"{what} has a page of {inner[1]} values")
    size.plain_bytes += header[2]
    if header[1] == _DATA_PAGE:
        size.values += inner[1]
    elif physical_type == "BYTE_ARRAY":
        size.longest_repeated = max(size.longest_repeated, header[2])
    return header[2]


def _struct(data: bytes, place: int, depth: int) -> tuple[dict[int, Any], int]:
    """A Thrift struct in the compact protocol: field number -> value, and where it ends."""
    if depth > _MAX_DEPTH:
        raise ValueError("too deep")
    found: dict[int, Any] = {}
    field = 0
    while (byte := data[place]) != 0:
        place += 1
        if byte >> 4:
            field += byte >> 4
        else:
            number, place = _varint(data, place)
            field = (number >> 1) ^ -(number & 1)
        found[field], place = _value(data, place, byte & 15, depth)
    return found, place + 1


def _value(data: bytes, place: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return kind == 1, place
    if kind == 3:  # byte
        return data[place], place + 1
    if kind in (4, 5, 6):  # integers of 16, 32 and 64 bits, zigzag
        number, place = _varint(data, place)
        return (number >> 1) ^ -(number & 1), place
    if kind == 7:  # double
        return None, place + 8
    if kind == 8:  # text
        length, place = _varint(data, place)
        if place + length > len(data):
            raise ValueError("text")
        return None, place + length
    if kind == 12:
        return _struct(data, place, depth + 1)
    raise ValueError(f"type {kind}")


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
            raise ValueError("number")

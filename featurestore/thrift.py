"""Thrift's compact protocol, as much of it as Parquet's headers and footer need; bounded, for bytes of strangers.

pyarrow's own look at a footer ends the process where a value is out of its range (an exception of C++ that nobody
catches), so it may only see a footer that was looked at here.
"""

from __future__ import annotations

from typing import Any

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

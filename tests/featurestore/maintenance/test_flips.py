"""One flipped bit is located by the crc32c behind the bytes."""

from __future__ import annotations

import struct

import google_crc32c
from hypothesis import given
from hypothesis import strategies as st

from featurestore.maintenance.repair import flip_by_crc


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


def with_crc(payload: bytes) -> bytes:
    return payload + struct.pack("<I", google_crc32c.value(payload))


@given(st.binary(min_size=1, max_size=500), st.data())
def test_any_bit_of_bytes_that_end_in_their_checksum(payload, draw):
    data = with_crc(payload)
    assert flip_by_crc(data) is None
    place, bit = draw.draw(st.integers(0, len(data) - 1)), draw.draw(st.integers(0, 7))
    assert flip_by_crc(flipped(data, place, bit)) == (place, bit)


def test_two_bits_are_too_many():
    damaged = flipped(flipped(with_crc(b"a store of features"), 3, 1), 9, 2)
    assert flip_by_crc(damaged) is None

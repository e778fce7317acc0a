"""One flipped bit is found and turned back."""

from __future__ import annotations

import hashlib
import struct

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore.maintenance.repair import flip_by_crc, flipped, undo_document_flip, undo_flip
from featurestore.records import journal_bytes, parse_journal
from mervcache.errors import StoreError


@given(st.binary(min_size=1, max_size=300), st.data())
def test_any_bit_of_bytes_with_a_known_digest(data, draw):
    place, bit = draw.draw(st.integers(0, len(data) - 1)), draw.draw(st.integers(0, 7))
    assert undo_flip(flipped(data, place, bit), hashlib.sha256(data).hexdigest()) == data


def test_two_bits_are_too_many():
    data = b"a store of features"
    damaged = flipped(flipped(data, 3, 1), 9, 2)
    assert undo_flip(damaged, hashlib.sha256(data).hexdigest()) is None


@given(st.binary(min_size=1, max_size=500), st.data())
def test_any_bit_of_bytes_that_end_in_their_checksum(payload, draw):
    data = payload + struct.pack("<I", google_crc32c.value(payload))
    assert flip_by_crc(data) is None
    place, bit = draw.draw(st.integers(0, len(data) - 1)), draw.draw(st.integers(0, 7))
    assert flip_by_crc(flipped(data, place, bit)) == (place, bit)


@pytest.mark.parametrize("place", [0, 5, 20, 75, 78, 90, 300, -1, -2])
def test_any_bit_of_a_document_of_ours(place):
    data = journal_bytes({"host": "h", "seconds": 1.5, "text": "x" * 600})

    def is_whole(trial: bytes) -> bool:
        try:
            return bool(parse_journal(trial, "run"))
        except StoreError:
            return False

    for bit in range(8):
        assert undo_document_flip(flipped(data, place % len(data), bit), is_whole) == data

"""One flipped bit, undone: what a failing disk or memory does most often needs no copy to be mended.

Bytes whose sha256 is known are searched for the one bit that makes it right (quadratic, so for small files only); bytes
that end in their crc32c tell the place of the bit by themselves, in linear time. Nothing is believed without a sha256.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable

import google_crc32c

SEARCH_BYTES = 64 << 10  # 11 s; 16 KiB take 0.7 s
_HEAD_BYTES = 400  # of a JSON file: its digest's own field lies there
_TAIL_BYTES = 3
_POLYNOMIAL = 0x82F63B78  # of crc32c (Castagnoli), reflected
_DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})",?')


def undo_flip(data: bytes, sha256: str) -> bytes | None:
    """The bytes one bit away from `data` that have this digest, or None."""
    if len(data) > SEARCH_BYTES:
        return None
    prefix = hashlib.sha256()
    view = memoryview(data)
    for place, byte in enumerate(data):
        rest = view[place + 1 :]
        for bit in range(8):
            trial = prefix.copy()
            trial.update(bytes([byte ^ (1 << bit)]))
            trial.update(rest)
            if trial.hexdigest() == sha256:
                return flipped(data, place, bit)
        prefix.update(view[place : place + 1])
    return None


def undo_document_flip(data: bytes, is_whole: Callable[[bytes], bool]) -> bytes | None:
    """A JSON file of ours, which holds the sha256 of what stands around (or beside) its digest; `is_whole` decides."""
    ends = [*range(min(_HEAD_BYTES, len(data))), *range(max(0, len(data) - _TAIL_BYTES), len(data))]
    if found := first_whole(data, ends, is_whole):
        return found
    digest = _DIGEST.search(data)
    if digest is None:
        return None
    claimed, start, stop = digest[1].decode(), digest.start(), digest.end()
    for first, last in ((0, len(data) - 1), (data.find(b"{", stop), len(data) - 2)):
        before = data[first:start] if first < start else b""
        after = data[max(stop, first) : last]
        mended = undo_flip(before + after, claimed)
        if mended is None:
            continue
        head = mended[: len(before)] + data[start:stop] if before else data[: max(stop, first)]
        trial = head + mended[len(before) :] + data[last:]
        if is_whole(trial):
            return trial
    return None


def first_whole(data: bytes, places: Iterable[int], is_whole: Callable[[bytes], bool]) -> bytes | None:
    """The first of the bytes one bit away, at any of the places, that is whole."""
    for place in places:
        for bit in range(8):
            if is_whole(trial := flipped(data, place, bit)):
                return trial
    return None


def flip_by_crc(data: bytes | bytearray | memoryview) -> tuple[int, int] | None:
    """(byte, bit) that was flipped in bytes that end in their crc32c; None if they agree, or if more is wrong.

    A flipped bit changes the checksum by the polynomial, stepped once for every bit behind it, whatever the bytes are.
    """
    payload, stored = bytes(data[:-4]), int.from_bytes(data[-4:], "little")
    difference = google_crc32c.value(payload) ^ stored
    if difference == 0:
        return None
    if difference.bit_count() == 1:
        bit = difference.bit_length() - 1
        return len(payload) + bit // 8, bit % 8
    state = _POLYNOMIAL
    for behind in range(8 * len(payload)):
        if state == difference:
            place = 8 * len(payload) - 1 - behind
            return place // 8, place % 8
        state = (state >> 1) ^ (_POLYNOMIAL if state & 1 else 0)
    return None


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]

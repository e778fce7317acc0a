"""Joined transport streams: distinguish the place where two were joined from one where packets are missing.

A transport stream is made to be joined (`cat a.ts b.ts`), but its packets of 188 bytes are counted modulo 16, the count
starts again in the second part, and FFmpeg marks the frame at the join as corrupt although all of its bytes are there.
Some decoders show a frame whose end is missing without an error (HEVC), so the packets themselves are examined.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

SYNC = 0x47
LAYOUTS = ((188, 0), (192, 4), (204, 0))  # bytes per packet, where its sync byte is: TS, M2TS, TS with check bytes
CHUNK_PACKETS = 1 << 16
PAT_PID = 0  # the table that every part begins with


def count_joins(file: BinaryIO, pid: int) -> int | None:
    """How often a whole part ends and another one begins in the packets of `pid`; None if packets are missing.

    At a join the last packet of the first part is filled up to its size, as the last one of every frame is, and the
    first packet of the second part begins a frame, after the table that a stream begins with.
    """
    joins = 0
    rest = np.zeros((0, LAYOUTS[0][0]), np.uint8)  # the last packet of `pid` so far, and what followed it
    for packets in _chunks(file):
        if packets is None:
            return None
        packets = np.concatenate([rest, packets])
        pids = (packets[:, 1] & 0x1F).astype(int) << 8 | packets[:, 2]
        own = np.flatnonzero(pids == pid)
        if not len(own):
            rest = packets if len(rest) else rest
            continue
        if (packets[own, 1] & 0x80).any():  # the receiver's mark for bits that it could not correct
            return None
        has_payload, counter = packets[own, 3] >> 4 & 1, packets[own, 3] & 0x0F
        has_fields = (packets[own, 3] & 0x20 > 0) & (packets[own, 4] > 0)
        is_announced = has_fields & (packets[own, 5] & 0x80 > 0)
        is_break = (counter[:-1] + has_payload[1:] & 0x0F != counter[1:]) & ~is_announced[1:]
        for number in np.flatnonzero(is_break):
            before, after = own[number], own[number + 1]
            begins_a_part = packets[after, 1] & 0x40 and (pids[before + 1 : after] == PAT_PID).any()
            if not begins_a_part or not _is_filled_up(packets[before]):
                return None
            joins += 1
        rest = packets[own[-1] :]
    return joins


def _is_filled_up(packet: np.ndarray) -> bool:
    """Whether a packet holds bytes that only fill it up to 188: its frame ends in it."""
    length, fields = int(packet[4]), int(packet[5])
    if not packet[3] & 0x20:
        return False
    if length == 0:
        return True  # the one byte of its length
    used = 1 + 6 * (fields >> 4 & 1) + 6 * (fields >> 3 & 1) + (fields >> 2 & 1)
    for is_present in (fields >> 1 & 1, fields & 1):  # private data, extension: each with its own length
        if is_present and used < length:
            used += 1 + int(packet[5 + used])
    return used < length


def _chunks(file: BinaryIO) -> Iterator[np.ndarray | None]:
    """Packets as uint8 [n, 188], many at a time; None where they do not follow each other."""
    head = file.read(5 * max(size for size, _ in LAYOUTS))
    layouts = [(size, at) for size, at in LAYOUTS if len(head) > at and set(head[at::size]) == {SYNC}]
    if not layouts:
        yield None
        return
    size, at = layouts[0]
    file.seek(0)
    while data := file.read(CHUNK_PACKETS * size):
        packets = np.frombuffer(data[: len(data) // size * size], np.uint8).reshape(-1, size)[:, at : at + 188]
        if len(data) % size or (packets[:, 0] != SYNC).any():
            yield None
            return
        yield packets

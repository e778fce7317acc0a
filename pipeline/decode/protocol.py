"""Messages between the pool and its decode processes: a JSON header and raw bytes behind it, over pipes.

    8 bytes   lengths of header and body, two big-endian uint32
    header    JSON
    body      frames, uint8, one view after the other

No pickle: a decode process reads files from strangers, and what it sends back must not be able to run code.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from typing import Any

LENGTHS = struct.Struct(">II")
MAX_HEADER_BYTES = 1 << 20
MAX_BODY_BYTES = 1 << 31  # 2 GiB: 32 frames of 4,000 x 4,000 pixels
SLOWEST_BYTES_PER_S = 4e6  # media is given this long on top of the timeout: a 1 GB file four minutes more


class PipeClosedError(Exception):
    """The other side is gone."""


class DeadlineError(Exception):
    """Nothing complete came in time."""


def allowed_s(timeout_s: float, media_bytes: int) -> float:
    """Seconds that one try at a clip may take."""
    return timeout_s + media_bytes / SLOWEST_BYTES_PER_S


def send(pipe: int, header: dict[str, Any], *buffers: memoryview | bytes) -> None:
    """Write one message to a file descriptor."""
    text = json.dumps(header).encode()
    parts = [memoryview(LENGTHS.pack(len(text), sum(len(b) for b in buffers)) + text), *map(memoryview, buffers)]
    try:
        for part in parts:
            while part:
                part = part[os.write(pipe, part) :]
    except BrokenPipeError:
        raise PipeClosedError from None


def receive(pipe: int, deadline: float | None = None) -> tuple[dict[str, Any], bytearray]:
    """Read one message; `deadline` is on `time.monotonic`'s clock, None waits for ever."""
    header_bytes, body_bytes = LENGTHS.unpack(_read_exactly(pipe, LENGTHS.size, deadline))
    if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
        raise PipeClosedError
    try:
        header = json.loads(bytes(_read_exactly(pipe, header_bytes, deadline)))
    except ValueError:
        raise PipeClosedError from None
    return header, _read_exactly(pipe, body_bytes, deadline)


def _read_exactly(pipe: int, num_bytes: int, deadline: float | None) -> bytearray:
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        _wait_readable(pipe, deadline)
        count = os.readv(pipe, [view])
        if count == 0:
            raise PipeClosedError
        view = view[count:]
    return data


def _wait_readable(pipe: int, deadline: float | None) -> None:
    if deadline is None:
        return
    poll = select.poll()  # not select(): a driver may hold more than 1,024 open files
    poll.register(pipe, select.POLLIN)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise DeadlineError

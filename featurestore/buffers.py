"""A pool of array memory: what a batch was read into is used again once nothing refers to it.

Fresh memory for every batch costs page faults, up to half of an uncompressed read from the page cache. An array from
the pool, its views and the tensors made of them all keep its memory; the pool has it back when the last of them is
gone, so no two live arrays share bytes.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import numpy as np

MIN_POOLED_BYTES = 1 << 20  # smaller arrays come from the allocator, which reuses its own memory
MAX_IDLE_BYTES = 512 << 20  # kept while unused; a batch of 16 clips of MERV's four encoders takes 120 MB


class BufferPool:
    """Uninitialised arrays whose memory is used again; safe among threads."""

    def __init__(self, max_idle_bytes: int = MAX_IDLE_BYTES) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._idle: list[np.ndarray] = []  # uint8, the one returned last at the end
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """Like `numpy.empty`: a writable C-contiguous array whose bytes are arbitrary."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < MIN_POOLED_BYTES:
            return np.empty(shape, dtype=dtype)
        buffer = self._take(num_bytes)
        lease = buffer[:num_bytes]
        weakref.finalize(lease, self._give_back, buffer).atexit = False
        # Views of the array keep its base, a memoryview, which keeps the lease: numpy skips a base that is an array.
        return np.frombuffer(lease.data, dtype=dtype).reshape(shape)

    def _take(self, num_bytes: int) -> np.ndarray:
        """The smallest idle buffer that fits without wasting more than half of itself, else a new one."""
        with self._lock:
            fitting = [n for n, buffer in enumerate(self._idle) if num_bytes <= len(buffer) <= 2 * num_bytes]
            if fitting:
                return self._idle.pop(min(fitting, key=lambda n: len(self._idle[n])))
        return np.empty(num_bytes, dtype=np.uint8)

    def _give_back(self, buffer: np.ndarray) -> None:
        """Keep a buffer and drop the oldest beyond the bound.

        Garbage collection calls this at any moment, also inside `_take`: instead of waiting for the lock, the buffer is
        freed.
        """
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._idle.append(buffer)
            while sum(map(len, self._idle)) > self._max_idle_bytes:
                self._idle.pop(0)
        finally:
            self._lock.release()

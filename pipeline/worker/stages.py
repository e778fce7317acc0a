"""What all blocks of one engine share between decoding and commit: frame memory, one encoding thread, compressors.

A block's batches go through bounded stages: their clips are decoded once their frames fit the budget, a batch whose
clips have all arrived waits in one queue, the encoding thread takes the batches of all blocks from it as they are
complete, and compressor threads encode the rows of what it made. One slow clip delays its own batch only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Protocol

import torch

from pipeline.worker.encode import PendingTokens

FRAME_BYTES_PER_DECODER = 32 << 20  # three videos of MERV's four encoders: one is decoded, two wait
BATCHES_BEHIND = 2  # of each encoder, encoded and not compressed yet


class Work(Protocol):
    """A batch whose clips have arrived."""

    num_bytes: int  # of its frames, as they were acquired

    def encode(self, waited_s: float) -> None:
        """Encode it; `waited_s` is how long the encoding thread had nothing to do. Raises nothing."""
        ...


class Countdown:
    """Calls `then` when `down` was called `number` times, by whichever thread is last."""

    def __init__(self, number: int, then: Callable[[], object]) -> None:
        self._left, self._then = number, then
        self._lock = threading.Lock()

    def down(self) -> None:
        with self._lock:
            self._left -= 1
            is_last = self._left == 0
        if is_last:
            self._then()


class ByteBudget:
    """Bytes that may be in use at once; one amount larger than all of it is let through when nothing else is in use."""

    def __init__(self, num_bytes: int) -> None:
        self._limit, self._used = num_bytes, 0
        self._changed = threading.Condition()

    def acquire(self, num_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + num_bytes <= self._limit)
            self._used += num_bytes

    def release(self, num_bytes: int) -> None:
        with self._changed:
            self._used -= num_bytes
            self._changed.notify_all()


class Stages:
    """The stages of one engine; `close` ends their threads when no block is in flight."""

    def __init__(self, *, num_encoders: int, num_decoders: int, num_compressors: int, threads: int) -> None:
        self.feeding = threading.Lock()  # one block at a time: the older one is decoded first
        self.frames = ByteBudget(FRAME_BYTES_PER_DECODER * (num_decoders + 4))
        self.behind = threading.Semaphore(BATCHES_BEHIND * num_encoders)
        self.launched: PendingTokens | None = None  # the last forward
        self._num_compressors, self._threads = num_compressors, threads
        self._ready: SimpleQueue[Work | None] = SimpleQueue()
        self._compressors = ThreadPoolExecutor(num_compressors, thread_name_prefix="compressor")
        self._encoding = threading.Thread(target=self._encode, name="encoder", daemon=True)
        self._encoding.start()

    def idle(self, seconds: float) -> float:
        """The part of the encoding thread's wait in which the device had nothing to compute, as far as is known."""
        return seconds if self.launched is None or self.launched.is_done() else 0.0

    def put(self, work: Work) -> None:
        """A batch that is ready to be encoded; its frames' bytes are released after it."""
        self._ready.put(work)

    def compress(
        self, rows: Sequence[int], write: Callable[[int], None], done: Callable[[], None]
    ) -> Iterable[Future[None]]:
        """Call `write` for every row on the compressor threads, then `done`; the caller has acquired `behind`."""
        parts = [rows[number :: self._num_compressors] for number in range(min(self._num_compressors, len(rows)))]

        def finish() -> None:
            self.behind.release()
            done()

        left = Countdown(len(parts), finish)

        def write_part(part: Sequence[int]) -> None:
            try:
                for row in part:
                    write(row)
            finally:
                left.down()

        return [self._compressors.submit(write_part, part) for part in parts]

    def close(self) -> None:
        self._ready.put(None)
        self._encoding.join()
        self._compressors.shutdown()

    def _encode(self) -> None:
        torch.set_num_threads(self._threads)  # a new thread of OpenMP has the machine's default
        while True:
            began = time.monotonic()
            work = self._ready.get()
            if work is None:
                return
            num_bytes = work.num_bytes
            work.encode(time.monotonic() - began)
            del work  # and its frames
            self.frames.release(num_bytes)

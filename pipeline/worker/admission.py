"""How many blocks a worker process computes at once: a few of one engine, under a byte budget, or one task alone.

A Dask worker has one task thread. A task that was admitted leaves Dask's pool of threads (`distributed.secede`), so
that the worker takes the next block while this one is still decoded, encoded or committed; the next task waits in
`BlocksInFlight.admit`, still on the task thread, until it fits. So a worker holds at most `MAX_BLOCKS` blocks in flight
and `QUEUED_TASKS` that wait. No torch: the driver sizes its window by these numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MAX_BLOCKS = 6  # in flight: one decodes ahead, one is encoded, the others are compressed and committed
MAX_BLOCK_BYTES = 2 << 30  # of their stored tokens, uncompressed: four blocks of 64 videos and MERV's four encoders
QUEUED_TASKS = 2  # of a worker: one that waits for admission, one that Dask sends ahead


class BlocksInFlight:
    """Admission of blocks; any number of threads may wait, and are admitted in the order in which they came."""

    def __init__(self, max_blocks: int = MAX_BLOCKS, max_bytes: int = MAX_BLOCK_BYTES) -> None:
        self._max_blocks, self._max_bytes = max_blocks, max_bytes
        self._first_in_line = threading.Lock()
        self._changed = threading.Condition()
        self._key: str | None = None  # of the blocks in flight; None: one task alone
        self._bytes: list[int] = []  # of each block in flight

    @contextmanager
    def admit(self, key: str, num_bytes: int) -> Iterator[None]:
        """Around a block of `num_bytes`: waits while blocks of another key, too many or too large ones are in flight.

        A block larger than the budget is admitted when there is no other. The key names what blocks in flight share:
        their engine and their store.
        """

        def fits() -> bool:
            return not self._bytes or (
                self._key == key
                and len(self._bytes) < self._max_blocks
                and sum(self._bytes) + num_bytes <= self._max_bytes
            )

        with self._entered(fits, key, num_bytes):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Around a task that must have the worker for itself: waits until all blocks have left, and admits no other."""
        with self._entered(lambda: not self._bytes, None, 0):
            yield

    @property
    def has_waiting(self) -> bool:
        """Whether a thread waits for admission."""
        return self._first_in_line.locked()

    @contextmanager
    def _entered(self, fits: Callable[[], bool], key: str | None, num_bytes: int) -> Iterator[None]:
        with self._first_in_line, self._changed:
            self._changed.wait_for(fits)
            self._key = key
            self._bytes.append(num_bytes)
        try:
            yield
        finally:
            with self._changed:
                self._bytes.remove(num_bytes)
                self._changed.notify_all()


IN_FLIGHT = BlocksInFlight()  # of this process


def run_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that uses or replaces the engine, with no block in flight."""
    with IN_FLIGHT.alone():
        return function(*arguments)

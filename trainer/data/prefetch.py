"""Making items ahead of their use, in a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates `make(start)`, ..., `make(stop - 1)`, up to `depth` of them made ahead; closes its thread on exit."""

    def __init__(self, make: Callable[[int], T], start: int, stop: int, *, depth: int) -> None:
        self.waited_s = 0.0  # time the consumer stood still, in all
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=max(depth, 1))
        self._stopped = threading.Event()
        self._count = stop - start
        self._thread = threading.Thread(target=self._run, args=(make, start, stop), name="prefetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        for _ in range(self._count):
            began = time.perf_counter()
            made, error = self._queue.get()
            self.waited_s += time.perf_counter() - began
            if error is not None:
                raise error
            yield cast("T", made)

    def _run(self, make: Callable[[int], T], start: int, stop: int) -> None:
        for step in range(start, stop):
            try:
                item = (make(step), None)
            except BaseException as error:  # handed to the consumer, which raises it
                item = (None, error)
            if not self._put(item) or item[1] is not None:
                return

    def _put(self, item: tuple[T | None, BaseException | None]) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

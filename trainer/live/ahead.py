"""Ahead: work on what will be asked for soon is started before it is asked for, a bounded number at a time.

Comes in: names in the order in which they will be taken, and a function that starts the work on one. What a name's
work brings stays in memory until it is taken, so the bound is a bound of memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Futures by name, at most `limit` of them started and not yet taken; safe among threads."""

    def __init__(self, submit: Callable[[str], Future[T]], limit: int) -> None:
        self._submit, self._limit = submit, max(limit, 1)
        self._waiting: dict[str, None] = {}  # an ordered set
        self._started: dict[str, Future[T]] = {}
        self._lock = threading.Lock()

    def expect(self, names: Iterable[str]) -> None:
        """These names come next, in this order; what was expected before and is not among them is given up."""
        with self._lock:
            wanted = dict.fromkeys(names)
            for name in [name for name in self._started if name not in wanted]:
                self._started.pop(name).cancel()
            self._waiting = {name: None for name in wanted if name not in self._started}
            self._fill()

    def take(self, name: str) -> Future[T]:
        """The work on `name`, started now if it was not; another taker of the same name starts it anew."""
        with self._lock:
            self._waiting.pop(name, None)
            future = self._started.pop(name, None) or self._submit(name)
            self._fill()
            return future

    def _fill(self) -> None:
        while self._waiting and len(self._started) < self._limit:
            name = next(iter(self._waiting))
            del self._waiting[name]
            self._started[name] = self._submit(name)

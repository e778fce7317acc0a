"""Interrupt: when a run leaves its loop or writes a checkpoint before its time: told to end, or by the clock."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """A question that turns true once SIGTERM has come: the step is finished and a checkpoint written, then we stop."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set  # signals reach the main thread only
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


class Alarm:
    """Rings when `minutes` have passed since it was set; never, without minutes."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._minutes, self._clock = minutes, clock
        self.set()

    def set(self) -> None:
        """Start anew."""
        self._began = self._clock()

    def rings(self) -> bool:
        """Whether the time is over."""
        return self._minutes is not None and self._clock() - self._began >= 60 * self._minutes

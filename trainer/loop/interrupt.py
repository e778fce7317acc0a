"""Interrupt: when a run leaves its loop or writes a checkpoint before its time: told to end, or by the clock."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """A question that turns true once SIGTERM or Ctrl-C has come: the step is finished, a checkpoint written, we stop.

    A second Ctrl-C stops at once.
    """
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set  # signals reach the main thread only
        return

    def stop(number: int, frame: object) -> None:
        told.set()
        if number == signal.SIGINT:
            print("\nstopping after this step, which is saved (once more to stop at once)", file=sys.stderr, flush=True)
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    # A shell starts what it puts in the background deaf to Ctrl-C, which is then meant for somebody else.
    is_deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    heard = (signal.SIGTERM,) if is_deaf else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield told.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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

"""Signal handling and timed checkpoints: when a run leaves its loop, or saves, before its time."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

from mervcache.console import echo


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True once SIGTERM, SIGHUP or Ctrl-C came; a second Ctrl-C stops at once."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received.is_set  # signals reach the main thread only
        return

    def stop(number: int, frame: object) -> None:
        received.set()
        if number == signal.SIGINT:
            echo(
                "\nstopping after this step, which is saved (once more to stop at once)",
                event="interrupted",
                signal="SIGINT",
            )
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    # A shell starts background processes with SIGINT ignored, nohup with SIGHUP: it is meant for another process.
    numbers = [n for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, *numbers)}
    try:
        yield received.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class CheckpointTimer:
    """Due when `minutes` have passed since the last reset; never, without minutes."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._minutes, self._clock = minutes, clock
        self.reset()

    def reset(self) -> None:
        self._started = self._clock()

    def is_due(self) -> bool:
        return self._minutes is not None and self._clock() - self._started >= 60 * self._minutes

"""What commands do around their one library call: friendly errors, interrupts, progress, results."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from jobs.clusters import ClusterError
from mervcache import console
from mervcache.console import ProgressCallback, say, says
from mervcache.errors import MervCacheError

says_errors = says(
    MervCacheError,
    ClusterError,
    interrupted="Interrupted. What was committed is kept; run the same command again to go on.",
)
show_result = partial(console.show_result, indent=2)


@contextmanager
def told_interrupts() -> Iterator[None]:
    """Ctrl-C and SIGTERM are answered at once, for what runs may need a while to stop; the second one is final."""

    def answer(number: int, frame: Any) -> None:
        signal.signal(number, signal.default_int_handler)
        say("\nstopping: what is committed is kept (once more to stop without waiting)")
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, answer)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)


@contextmanager
def progress(label: str, unit: str, *, size: float = 1) -> Iterator[ProgressCallback]:
    """Shows on stderr what a library call tells: done, rates, ETA; `size` is how many of its items make a unit."""
    shown = _Shown(label, unit, size)
    try:
        yield shown
    finally:
        shown.close()


class _Shown:
    """A line of progress for every start."""

    def __init__(self, label: str, unit: str, size: float) -> None:
        self._label, self._unit, self._size = label, unit, size
        self._lock = threading.Lock()
        self._line = None
        self._items = 0

    def start(self, total: int) -> None:
        from mervcache.console import RunProgress  # rich, on a terminal

        self.close()
        self._items = 0
        self._line = RunProgress(self._label, total=math.ceil(total / self._size), unit=self._unit).__enter__()

    def advance(self, items: int = 1, **amounts: float) -> None:
        with self._lock:
            self._items += items
            self._line.advance(math.ceil(self._items / self._size) - self._line.done, **amounts)

    def close(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.__exit__(None, None, None)

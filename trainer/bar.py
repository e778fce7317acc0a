"""A long loop as a person sees it on stderr: one live bar on a terminal, one line now and then in a log.

Comes in: a total, what is done, and a few words on how it goes. stdout is never touched: it belongs to results.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_INTERVAL_S = 10.0  # between lines where stderr is not a terminal; of long loops a 60th of their time
MAX_LOG_INTERVAL_S = 300.0

Item = TypeVar("Item")


class Bar:
    """`with Bar("train", total=600, start=120) as bar: bar.advance(); bar.tell("loss 1.25")`."""

    def __init__(
        self, label: str, *, total: int, start: int = 0, is_quiet: bool = False, stream: TextIO | None = None
    ) -> None:
        self.label, self.total, self.facts = label, total, ""
        self._start = self._done = self._written = start
        self._began = self._last_line = time.monotonic()
        self._stream = stream or sys.stderr
        is_terminal = self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        is_live = is_terminal and not is_quiet
        self._logs = not is_live and not is_quiet
        self._live = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
            disable=not is_live,
        )
        self._task = self._live.add_task(label, total=total, completed=start, facts="")

    def __enter__(self) -> Bar:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Draw it; its clock has run since it was made."""
        self._live.start()

    def stop(self) -> None:
        """Leave it as it stands; a log gets its last line, if anything was done."""
        self._live.stop()
        if self._logs and self._done > self._written:
            self._write_line()

    def advance(self, number: int = 1) -> None:
        """Count so many more as done."""
        self._done += number
        self._live.advance(self._task, number)
        now = time.monotonic()
        interval_s = min(max(LOG_INTERVAL_S, (now - self._began) / 60), MAX_LOG_INTERVAL_S)
        if self._logs and now - self._last_line >= interval_s:
            self._write_line()

    def tell(self, facts: str) -> None:
        """What else the bar says from now on."""
        self.facts = facts
        self._live.update(self._task, facts=facts)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each counted as it comes."""
        for item in items:
            yield item
            self.advance()

    def text(self) -> str:
        """`train: 120/600, loss 1.2503, 0:01:10, ETA 0:04:40`."""
        now_s = time.monotonic() - self._began
        done, left = self._done - self._start, self.total - self._done
        eta = f"ETA {_clock(now_s * left / done)}" if left > 0 and done else ""
        told = [f"{self._done}/{self.total}", self.facts, _clock(now_s), eta]
        return f"{self.label}: {', '.join(filter(None, told))}"

    def _write_line(self) -> None:
        self._last_line, self._written = time.monotonic(), self._done
        print(self.text(), file=self._stream, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

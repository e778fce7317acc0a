"""Progress of a long run on stderr: one live line on a terminal, one log line now and then elsewhere.

Comes in: how much is done and what was measured on the way. The room knows units by name only, so that extraction and
whatever comes after it share one line. stdout is never touched: it belongs to results.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from types import TracebackType
from typing import TextIO

LOG_INTERVAL_S = 10.0  # between lines where stderr is not a terminal


class RunProgress:
    """Counts items against a total and rates of named amounts, such as frames or MB, per second.

    `with RunProgress("extract", total=120, unit="clips") as progress: progress.advance(8, failed=1, frames=256)`
    """

    def __init__(self, label: str, *, total: int, unit: str, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self.failed = 0
        self.amounts: Counter[str] = Counter()  # what rates are made of, by name
        self._is_shown = not quiet and total > 0  # no work, no line
        self._stream = stream or sys.stderr
        self._started = self._last_line = time.monotonic()
        self._live = None

    def __enter__(self) -> RunProgress:
        if self._is_shown and self._stream.isatty():
            self._live = _live_line(self._stream)
            self._live.start()
            self._bar = self._live.add_task(self.label, total=self.total, text="")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._is_shown:
            self._write_line()

    def advance(self, done: int, *, failed: int = 0, **amounts: float) -> None:
        """Count `done` more items, `failed` of them, and what they amounted to."""
        self.done += done
        self.failed += failed
        self.amounts.update(amounts)
        if self._live is not None:
            self._live.update(self._bar, completed=self.done, text=self.text())
        elif self._is_shown and time.monotonic() - self._last_line >= LOG_INTERVAL_S:
            self._write_line()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def text(self) -> str:
        """`84/120 clips, 1 failed, 3.1 clips/s, 99 frames/s, ETA 0:00:12`."""
        seconds = max(self.elapsed_s, 1e-9)
        rates = [f"{_short(self.done / seconds)} {self.unit}/s"]
        rates += [f"{_short(amount / seconds)} {name}/s" for name, amount in self.amounts.items()]
        left_s = (self.total - self.done) * seconds / self.done if self.done else None
        eta = f"ETA {_clock(left_s)}" if left_s is not None else "ETA unknown"
        return ", ".join([f"{self.done}/{self.total} {self.unit}", f"{self.failed} failed", *rates, eta])

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        print(f"{self.label}: {self.text()}", file=self._stream, flush=True)


def _live_line(stream: TextIO):
    from rich.console import Console  # 0.05 s that --help does not need
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
    )
    return Progress(*columns, console=Console(file=stream))


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

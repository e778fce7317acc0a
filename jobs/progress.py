"""Progress of a long run on stderr: one live line on a terminal, one log line now and then elsewhere.

Comes in: how much is done and what was measured on the way. The room knows units by name only, so that extraction and
whatever comes after it share one line. stdout is never touched: it belongs to results.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO

LOG_INTERVAL_S = 10.0  # between lines where stderr is not a terminal; of long runs a 60th of their time
MAX_LOG_INTERVAL_S = 300.0
RATE_WINDOW_S = 300.0  # rates and ETA are of the last five minutes: a cluster's workers come and go
RATE_STEP_S = 5.0  # between two marks of the window
LOG_WIDTH = 120  # characters of a line in a log
BAR_WIDTH = 24


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What was done of a part of the run, or of the whole of it."""

    done: int = 0
    failed: int = 0
    amounts: Mapping[str, float] = field(default_factory=dict)  # what rates are made of, by name
    seconds: Mapping[str, float] = field(default_factory=dict)  # where workers' time went, by stage
    notes: Mapping[str, int] = field(default_factory=dict)  # what is worth a word if it happened at all

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            done=self.done + other.done,
            failed=self.failed + other.failed,
            **{name: _added(getattr(self, name), getattr(other, name)) for name in ("amounts", "seconds", "notes")},
        )

    def per_second(self, before: Counts, seconds: float) -> tuple[float, dict[str, float]]:
        """Rates of what is done, and of each amount, since `before`; a part that began anew does not count down."""
        rates = {
            name: max(0.0, amount - before.amounts.get(name, 0)) / seconds for name, amount in self.amounts.items()
        }
        return max(0, self.done - before.done) / seconds, rates


class RunProgress:
    """Counts items against a total and rates of named amounts, such as frames or MB, per second.

    `with RunProgress("extract", total=120, unit="clips") as progress: progress.advance(8, failed=1, frames=256)`

    Work in parts, told while it goes on: `report(part, attempt, counts)` replaces what was known of a running part, and
    `finish(part, counts)` settles it, so that a part counts once however often it was tried. Safe among threads.
    """

    def __init__(self, label: str, *, total: int, unit: str, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._settled = Counts()
        self._running: dict[str, tuple[str, Counts]] = {}  # part -> its newest attempt, and what that has done
        self._over: set[str] = set()  # parts, and attempts that a newer one replaced
        self._lock = threading.Lock()
        self._waiting = ""
        self._is_shown = not quiet and total > 0  # no work, no line
        self._stream = stream or sys.stderr
        self._started = self._last_line = time.monotonic()
        self._marks = deque([(self._started, Counts())])  # the first one is where rates begin
        self._written: Counts | None = None  # what the last line in a log told
        self._live = None

    def __enter__(self) -> RunProgress:
        if self._is_shown and is_live(self._stream):
            self._live = _live_line(self._stream)
            self._live.start()
            self._bar = self._live.add_task(self.label, total=self.total, text="")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._is_shown and self._written != self.counts:
            self._write_line()

    def advance(self, done: int, *, failed: int = 0, **amounts: float) -> None:
        """Count `done` more items, `failed` of them, and what they amounted to."""
        with self._lock:
            self._settled += Counts(done=done, failed=failed, amounts=amounts)
        self._show()

    def report(self, part: str, attempt: str, counts: Counts) -> None:
        """What an attempt at a running part has done so far; late and given up ones are not listened to."""
        with self._lock:
            if part in self._over or attempt in self._over:
                return
            before, _ = self._running.get(part, (attempt, None))
            if before != attempt:
                self._over.add(before)
            self._running[part] = (attempt, counts)
        self._show()

    def finish(self, part: str, counts: Counts) -> None:
        """A part is over: what it came to stands in place of what was reported."""
        with self._lock:
            self._running.pop(part, None)
            self._over.add(part)
            self._settled += counts
        self._show()

    def wait(self, reason: str) -> None:
        """Why nothing moves, at the head of the line; "" when it moves again."""
        self._waiting = reason
        self._show()

    @property
    def counts(self) -> Counts:
        """Of parts that are over, and of those that run."""
        with self._lock:
            return sum((counts for _, counts in self._running.values()), start=self._settled)

    @property
    def done(self) -> int:
        return self.counts.done

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def text(self, width: int = LOG_WIDTH) -> str:
        """`84/120 clips, 1 failed, ETA 0:00:12, 3.1 clips/s, 99 frames/s; dinov2 61%`: as much as has room."""
        counts = self.counts
        rate, amounts = counts.per_second(*self._window(counts))
        head = [f"{counts.done}/{self.total} {self.unit}", f"{counts.failed} failed"]
        notes = [f"{count} {name}" for name, count in counts.notes.items() if count]
        rates = [f"{_short(rate)} {self.unit}/s", *(f"{_short(each)} {name}/s" for name, each in amounts.items())]
        parts = [*filter(None, [self._waiting]), *head, *notes, self._eta(counts.done, rate), *rates]
        return _fitting(parts, [f"{name} {share:.0%}" for name, share in _shares(counts.seconds)], width)

    def _window(self, counts: Counts) -> tuple[Counts, float]:
        """What was done some minutes ago, or at the start, and the seconds since."""
        now = time.monotonic()
        with self._lock:
            if now - self._marks[-1][0] >= RATE_STEP_S:
                self._marks.append((now, counts))
            while len(self._marks) > 1 and now - self._marks[1][0] >= RATE_WINDOW_S:
                self._marks.popleft()
            began, before = self._marks[0]
        return before, max(now - began, 1e-9)

    def _eta(self, done: int, rate: float) -> str:
        """What is left at the rate of the last minutes; at the end, what it took."""
        if done >= self.total:
            return f"took {_clock(self.elapsed_s)}"
        return f"ETA {_clock((self.total - done) / rate)}" if rate else "ETA unknown"

    def _show(self) -> None:
        if self._live is not None:
            room = self._live.console.width - BAR_WIDTH - len(self.label) - 6
            self._live.update(self._bar, completed=self.done, text=self.text(room))
        elif self._is_shown and time.monotonic() - self._last_line >= self._log_interval_s:
            self._write_line()

    @property
    def _log_interval_s(self) -> float:
        """A day's run leaves some hundred lines, not ten thousand."""
        return min(max(LOG_INTERVAL_S, self.elapsed_s / 60), MAX_LOG_INTERVAL_S)

    def _write_line(self) -> None:
        self._last_line, self._written = time.monotonic(), self.counts
        head = f"{self.label}: "
        print(head + self.text(LOG_WIDTH - len(head)), file=self._stream, flush=True)


def _added(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def is_live(stream: TextIO) -> bool:
    """Can a line be drawn over? Not in a log, and not on a terminal that says it is dumb."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _shares(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """Stages' shares of the workers' time: the largest first, nothing below a percent."""
    total = sum(seconds.values()) or 1.0
    shares = [(name, spent_s / total) for name, spent_s in sorted(seconds.items(), key=lambda item: -item[1])]
    return [(name, share) for name, share in shares if share >= 0.01]


def _fitting(parts: list[str], shares: list[str], width: int) -> str:
    """The parts that fit, then the shares that fit, each list up to the first that does not."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            return line
        line += f", {part}"
    for number, share in enumerate(shares):
        told = f"{', ' if number else '; '}{share}"
        if len(line) + len(told) > width:
            break
        line += told
    return line


def _live_line(stream: TextIO):
    from rich.console import Console  # 0.05 s that --help does not need
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=BAR_WIDTH),
        TextColumn("{task.fields[text]}"),
    )
    return Progress(*columns, console=Console(file=stream))


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

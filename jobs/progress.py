"""Progress of a long run on stderr: one live line on a terminal, one log line now and then elsewhere.

Comes in: how much is done and what was measured on the way. The room knows units by name only, so that extraction and
whatever comes after it share one line. stdout is never touched: it belongs to results.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO

LOG_INTERVAL_S = 10.0  # between lines where stderr is not a terminal
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
        self._written: Counts | None = None  # what the last line in a log told
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

    def text(self, width: int = 0) -> str:
        """`84/120 clips, 1 failed, 3.1 clips/s, 99 frames/s, ETA 0:00:12`, and the largest shares that have room."""
        counts, seconds = self.counts, max(self.elapsed_s, 1e-9)
        rates = [f"{_short(counts.done / seconds)} {self.unit}/s"]
        rates += [f"{_short(amount / seconds)} {name}/s" for name, amount in counts.amounts.items()]
        notes = [f"{count} {name}" for name, count in counts.notes.items() if count]
        told = [f"{counts.done}/{self.total} {self.unit}", f"{counts.failed} failed", *notes, *rates]
        line = ", ".join(filter(None, [self._waiting, *told, self._clock(counts.done, seconds)]))
        return line + _shares(counts.seconds, width - len(line))

    def _clock(self, done: int, seconds: float) -> str:
        """What is left at the mean rate so far; at the end, what it took."""
        if not done:
            return "ETA unknown"
        left_s = (self.total - done) * seconds / done
        return f"ETA {_clock(left_s)}" if left_s > 0 else f"took {_clock(seconds)}"

    def _show(self) -> None:
        if self._live is not None:
            room = self._live.console.width - BAR_WIDTH - len(self.label) - 6
            self._live.update(self._bar, completed=self.done, text=self.text(room))
        elif self._is_shown and time.monotonic() - self._last_line >= LOG_INTERVAL_S:
            self._write_line()

    def _write_line(self) -> None:
        self._last_line, self._written = time.monotonic(), self.counts
        head = f"{self.label}: "
        print(head + self.text(LOG_WIDTH - len(head)), file=self._stream, flush=True)


def _added(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def _shares(seconds: Mapping[str, float], room: int) -> str:
    """`; dinov2 61%, write 3%`: the largest first, as many as have room, nothing below a percent."""
    total, told = sum(seconds.values()), ""
    for name, spent_s in sorted(seconds.items(), key=lambda item: -item[1]):
        share = f"{', ' if told else '; '}{name} {spent_s / total:.0%}" if spent_s else ""
        if not share or spent_s / total < 0.01 or len(told) + len(share) > room:
            break
        told += share
    return told


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

"""What all command lines share, so that they look and answer alike: settings, mistakes, interrupts, results.

Nothing heavy is imported, not even click: `--help` reads this room, and a store that is read in a script needs none.

Tables on stdout, in the one look of all commands: plain columns, numbers to the right, a bold line of headings.

Cells are a stranger's words: they are printed as they are, control characters as their codes. No word is ever cut: on a
terminal, columns of text give way at their spaces, and where that is not enough the line is longer than the terminal;
elsewhere a row is a line.

How far a long call is: what it tells, and to whom it makes no difference.

Whoever calls may show it; `SILENT` is the default everywhere.

Progress of a long run on stderr: one live line on a terminal, one log line now and then elsewhere.

Comes in: how much is done and what was measured on the way. The room knows units by name only, so that extraction and
whatever comes after it share one line. stdout is never touched: it belongs to results.

A long loop as a person sees it on stderr: one live bar on a terminal, one line now and then in a log.

Comes in: a total, what is done, and a few words on how it goes. stdout is never touched: it belongs to results.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

from mervcache.errors import MervCacheError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

CONTEXT = {"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 110}  # of click


def handle_errors(*errors: type[Exception], interrupted: str) -> Decorator:
    """Decorator: the message of these errors without a traceback and exit code 1; `interrupted` and 130 after Ctrl-C.

    Everything else is a bug and keeps its traceback. It goes on top, right below the command's own decorator, for what
    is below may fail too.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                return command(*args, **kwargs)
            except errors as error:
                say(f"Error: {error}")
                sys.exit(1)
            except KeyboardInterrupt:
                say(f"\n{interrupted}")
                sys.exit(130)

        return wrapped

    return decorate


def stacked(*decorators: Decorator) -> Decorator:
    """One decorator of several, the first on top: options that commands share."""

    def decorate(command: Command) -> Command:
        for each in reversed(decorators):
            command = each(command)
        return command

    return decorate


def say(line: str) -> None:
    """A line on stderr: stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def print_result(result: Any, as_json: bool, show: Callable[[], None], *, indent: int | None = None) -> None:
    """JSON on stdout for a program, else what `show` prints for a person."""
    if as_json:
        print(json.dumps(result, indent=indent, default=str), flush=True)
    else:
        show()


def report_saved(keep: Callable[[], str]) -> None:
    """Keep a measurement in the journal where the store can be written; it is worth printing all the same."""
    try:
        say(f"kept as {keep()}")
    except MervCacheError as error:
        say(f"not kept in the store: {error}")


PIPED_WIDTH = 160  # characters of a sentence: rich would fold it at 80 where stdout is not a terminal

Grid = Sequence[Sequence[str]]


def console() -> Console:
    """Words as they are: paths and reasons are untrusted, so nothing in brackets is markup."""
    from rich.console import Console  # --help does not need it

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def strong(words: str) -> Text:
    from rich.text import Text

    return Text(words, style="bold")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """Print rows below their headings; columns named in `right` hold numbers.

    Without headings the first column names the rows, and is bold instead.
    """
    from rich.text import Text

    out, head = console(), [columns] if any(columns) else []
    grid = [[_printable(cell) for cell in row] for row in (*head, *rows)]
    at_right = [column in right for column in columns]
    widths, gap = fitted(grid, at_right, out.width if sys.stdout.isatty() else None)
    for number, row in enumerate(grid):
        for line in row_lines(row, at_right, widths, gap):
            text = Text(line)
            text.stylize("bold", 0, widths[0] if not head else 0 if number else None)
            out.print(text, soft_wrap=True)


def fitted(grid: Grid, at_right: Sequence[bool], room: int | None) -> tuple[list[int], str]:
    """Widths of the columns and what is between them: at most `room` characters in all, where words allow it."""
    widths = [max(_width(cell) for cell in column) for column in zip(*grid, strict=True)]
    gaps = len(widths) - 1
    if room is None or sum(widths) + 2 * gaps <= room:
        return widths, "  "
    least = [
        max(_narrowest(cell, is_number=is_number and line > 0) for line, cell in enumerate(column))
        for column, is_number in zip(zip(*grid, strict=True), at_right, strict=True)
    ]
    while sum(widths) + gaps > room:
        wide = [column for column in range(len(widths)) if widths[column] > least[column]]
        if not wide:
            break
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths, " "


def _narrowest(cell: str, *, is_number: bool) -> int:
    """The longest word; a number stays with its unit."""
    return _width(cell if is_number else "\n".join(cell.split()))


def _width(cell: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, cell.split("\n")))


def row_lines(row: Sequence[str], at_right: Sequence[bool], widths: Sequence[int], gap: str) -> list[str]:
    """A row as lines on the screen, as many as its tallest cell has."""
    from rich.cells import cell_len

    cells = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
    lines = []
    for parts in zip_longest(*cells, fillvalue=""):
        pads = [" " * (width - cell_len(part)) for part, width in zip(parts, widths, strict=True)]
        padded = [pad + part if right else part + pad for part, pad, right in zip(parts, pads, at_right, strict=True)]
        lines.append(gap.join(padded).rstrip())
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many characters, broken at spaces only."""
    from rich.cells import cell_len

    lines: list[str] = []
    for line in text.split("\n"):
        if cell_len(line) <= width:
            lines.append(line)
            continue
        words = line.split() or [""]
        lines.append(words[0])
        for word in words[1:]:
            longer = f"{lines[-1]} {word}"
            if cell_len(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
    return lines


def _printable(cell: Any) -> str:
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(cell))


class ProgressCallback(Protocol):
    """Is told how far a call is; `advance` may come from any thread."""

    def start(self, total: int) -> None:
        """So many items are ahead; a second start is that of a next pass, counted from nothing."""

    def advance(self, items: int = 1, **amounts: float) -> None:
        """So many more are done; `amounts` are what rates are made of besides, such as MB, by name."""


class _Silent:
    def start(self, total: int) -> None:
        """Nobody asked."""

    def advance(self, items: int = 1, **amounts: float) -> None:
        """Nobody asked."""


SILENT: ProgressCallback = _Silent()

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


LOG_INTERVAL_S = 10.0  # between lines where stderr is not a terminal; of long loops a 60th of their time
MAX_LOG_INTERVAL_S = 300.0

Item = TypeVar("Item")


class Bar:
    """`with Bar("train", total=600, start=120) as bar: bar.advance(); bar.tell("loss 1.25")`."""

    def __init__(
        self, label: str, *, total: int, start: int = 0, quiet: bool = False, stream: TextIO | None = None
    ) -> None:
        from rich.console import Console  # --help does not need it
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.label, self.total, self.facts = label, total, ""
        self._start = self._done = self._written = start
        self._began = self._last_line = time.monotonic()
        self._stream = stream or sys.stderr
        is_terminal = self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        is_live = is_terminal and not quiet
        self._logs = not is_live and not quiet
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
        eta = f"ETA {_timedelta_text(now_s * left / done)}" if left > 0 and done else ""
        told = [f"{self._done}/{self.total}", self.facts, _timedelta_text(now_s), eta]
        return f"{self.label}: {', '.join(filter(None, told))}"

    def _write_line(self) -> None:
        self._last_line, self._written = time.monotonic(), self._done
        print(self.text(), file=self._stream, flush=True)


def _timedelta_text(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

"""Console output that the command lines share: results and tables on stdout, messages and progress on stderr.

rich and click are imported where they are used, because `--help` has to answer at once. Text in tables is untrusted: it
is printed without markup and with control characters escaped.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar, cast

from mervcache.errors import MervCacheError, missing_extra
from mervcache.logs import echo, emit, is_json, is_shown, log_to_stderr
from mervcache.text import redact_all, safe

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]
Item = TypeVar("Item")

CONTEXT = {"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 110}  # click settings
PIPED_WIDTH = 160  # characters of a sentence where stdout is not a terminal; rich would fold it at 80
LOG_INTERVAL_S = 10.0  # between log lines; in long runs a 60th of the elapsed time, up to the maximum
MAX_LOG_INTERVAL_S = 300.0
PULSE_S = 1.0  # between looks whether a log line is due
RATE_WINDOW_S = 300.0  # rates and ETA cover the last five minutes, because workers join and leave
RATE_STEP_S = 5.0  # between two samples of the window
LOG_WIDTH = 120  # characters of a log line
BAR_WIDTH = 24


def handle_errors(*, interrupted: str) -> Decorator:
    """Decorator of a command: a `MervCacheError` becomes its message and exit code 1, Ctrl-C `interrupted` and 130.

    So does a module of an extra that is not installed. Any other error is a bug and keeps its traceback. Apply it
    directly under `@click.command` so that it also covers the decorators below.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            log_to_stderr()
            try:
                return command(*args, **kwargs)
            except MervCacheError as error:
                _exit_with_error(error, str(error))
            except ModuleNotFoundError as error:
                if (message := missing_extra(error)) is None:
                    raise
                _exit_with_error(error, message)
            except KeyboardInterrupt:
                echo(f"\n{interrupted}", event="interrupted", level=logging.WARNING, exit_code=130)
                sys.exit(130)

        return wrapped

    return decorate


def _exit_with_error(error: Exception, message: str) -> NoReturn:
    fields = {"message": message, "type": type(error).__name__, "exit_code": 1}
    echo(f"Error: {message}", event="error", level=logging.ERROR, **fields)
    sys.exit(1)


@contextmanager
def handle_interrupts(message: str) -> Generator[None, None, None]:
    """Raise `KeyboardInterrupt` on SIGINT, SIGTERM and SIGHUP, after printing `message`; a second signal is final.

    SIGHUP stays ignored where it is, as with nohup.
    """

    def interrupt(number: int, frame: Any) -> None:
        signal.signal(number, signal.default_int_handler)
        echo(f"\n{message}", event="interrupted", level=logging.WARNING, signal=signal.Signals(number).name)
        raise KeyboardInterrupt

    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = (signal.SIGINT, signal.SIGTERM, *(() if is_ignored else (signal.SIGHUP,)))
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.default_int_handler)


def examples(*lines: str) -> str:
    """The end of a command's help: lines that can be typed."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def stacked(*decorators: Decorator) -> Decorator:
    """One decorator made of several, the first outermost: options that commands share."""
    return lambda command: functools.reduce(lambda inner, outer: outer(inner), reversed(decorators), command)


def print_result(result: Any, as_json: bool, show: Callable[[], object], *, indent: int | None = None) -> None:
    """Print `result` as JSON on stdout, or call `show`, which prints it as text."""
    if as_json:
        print(json.dumps(redact_all(json.loads(json.dumps(result, default=str))), indent=indent), flush=True)
    else:
        show()


def report_saved(save: Callable[[], str]) -> None:
    """Save a measurement in a store's journal and print its name; a store that cannot be written is not an error."""
    try:
        echo(f"saved as {save()}")
    except MervCacheError as error:
        echo(f"not saved in the store: {error}")


def console(width: int | None = None) -> Console:
    """A rich console on stdout without markup or control characters: paths and reasons are untrusted."""
    from rich.console import Console

    class SafeConsole(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            super().print(*(safe(each) if isinstance(each, str) else each for each in objects), **options)

    default = None if sys.stdout.isatty() else PIPED_WIDTH
    return SafeConsole(highlight=False, markup=False, width=width or default)


def format_bytes(num_bytes: float) -> str:
    """Decimal units, as disks are sold: `7.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def format_duration(seconds: float) -> str:
    """`12.0 s`, `3.4 min`, `2.1 h`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def bold(text: str) -> Text:
    from rich.text import Text

    return Text(safe(text), style="bold")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """Print rows under bold headings on stdout; columns named in `right` hold numbers, a list in a cell is its lines.

    Without headings the first column names the rows and is bold. A word is never cut: on a terminal, columns of text
    wrap at spaces, and lines get longer than the terminal where that is not enough. Elsewhere a row is one line.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    def shown(cell: Any) -> str:  # a line break in an untrusted name must not look like a row of its own
        if isinstance(cell, list):
            return "\n".join(map(shown, cast("list[Any]", cell)))
        return safe(str(cell)).replace("\n", "\\n").replace("\t", "\\t")

    names, cells = [shown(name) for name in columns], [[shown(cell) for cell in row] for row in rows]
    headings, are_numbers = [names] if any(names) else [], [name in right for name in columns]
    widths: list[int] = []  # as long as its longest line
    least: list[int] = []  # as long as its longest word; a number stays with its unit
    for column, name in enumerate(names):
        lines = [line for row in [*headings, *cells] for line in row[column].split("\n")]
        words = [word for row in cells for word in row[column].split("\n" if are_numbers[column] else None)]
        widths.append(max(map(cell_len, lines), default=0))
        least.append(max(map(cell_len, [*words, *name.split()]), default=0))
    gaps, available = 2 * (len(columns) - 1), console().width if sys.stdout.isatty() else math.inf
    while sum(widths) + gaps > available:
        wide = [column for column, width in enumerate(widths) if width > least[column]]
        if not wide:
            break
        widths[max(wide, key=widths.__getitem__)] -= 1
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(headings), header_style="bold")
    for column, name in enumerate(names):
        grid.add_column(
            Text(name),
            justify="right" if are_numbers[column] else "left",
            width=max(widths[column], 1),
            style="" if headings or column else "bold",
        )
    for row in cells:
        grid.add_row(*map(Text, row))
    out = console(width=sum(widths) + gaps + len(widths))
    with out.capture() as capture:
        out.print(grid, crop=False)
    print("\n".join(line.rstrip() for line in capture.get().removesuffix("\n").split("\n")), flush=True)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Work that a part of a run, or the whole run, has done."""

    done: int = 0
    failed: int = 0
    amounts: Mapping[str, float] = field(
        default_factory=dict[str, float]
    )  # name -> amount, shown as a rate: frames, MB
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])  # stage -> workers' time, shown as a share
    notes: Mapping[str, int] = field(default_factory=dict[str, int])  # shown where it is not 0: batches halved

    def __add__(self, other: Counts) -> Counts:
        def added(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
            return {name: one.get(name, 0) + two.get(name, 0) for name in {**one, **two}}

        return Counts(
            done=self.done + other.done,
            failed=self.failed + other.failed,
            amounts=added(self.amounts, other.amounts),
            seconds=added(self.seconds, other.seconds),
            notes=added(self.notes, other.notes),
        )


class ProgressLine:
    """Progress of a long call on stderr: one live line on a terminal, a log line now and then elsewhere.

    `with ProgressLine("extract", total=120, unit="clips") as progress: progress.advance(8, failed=1, frames=256)`

    A call that finds out itself how much there is to do gets a line without a total and calls `start(total)`, once per
    pass. Parts that report while they run: `report(part, attempt, counts)` replaces what that part had reported, and
    `finish(part, counts)` is its final value, so that a part counts once however often it was tried. Nothing is shown
    without work to do. Safe among threads.
    """

    def __init__(
        self,
        label: str = "",
        *,
        unit: str = "items",
        total: int = 0,
        first: int = 0,  # done before this process, such as the steps of a resumed run; not part of any rate
        startup_s: float = 0,  # passed before, shown beside the time that all took; not part of any rate
        scale: float = 1,  # items of one displayed unit: 1e6 shows bytes as MB
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.label, self.unit, self.quiet = label, unit, quiet
        self._scale, self._startup_s, self._stream = scale, startup_s, stream or sys.stderr
        self._lock = threading.Lock()
        self._live: Any = None
        self._closed = threading.Event()
        self._reset(total, first)

    def _reset(self, total: int, first: int = 0) -> None:
        self.total, self._first = total, first
        self._final = Counts()
        self._running: dict[str, tuple[str, Counts]] = {}  # part -> its newest attempt and what that has done
        self._over: set[str] = set()  # finished parts, and attempts that were replaced
        self._waiting = self._postfix = ""
        self._fields: dict[str, Any] = {}
        self._logged = (self._final, self._waiting)  # in the newest log line
        self._is_closed = False
        self._started = self._last_line = time.monotonic()
        self._window = deque([(self._started, Counts())])  # rates begin at the first sample

    def __enter__(self) -> ProgressLine:
        self._open()
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def start(self, total: int) -> None:
        """Begin a pass over `total` items on a line of its own."""
        self._close()
        self._reset(total)
        self._open()

    def advance(self, done: int = 1, *, failed: int = 0, **amounts: float) -> None:
        """Count `done` more items, `failed` of them, and the amounts that rates are shown of."""
        with self._lock:
            self._final += Counts(done=done, failed=failed, amounts=amounts)
        self._show()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each counted after the caller is done with it."""
        for item in items:
            yield item
            self.advance()

    def report(self, part: str, attempt: str, counts: Counts) -> None:
        """Replace what a running part has done; late reports and those of replaced attempts are ignored."""
        with self._lock:
            if part in self._over or attempt in self._over:
                return
            before, _ = self._running.get(part, (attempt, None))
            if before != attempt:
                self._over.add(before)
            self._running[part] = (attempt, counts)
        self._show()

    def finish(self, part: str, counts: Counts) -> None:
        """End a part: its final counts replace what it reported."""
        with self._lock:
            self._running.pop(part, None)
            self._over.add(part)
            self._final += counts
        self._show()

    def wait(self, reason: str) -> None:
        """Show why nothing moves at the head of the line; "" when it moves again."""
        self._waiting = reason
        self._show()

    def set_postfix(self, postfix: str, **fields: Any) -> None:
        """Text after the ETA, in place of the rates: loss, learning rate; `fields` are the figures in it, by name."""
        self._postfix, self._fields = postfix, fields
        if self._live is not None:
            self._show()

    @property
    def counts(self) -> Counts:
        """The sum over finished and running parts."""
        with self._lock:
            return sum((counts for _, counts in self._running.values()), start=self._final)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def figures(self) -> dict[str, Any]:
        """What the line shows, as JSON values: rates are per second over the last five minutes, times in seconds."""
        counts, now = self.counts, time.monotonic()
        with self._lock:
            if now - self._window[-1][0] >= RATE_STEP_S:
                self._window.append((now, counts))
            while len(self._window) > 1 and now - self._window[1][0] >= RATE_WINDOW_S:
                self._window.popleft()
            began, before = self._window[0]
        seconds, done = max(now - began, 1e-9), self._first + counts.done
        rate = max(0, counts.done - before.done) / seconds  # a part that began anew does not count down
        total_s = sum(counts.seconds.values()) or 1.0
        return {
            "label": self.label,
            "done": math.ceil(done / self._scale),
            "total": math.ceil(self.total / self._scale),
            "unit": self.unit,
            "failed": counts.failed,
            "rate": rate / self._scale,
            "rates": {name: max(0, n - before.amounts.get(name, 0)) / seconds for name, n in counts.amounts.items()},
            "eta_s": (self.total - done) / rate if rate else None,
            "elapsed_s": self.elapsed_s,
            "startup_s": self._startup_s,
            "is_done": done >= self.total,
            "shares": {name: spent_s / total_s for name, spent_s in counts.seconds.items()},
            "notes": {name: number for name, number in counts.notes.items() if number},
            "waiting": self._waiting or None,
            **self._fields,
        }

    def text(self, width: int = LOG_WIDTH) -> str:
        """`84/120 clips, 1 failed, ETA 0:00:12, 3.1 clips/s, 99 frames/s; dinov2 61%`: the parts that fit."""
        now = self.figures()
        eta = f"ETA unknown after {_clock(now['elapsed_s'])}" if now["eta_s"] is None else f"ETA {_clock(now['eta_s'])}"
        startup = f" after a start of {_clock(now['startup_s'])}" if now["startup_s"] else ""
        parts = [
            *filter(None, [self._waiting]),
            f"{now['done']}/{now['total']} {self.unit}",
            *(f"{number} {name}" for name, number in {"failed": now["failed"], **now["notes"]}.items() if number),
            f"took {_clock(now['elapsed_s'])}{startup}" if now["is_done"] else eta,
        ]
        if self._postfix:
            return ", ".join([*parts, self._postfix])
        parts += [f"{_short(rate)} {name}/s" for name, rate in {self.unit: now["rate"], **now["rates"]}.items()]
        spent = sorted(now["shares"].items(), key=lambda item: -item[1])
        shares = [f"{name} {share:.0%}" for name, share in spent if share >= 0.01]
        line, separators = parts[0], [*[", "] * (len(parts) - 1), "; ", *[", "] * len(shares)]
        for separator, part in zip(separators, parts[1:] + shares, strict=False):
            if len(line + separator + part) > width:
                break
            line += separator + part
        return line

    @property
    def _is_shown(self) -> bool:
        return not self.quiet and self.total > self._first and is_shown(logging.INFO)

    def _open(self) -> None:
        if not self._is_shown:
            return
        if is_json() or not self._stream.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
            self._closed = threading.Event()
            threading.Thread(target=self._show_regularly, args=(self._closed,), daemon=True).start()
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=BAR_WIDTH), TextColumn("{task.fields[text]}"))
        self._live = Progress(SpinnerColumn(), *columns, console=Console(file=self._stream))
        self._bar = self._live.add_task(self.label, total=self.total, completed=self._first, text="")
        self._live.start()

    def _close(self) -> None:
        self._is_closed, live, self._live = True, self._live, None
        self._closed.set()
        if live is not None:
            live.stop()
        elif self._is_shown and self._logged != (self.counts, self._waiting):
            self._write_line()

    def _show_regularly(self, closed: threading.Event) -> None:
        """Log lines are due also while one item takes minutes."""
        while not closed.wait(PULSE_S):
            self._show()

    def _show(self) -> None:
        live = self._live  # another thread may close the line meanwhile
        if live is not None:
            width = live.console.width - BAR_WIDTH - len(self.label) - 6
            text = self.text(width)
            if len(text) > width:  # whole figures of the postfix, which two spaces separate
                text = text[: width + 1].rpartition("  ")[0] or text
            live.update(self._bar, completed=self._first + self.counts.done, text=text[:width])
        if live is not None or self._is_closed:
            return
        interval_s = min(max(LOG_INTERVAL_S, self.elapsed_s / 60), MAX_LOG_INTERVAL_S)  # a day leaves some 400 lines
        if self._is_shown and time.monotonic() - self._last_line >= interval_s:
            self._write_line()

    def _write_line(self) -> None:
        self._last_line, self._logged = time.monotonic(), (self.counts, self._waiting)
        if is_json():
            emit("progress", **self.figures(), message=self.text())
            return
        head = f"{self.label}: "
        print(safe(head + self.text(LOG_WIDTH - len(head))), file=self._stream, flush=True)


@contextmanager
def log_while_running(label: str, *, quiet: bool = False) -> Generator[None]:
    """Log `label: 0:00:08` now and then while the block runs, so that a call of minutes without steps is not silent."""
    done, began = threading.Event(), time.monotonic()

    def log_regularly() -> None:
        while not done.wait(LOG_INTERVAL_S - PULSE_S):
            elapsed_s = time.monotonic() - began
            echo(f"{label}: {_clock(elapsed_s)}", event="progress", label=label, elapsed_s=elapsed_s)

    if not quiet:
        threading.Thread(target=log_regularly, daemon=True).start()
    try:
        yield
    finally:
        done.set()


SILENT = ProgressLine(quiet=True)  # the default of library calls; its counts are not read


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

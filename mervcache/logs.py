"""Messages on stderr: plain lines, or with `--log-json` one JSON object per line.

With `--log-json` file descriptor 2 becomes a pipe, so that lines of libraries, decoders and child processes are wrapped
too: every line on stderr parses, whatever wrote it.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import logging
import math
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, cast

from mervcache.text import redact, safe

PACKAGES = ("mervcache", "featurestore", "jobs", "pipeline", "trainer")
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
JSON_OPTION, LEVEL_OPTION = "--log-json", "--log-level"
PIPE_BYTES = 1 << 20  # room for what C code prints while it holds the interpreter's lock
MAX_LINE = 1 << 16  # bytes of a line of another program; a longer one is split
DRAIN_S = 1.0  # at the end; child processes that live on keep the pipe open
_FIRST_KEY = '{"time": "'  # how our own lines begin: those of child processes pass unchanged


class _Output:
    """Where lines go; one per process."""

    level = logging.INFO
    descriptor: int | None = None  # stderr as it was, while JSON is on
    relay: threading.Thread | None = None
    lock = threading.RLock()  # a signal handler may write while its thread does


def is_json() -> bool:
    """Whether messages are JSON lines."""
    return _Output.descriptor is not None


def is_shown(level: int) -> bool:
    """Whether messages of this level are written."""
    return level >= _Output.level


def set_level(name: str) -> None:
    """Write nothing below this level, a name of `LEVELS`; libraries are heard from `warning` on."""
    _Output.level = LEVELS[name]
    log_to_stderr()


def echo(line: str, *, event: str = "message", level: int = logging.INFO, **fields: Any) -> None:
    """Print a line on stderr, without credentials and control characters; stdout is for results.

    With `--log-json` it is the `message` of an object, next to `event` and `fields`.
    """
    if is_json():
        emit(event, level=level, **{"message": line.strip(), **fields})
    elif is_shown(level):
        try:
            print(safe(line), file=sys.stderr, flush=True)
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that hung up: the run ends in order nevertheless
                raise


def emit(event: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Write a JSON line with `time` (UTC), `level`, `event` and the fields that are not None; nothing without JSON.

    Numbers that JSON lacks (infinite, NaN) become null; text loses the credentials of addresses.
    """
    if (descriptor := _Output.descriptor) is None or not is_shown(level):
        return
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    given = {name: _plain(value) for name, value in fields.items() if value is not None}
    record = {"time": now, "level": logging.getLevelName(level).lower(), "event": event, **given}
    _write(descriptor, (json.dumps(record) + "\n").encode())


def _plain(value: Any) -> Any:
    """JSON values only; what is no number, list or mapping becomes text."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {redact(str(key)): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return redact(str(value))


def _write(descriptor: int, line: bytes) -> None:
    """Write a line; a log that cannot be written, such as a pipe whose reader is gone, ends no run."""
    with _Output.lock, suppress(OSError):
        while line:
            line = line[os.write(descriptor, line) :]


def log_to_stderr() -> None:
    """Print the messages of our packages on stderr, from INFO or `--log-level` on; tracebacks of bugs are redacted."""
    sys.excepthook = _print_traceback
    logging.lastResort = _EchoHandler(max(logging.WARNING, _Output.level))  # warnings of libraries
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(_Output.level)
        if not any(isinstance(handler, _EchoHandler) for handler in logger.handlers):
            logger.addHandler(_EchoHandler())


class _EchoHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else None
        if not is_json():
            echo(self.format(record), level=record.levelno)  # looks up sys.stderr each time: a live line replaces it
        else:
            echo(record.getMessage(), event="log", level=record.levelno, logger=record.name, traceback=trace)


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace)).rstrip()
    if is_json():
        emit("crash", level=logging.ERROR, message=str(error), type=kind.__name__, traceback=text, exit_code=1)
    else:
        echo(text, level=logging.ERROR)


def _print_thread_traceback(arguments: threading.ExceptHookArgs) -> None:
    error = arguments.exc_value
    if error is not None and not isinstance(error, SystemExit):
        text = "".join(traceback.format_exception(arguments.exc_type, error, arguments.exc_traceback))
        fields = {"type": arguments.exc_type.__name__, "thread": arguments.thread and arguments.thread.name}
        emit("crash", level=logging.ERROR, message=str(error), traceback=text, **fields)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    where = {"file": filename, "line": lineno}
    emit("warning", level=logging.WARNING, message=str(message), category=category.__name__, **where)


def start_json_if_given(arguments: Sequence[str]) -> None:
    """Write JSON lines from now on, until the process ends, if `--log-json` is among a command's arguments."""
    if JSON_OPTION not in arguments or is_json():
        return
    sys.stderr.flush()
    _Output.descriptor = os.dup(2)
    reading, writing = os.pipe()
    with suppress(AttributeError, OSError):  # Linux
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.dup2(writing, 2)  # inherited by child processes
    os.close(writing)
    _Output.relay = threading.Thread(target=_relay, args=(reading, _Output.descriptor), daemon=True)
    _Output.relay.start()
    atexit.register(restore_stderr)
    warnings.showwarning, threading.excepthook = _show_warning, _print_thread_traceback
    log_to_stderr()


def restore_stderr() -> None:
    """End what `start_json_if_given` began, after the lines that are under way; for the end, or before an exec."""
    if (descriptor := _Output.descriptor) is None or _Output.relay is None:
        return
    with suppress(ValueError, OSError):
        sys.stderr.flush()
    os.dup2(descriptor, 2)
    _Output.relay.join(DRAIN_S)
    _Output.descriptor = _Output.relay = None


def _relay(reading: int, descriptor: int) -> None:
    """Pass on the JSON lines of child processes and wrap every other line."""
    with open(reading, "rb") as lines:
        for line in iter(lambda: lines.readline(MAX_LINE), b""):
            text = line.decode(errors="replace").rstrip("\n")
            if _is_our_line(text):
                _write(descriptor, line)
                continue
            for part in text.split("\r"):  # a bar that is drawn over itself
                if part.strip():
                    emit("stderr", level=logging.WARNING, message=safe(part.rstrip()))


def _is_our_line(text: str) -> bool:
    if not text.startswith(_FIRST_KEY):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:  # two processes wrote at once
        return False

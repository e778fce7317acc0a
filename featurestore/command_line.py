"""What all command lines share, so that they look and answer alike: settings, mistakes, interrupts, results.

Nothing heavy is imported, not even click: `--help` reads this room, and a store that is read in a script needs none.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

from featurestore.errors import MervCacheError

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

CONTEXT = {"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 110}  # of click


def says(*errors: type[Exception], interrupted: str) -> Decorator:
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


def show_result(result: Any, as_json: bool, show: Callable[[], None], *, indent: int | None = None) -> None:
    """JSON on stdout for a program, else what `show` prints for a person."""
    if as_json:
        print(json.dumps(result, indent=indent, default=str), flush=True)
    else:
        show()


def tell_kept(keep: Callable[[], str]) -> None:
    """Keep a measurement in the journal where the store can be written; it is worth printing all the same."""
    try:
        say(f"kept as {keep()}")
    except MervCacheError as error:
        say(f"not kept in the store: {error}")

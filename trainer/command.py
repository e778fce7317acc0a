"""What the command lines of this room share: their settings, their errors, and the door to the heavy rooms.

torch is imported behind `heavy_rooms`, inside a command, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import click

from featurestore.errors import MervCacheError

CONTEXT = {"show_default": True, "help_option_names": ["-h", "--help"], "max_content_width": 110}


def no_file(path: object) -> str:
    """The message for a media file that is not there, with the path as it was typed."""
    return f"there is no file {path}; give a video or an image that exists"


def says_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print the message of our own errors and leave with code 1; everything else is a bug and keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except MervCacheError as error:
            raise click.ClickException(str(error)) from error

    return wrapped


def heavy_rooms() -> ModuleType:
    """`trainer.run` with torch and transformers.

    OpenMP threads that spin while they wait take each other's cores away: on two cores beside other work, training the
    demo fell from 185 to 20 samples/s, and to 115 where they sleep. Read once, when torch is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from trainer import run

    keep_bars_to_terminals()
    return run


def keep_bars_to_terminals() -> None:
    """Let transformers draw its bars only where a person looks: in a log every update is a line."""
    if not sys.stderr.isatty():
        from transformers.utils import logging  # transformers takes seconds

        logging.disable_progress_bar()

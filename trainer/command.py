"""What the command lines of this room share beside `mervcache.console`: the door to the heavy rooms.

torch is imported behind `heavy_rooms`, inside a command, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

from mervcache.console import says
from mervcache.errors import MervCacheError

says_errors = says(
    MervCacheError, interrupted="Interrupted. What was written is kept; merv-train goes on with --resume auto."
)


def no_file(path: object) -> str:
    """The message for a media file that is not there, with the path as it was typed."""
    return f"there is no file {path}; give a video or an image that exists"


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

"""Modes: who may read the files of weights that a run or an export holds.

safetensors writes through a temporary file that only its owner may read, and leaves it so: a colleague could then read
a run's settings but not its weights.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def give_usual_modes(folder: Path) -> None:
    """Give every file of weights under `folder` the mode that any new file gets there: 0666 without the umask's bits.

    The umask is read off a new file, since reading it otherwise sets it for all threads.
    """
    probe = folder / f".mode-{os.getpid()}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)

"""This user's cache folder on this machine. What lies there can be made again: losing it costs nothing but time."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """XDG_CACHE_HOME, else ~/.cache; nobody promises that it is there or may be written to."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")

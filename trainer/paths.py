"""Paths in a run's folder: recorded relative to the folder where they were given as relative, so that both can move.

Recorded ones begin with `./` or `../`. Others are Hub ids, URLs, absolute paths, or of an earlier version, which kept a
relative path as it was given: it is relative to the working directory then.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATH_SETTINGS = ("llm", "init", "letters_template")  # of a training run, where they name a file or folder


def recorded_path(path: str, run: Path) -> str:
    """`path` as the folder `run` records it: relative to the folder, unless it is absolute or is not there."""
    if os.path.isabs(path) or not os.path.exists(path):
        return path
    relative = os.path.relpath(path, run)
    return relative if relative.startswith("..") else f"./{relative}"


def found_path(recorded: str, run: Path) -> str:
    """The path that the folder `run` recorded, from the working directory where it is below that, else absolute."""
    if not recorded.startswith(("./", "../")):
        return recorded
    path = os.path.normpath(os.path.join(os.path.abspath(run), recorded))
    if not os.path.exists(path) and os.path.exists(recorded):  # of an earlier version
        return recorded
    below = os.path.relpath(path)
    return path if below.startswith("..") else below


def recorded_settings(
    settings: Mapping[str, Any], run: Path, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Settings as the folder records them; paths of `before`, which it has recorded, stay where they mean the same."""
    paths = {}
    for name in PATH_SETTINGS:
        value, old = settings.get(name), (before or {}).get(name)
        if value is not None:
            is_old = old is not None and is_same_path(found_path(old, run), value)
            paths[name] = old if is_old else recorded_path(value, run)
    return {**settings, **paths}


def found_settings(settings: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Recorded settings with the paths among them as `found_path`."""
    paths = {name: found_path(value, run) for name in PATH_SETTINGS if isinstance(value := settings.get(name), str)}
    return {**settings, **paths}


def is_same_path(one: str | None, other: str | None) -> bool:
    """Whether two settings are equal, or name one file or folder."""
    if one is None or other is None or one == other:
        return one == other
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)

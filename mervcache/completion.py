"""Shell completion of names: datasets, encoders and stores.

The functions are `shell_complete` callbacks of click options and arguments. What they list is imported by name when a
shell completes, since this package imports none of the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from click import Command, Context, Parameter
    from click.shell_completion import CompletionItem

SHELLS = ("bash", "zsh", "fish")
FEATURES = Path("features")  # where extraction puts stores


def complete_dataset(_context: Context, _parameter: Parameter, incomplete: str) -> list[str]:
    """Names of datasets."""
    return _starting(_table("pipeline.datasets:DATASETS"), incomplete)


def complete_encoders(_context: Context, _parameter: Parameter, incomplete: str) -> list[str]:
    """Names of encoders, in a list separated by commas: those that it does not have yet."""
    listed, comma, last = incomplete.rpartition(",")
    chosen = listed.split(",")
    others = [name for name in _table("pipeline.encoders:ENCODERS") if name not in chosen]
    return [f"{listed}{comma}{name}" for name in _starting(others, last)]


def complete_store(_context: Context, _parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """Stores under features/ and in the folder that was typed, then any folder."""
    from click.shell_completion import CompletionItem

    folder = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    stores = [str(path.parent) for place in (FEATURES, folder) for path in sorted(place.glob("*.zarr/zarr.json"))]
    found = _starting(dict.fromkeys(stores), incomplete)
    return [CompletionItem(path) for path in found] or [CompletionItem(incomplete, type="dir")]


def completion_script(command: Command, programs: Iterable[str], shell: str) -> str:
    """What a shell evaluates to complete these programs; `command` is any of theirs, click wants one."""
    from click.shell_completion import get_completion_class

    cls = get_completion_class(shell)
    assert cls is not None, f"shells are {SHELLS}"
    variables = {program: f"_{program.replace('-', '_').upper()}_COMPLETE" for program in programs}
    return "\n".join(cls(command, {}, program, variable).source() for program, variable in variables.items())


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _table(place: str) -> Iterable[str]:
    module, _, attribute = place.partition(":")
    table: Any = getattr(importlib.import_module(module), attribute)
    return table

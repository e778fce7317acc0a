"""From committed features to an answer: training, evaluation, and the use of what was trained.

    from trainer import Asker, load_run
    run = load_run("runs/demo")             # the model of a run's newest checkpoint, with what it was trained on
    with Asker(run) as asker:
        print(asker.answer("What colour is the shape?", video="clip.mp4"))

The two names are imported when they are used: torch takes seconds, and the command lines have to answer at once.
"""

from __future__ import annotations

from typing import Any

from mervcache.errors import import_with_extra

_PUBLIC = {"Asker": "trainer.ask", "load_run": "trainer.runs.load"}

__all__ = ["Asker", "load_run"]  # pyright: ignore[reportUnsupportedDunderAll]: they are loaded on first use


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_with_extra(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

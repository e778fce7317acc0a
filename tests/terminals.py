"""A clock that a test moves, and streams as a terminal has them: for whatever tells how far it is."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest


class SteppedClock:
    """Stands in for the module `time`: `monotonic` is what the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stepped_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], SteppedClock]:
    """`stepped_clock("mervcache.console")`: that module reads this clock until the test ends."""

    def set_for(module: str) -> SteppedClock:
        clock = SteppedClock()
        monkeypatch.setattr(f"{module}.time", clock)
        return clock

    return set_for


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A stream that can be drawn over."""
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()

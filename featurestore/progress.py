"""How far a long call is: what it tells, and to whom it makes no difference.

Whoever calls may show it; `SILENT` is the default everywhere.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told how far a call is; `advance` may come from any thread."""

    def start(self, total: int) -> None:
        """So many items are ahead; a second start is that of a next pass, counted from nothing."""

    def advance(self, items: int = 1, **amounts: float) -> None:
        """So many more are done; `amounts` are what rates are made of besides, such as MB, by name."""


class _Silent:
    def start(self, total: int) -> None:
        """Nobody asked."""

    def advance(self, items: int = 1, **amounts: float) -> None:
        """Nobody asked."""


SILENT: Progress = _Silent()

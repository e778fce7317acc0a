"""Nested grids: one run that is trained at several numbers of tokens per frame, and read at any of them.

With `projector.nested_grids` every step pools all tokens to one of these grids, each equally likely, as a pure function
of seed and step. Whatever is not a step of the training reads the finest, unless another one is named.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.data.order import derive_seed


def draw_grid(nested_grids: Sequence[int], seed: int, step: int) -> int | None:
    """Tokens per frame of a step; None for a run of one grid."""
    return nested_grids[derive_seed("grid", seed, step) % len(nested_grids)] if nested_grids else None

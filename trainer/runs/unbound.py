"""Which tokens an imported run that is bound to no store can read: any of its sizes, made as the checkpoint wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.tokens import TokenShape
from trainer.data.wanted_tokens import made_otherwise
from trainer.runs.run_record import UNBOUND, RunRecord


def is_unbound(shape: TokenShape) -> bool:
    """Whether no identity of tokens is recorded."""
    return shape.identity.startswith(UNBOUND)


def why_unreadable(record: RunRecord, encoder: str, found: TokenShape, facts: Mapping[str, Any]) -> str | None:
    """Why an unbound run cannot read these tokens of `encoder`; None if it can.

    `facts` is what their source knows about them; where it knows no identity, only sizes are compared.
    """
    wanted = record.shapes[encoder]
    if (found.grid, found.width) != (wanted.grid, wanted.width):
        sizes = [f"{'x'.join(map(str, shape.grid))} of width {shape.width}" for shape in (wanted, found)]
        return f"the imported run reads {encoder} tokens of {sizes[0]}, this source has {sizes[1]}"
    return made_otherwise(encoder, record.wanted.get(encoder, {}), facts.get("identity", {}))

"""What an imported checkpoint wants of its tokens, against the identity of those that are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def made_otherwise(encoder: str, wanted: Mapping[str, str], identity: Mapping[str, Any]) -> str | None:
    """How tokens differ from those that a checkpoint wants, by dotted names of an identity; None if in nothing."""
    for name, value in wanted.items():
        found: Any = identity
        for part in name.split("."):
            found = found.get(part, {})
        if found and found != value:
            return (
                f"the checkpoint was trained on {encoder} tokens of {name} {value}, this source has {found}: extract"
                f" them with that {name.rpartition('.')[2]}, as another identity"
            )
    return None

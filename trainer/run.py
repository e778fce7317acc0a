"""Run: what `merv-train` calls: a recipe's stages described, or trained, with the tokens of a place.

Everything heavy is imported here, so that the command line can be read without it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.config import Stages
from trainer.loop.stages import describe_stages, train_stages
from trainer.sources import TokenPlace, opened, store_of


def dry_run_stages(stages: Stages, place: TokenPlace) -> dict[str, Any]:
    """All that is known before the first step of every stage."""
    with opened(place) as open_tokens:
        return describe_stages(stages, open_tokens, store=store_of(place))


def train_in_stages(
    stages: Stages, place: TokenPlace, out: Path, *, resume: bool, only: str | None = None
) -> list[dict[str, Any]]:
    """Train a recipe's stages to their end, or `only` the one that is named."""
    with opened(place, out) as open_tokens:
        results = train_stages(stages, open_tokens, out, store=store_of(place), resume=resume, only=only)
    return [asdict(result) for result in results]

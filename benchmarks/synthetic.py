"""Synthetic encoders: what benchmarks store where no encoder runs, described as a store wants every encoder described.

They carry no claim: the digest of their weights is zeros, and layer, frames and decoding are "none".
"""

from __future__ import annotations

from typing import Any

from featurestore.identity import FeatureIdentity


def synthetic_identity(encoder: str, grid: tuple[int, int, int], width: int, **fields: Any) -> FeatureIdentity:
    """float16 tokens of this grid and width; `fields` are what a benchmark needs otherwise."""
    described = {
        "architecture": {},
        "weights_sha256": "0" * 64,
        "layer": "none",
        "num_frames": grid[0],
        "frame_rule": "none",
        "decode": "none",
        "preprocessing": {},
        "still_period": 1,
        "pooling": "none",
    }
    return FeatureIdentity(encoder=encoder, grid=grid, width=width, **{**described, **fields})

"""The identity of an encoder's tokens, made from its spec, its weights' hash and what is stored of it.

Apart from the weights' hash nothing here needs the weights, so a driver can make identities without torch once a
worker has told it the hash.
"""

from __future__ import annotations

from featurestore.identity import FeatureIdentity
from mervcache.errors import UserError
from pipeline.align import DEFAULT_GRID, Grid, aligned_period, check_grid
from pipeline.encoders.base import EncoderSpec


def feature_identity(
    spec: EncoderSpec,
    *,
    weights_sha256: str,
    compute_dtype: str,
    decode: str,
    grid: Grid | None = DEFAULT_GRID,  # None: the encoder's own
    prefix_tokens: bool = False,  # whether class and register tokens are stored beside
    storage_dtype: str = "float16",
) -> FeatureIdentity:
    """Everything that decides the bytes, and nothing else."""
    stored_grid = spec.grid if grid is None else tuple(grid)
    check_grid(spec.grid, stored_grid)
    if prefix_tokens and not spec.prefix_tokens:
        raise UserError(f"{spec.name} has no class or register tokens to store; leave them out for this encoder")
    return FeatureIdentity(
        encoder=spec.name,
        architecture={"model": spec.model, **spec.architecture},
        weights_sha256=weights_sha256,
        layer=spec.layer,
        num_frames=spec.num_frames,
        frame_rule=spec.frame_rule,
        decode=decode,
        preprocessing=spec.preprocessing(),
        still_period=aligned_period(spec.still_period, spec.grid[0], stored_grid[0]),
        grid=stored_grid,
        pooling="none" if grid is None else "adaptive-avg",
        width=spec.width,
        prefix_tokens=spec.prefix_tokens if prefix_tokens else 0,
        compute_dtype=compute_dtype,
        storage_dtype=storage_dtype,
    )

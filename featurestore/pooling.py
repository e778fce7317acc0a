"""Pooling of a clip's tokens to one vector: the mean or the maximum over time, height and width.

float16 tokens are reduced in float32 or wider: a float16 sum over 1,024 tokens loses digits, or overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featurestore.identity import FeatureIdentity
from mervcache.errors import UserError, unknown_name

BYTES_AT_ONCE = 64 * 2**20  # of float32 tokens read before they are pooled

Pool = Literal["mean", "max"]
FloatDtype = Literal["float32", "float64"]  # those that hold every stored value
POOLS: Mapping[Pool, Callable[[NDArray[Any], np.dtype[Any]], NDArray[Any]]] = {
    "mean": lambda tokens_BTHWD, dtype: tokens_BTHWD.mean(axis=(1, 2, 3), dtype=dtype),
    "max": lambda tokens_BTHWD, dtype: tokens_BTHWD.max(axis=(1, 2, 3)).astype(dtype),
}


def pool_tokens(tokens_BTHWD: NDArray[Any], pool: Pool, dtype: np.dtype[Any]) -> NDArray[Any]:
    """`dtype` [B, D] of tokens [B, T, H, W, D]; UserError for an unknown pool, or without a time step."""
    if pool not in POOLS:
        raise UserError(unknown_name("pool", pool, POOLS))
    if tokens_BTHWD.shape[1] == 0:
        raise UserError(f"pool={pool!r} needs at least one time step, and frames picks none")
    return POOLS[pool](tokens_BTHWD, dtype)


def float_dtype(name: Any) -> np.dtype[Any]:
    """float32 or float64; UserError for another dtype."""
    known = [np.dtype("float32"), np.dtype("float64")]
    try:
        return known[known.index(np.dtype(name))]
    except (TypeError, ValueError):
        raise UserError(f"dtype must be float32 or float64, which hold every stored value, got {name!r}") from None


def clips_at_once(identity: FeatureIdentity) -> int:
    """Clips whose tokens take `BYTES_AT_ONCE` as float32."""
    return max(1, BYTES_AT_ONCE // (4 * int(np.prod(identity.grid)) * identity.width))

"""Storage dtypes: float tokens of one clip -> stored arrays, and back.

float16 and bfloat16 round once (relative error at most 2**-11 and 2**-8). uint8 is affine per clip and channel:
`tokens = stored * scale + offset`, scale = (max - min) / 255, so the error is at most scale / 2 (and float32 rounding).
Legend: T frames, H W height width, K prefix tokens, D encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mervcache.errors import UserError

Arrays = dict[str, np.ndarray]
HINT = "store it as bfloat16 (--storage-dtype bfloat16)"


class OverflowedTokens(ValueError):
    """A clip's tokens do not fit the storage dtype; the message is a receipt's reason."""


def to_float16(tokens: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = np.asarray(tokens).astype(np.float16, copy=False)
    if not np.isfinite(stored).all():
        _refuse(tokens, "float16")
    return stored


def to_bfloat16_bits(tokens: np.ndarray) -> np.ndarray:
    """Round to nearest even, as uint16 bits."""
    floats = np.ascontiguousarray(tokens, dtype=np.float32)
    bits = floats.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if not np.isfinite(floats).all() or ((rounded & 0x7F80) == 0x7F80).any():
        _refuse(tokens, "bfloat16")
    return rounded


def from_bfloat16_bits(bits: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """uint16 bits -> float32, exactly."""
    wide = np.left_shift(bits, 16, dtype=np.uint32, out=None if out is None else out.view(np.uint32))
    return wide.view(np.float32)


def to_uint8(tokens_THWD: np.ndarray) -> Arrays:
    """Affine per channel over all other axes; a constant channel is stored exactly."""
    floats = np.asarray(tokens_THWD, dtype=np.float32)
    if not np.isfinite(floats).all():
        _refuse(floats, "uint8")
    axes = tuple(range(floats.ndim - 1))
    low, high = floats.min(axis=axes), floats.max(axis=axes)
    scale = ((high.astype(np.float64) - low) / 255).astype(np.float32)
    if not np.isfinite(scale).all():
        _refuse(floats, "uint8")
    divisor = np.where(scale > 0, scale, 1)
    stored = np.clip(np.rint((floats - low) / divisor), 0, 255).astype(np.uint8)
    return {"scale": scale, "offset": low, "tokens": stored}


def _refuse(tokens: np.ndarray, dtype: str) -> None:
    # Reasons hold no measured values, so that the same clip gives the same receipt everywhere.
    if not np.isfinite(np.asarray(tokens, dtype=np.float32)).all():
        raise OverflowedTokens("the encoder's tokens are not finite")
    raise OverflowedTokens(f"tokens overflow {dtype}" + (f"; {HINT}" if dtype == "float16" else ""))


_TO_STORED: dict[str, Callable[[np.ndarray], Arrays]] = {
    "float16": lambda tokens: {"tokens": to_float16(tokens)},
    "bfloat16": lambda tokens: {"tokens": to_bfloat16_bits(tokens)},
    "uint8": to_uint8,
}
_PREFIX: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float16": to_float16,
    "bfloat16": to_bfloat16_bits,
    "uint8": to_float16,
}


def to_stored(arrays: Mapping[str, np.ndarray], storage_dtype: str) -> Arrays:
    """{"tokens": float [T, H, W, D], "prefix": float [T, K, D]} -> what is stored, by array name."""
    if storage_dtype not in _TO_STORED:
        raise UserError(f"storage dtype must be one of {', '.join(_TO_STORED)}, got {storage_dtype!r}")
    stored = _TO_STORED[storage_dtype](arrays["tokens"])
    if "prefix" in arrays:
        stored["prefix"] = _PREFIX[storage_dtype](arrays["prefix"])
    return stored


def from_stored(
    stored: np.ndarray, *, logical_dtype: str | None, scale: np.ndarray | None = None, offset: np.ndarray | None = None
) -> np.ndarray:
    """Stored items of one clip -> floats: float16 stays float16, all others become float32."""
    if logical_dtype == "bfloat16":
        return from_bfloat16_bits(stored)
    if stored.dtype == np.uint8:
        assert scale is not None
        assert offset is not None
        return stored * scale + offset  # float32 [..., D]
    return stored

"""Storage dtypes: how the floats of one clip are stored, and how they are read back.

`STORAGE_DTYPES` is the only place that knows a storage dtype. Writer, reader, array metadata, measurements and
command-line choices look it up by name, so a new dtype is one entry. numpy is imported inside the functions because
`--help` lists the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mervcache.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray]  # by array name: "tokens", "prefix", "scale", "offset"

SIDECAR_DTYPE = "float32"  # of the arrays `scale` and `offset`


class OverflowedTokens(ValueError):
    """A clip's tokens do not fit the storage dtype; the message is a receipt's reason."""


@dataclass(frozen=True, kw_only=True)
class StorageDtype:
    """One storage dtype.

    `to_stored` maps floats [..., D] to {"tokens": items}, and to "scale" and "offset" [D] too where `is_affine`; it
    raises OverflowedTokens. `from_stored` (items, sidecars, out) writes floats into `out`; None: the items are floats.
    """

    zarr_dtype: str  # data type of the stored items; numpy knows it by the same name
    fill_value: int | str  # of absent rows, as zarr.json writes it
    item_bytes: int
    to_stored: Callable[[np.ndarray], Arrays]
    from_stored: Callable[[np.ndarray, Mapping[str, np.ndarray], np.ndarray], None] | None = None
    is_affine: bool = False  # float32 arrays `scale` and `offset` belong to it
    prefix: str | None = None  # storage dtype of prefix tokens, where it is another one
    step: float  # one unit in the last place, relative
    error: str  # largest rounding error, in words

    @property
    def float_dtype(self) -> str:
        """What reading gives: the stored items where they are floats, else float32."""
        return self.zarr_dtype if self.from_stored is None else "float32"

    def floats(self, items: np.ndarray, sidecars: Mapping[str, np.ndarray]) -> np.ndarray:
        """Stored items of one clip as floats; `sidecars` holds "scale" and "offset" where `is_affine`."""
        import numpy as np

        if self.from_stored is None:
            return items
        out = np.empty(items.shape, dtype=np.float32)
        self.from_stored(items, sidecars, out)
        return out


def storage_dtype(name: str) -> StorageDtype:
    """The entry of that name; UserError with the known names if there is none."""
    if name not in STORAGE_DTYPES:
        raise UserError(f"storage dtype must be one of {', '.join(STORAGE_DTYPES)}, got {name!r}")
    return STORAGE_DTYPES[name]


def prefix_dtype(name: str) -> str:
    """Name of the dtype that keeps the prefix tokens of a group whose tokens are stored as `name`."""
    return storage_dtype(name).prefix or name


def item_facts(zarr_dtype: str, logical_dtype: str | None) -> tuple[int | str, int]:
    """(fill value, bytes) of an array's items, by its logical dtype or else its Zarr data type; KeyError if unknown."""
    entry = STORAGE_DTYPES.get(str(logical_dtype))
    if entry is None or entry.zarr_dtype != zarr_dtype:
        entry = {entry.zarr_dtype: entry for entry in reversed(STORAGE_DTYPES.values())}.get(zarr_dtype)
    if entry is None:
        return {SIDECAR_DTYPE: ("NaN", 4)}[zarr_dtype]
    return entry.fill_value, entry.item_bytes


def to_stored(arrays: Mapping[str, np.ndarray], name: str) -> Arrays:
    """{"tokens": float [T, H, W, D], "prefix": float [T, K, D]} of one clip -> what is stored, by array name."""
    stored = storage_dtype(name).to_stored(arrays["tokens"])
    if "prefix" in arrays:
        stored["prefix"] = storage_dtype(prefix_dtype(name)).to_stored(arrays["prefix"])["tokens"]
    return stored


def from_stored(stored: Mapping[str, np.ndarray], name: str) -> Arrays:
    """What `to_stored` gave of one clip -> {"tokens": ..., "prefix": ...} as a store returns them."""
    floats = {"tokens": storage_dtype(name).floats(stored["tokens"], stored)}
    if "prefix" in stored:
        floats["prefix"] = storage_dtype(prefix_dtype(name)).floats(stored["prefix"], stored)
    return floats


def overflow_reason(name: str, *, is_finite: bool) -> str:
    """Why floats do not fit the storage dtype `name`; `is_finite`: before the cast.

    Reasons hold no measured values, so that the same clip gives the same receipt everywhere.
    """
    if not is_finite:
        return "the encoder's tokens are not finite"
    advice = f"; store it as {WIDEST} (--storage-dtype {WIDEST})" if name == "float16" else ""
    return f"tokens overflow {name}{advice}"


def _overflow(tokens: np.ndarray, name: str) -> OverflowedTokens:
    import numpy as np

    is_finite = bool(np.isfinite(np.asarray(tokens, dtype=np.float32)).all())
    return OverflowedTokens(overflow_reason(name, is_finite=is_finite))


def _to_stored_float16(tokens: np.ndarray) -> Arrays:
    """Round once to nearest even."""
    import numpy as np

    with np.errstate(over="ignore"):
        stored = np.asarray(tokens).astype(np.float16, copy=False)
    if not np.isfinite(stored).all():
        raise _overflow(tokens, "float16")
    return {"tokens": stored}


def _to_stored_bfloat16(tokens: np.ndarray) -> Arrays:
    """Round once to nearest even; the bits as uint16."""
    import numpy as np

    floats = np.ascontiguousarray(tokens, dtype=np.float32)
    bits = floats.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if not np.isfinite(floats).all() or ((rounded & 0x7F80) == 0x7F80).any():
        raise _overflow(tokens, "bfloat16")
    return {"tokens": rounded}


def _from_stored_bfloat16(bits: np.ndarray, _sidecars: Mapping[str, np.ndarray], out: np.ndarray) -> None:
    import numpy as np

    np.left_shift(bits, 16, dtype=np.uint32, out=out.view(np.uint32))


def _to_stored_uint8(tokens: np.ndarray) -> Arrays:
    """Affine per channel over all other axes; a constant channel is stored exactly."""
    import numpy as np

    floats = np.asarray(tokens, dtype=np.float32)
    if not np.isfinite(floats).all():
        raise _overflow(floats, "uint8")
    axes = tuple(range(floats.ndim - 1))
    low, high = floats.min(axis=axes), floats.max(axis=axes)
    scale = ((high.astype(np.float64) - low) / 255).astype(np.float32)
    if not np.isfinite(scale).all():
        raise _overflow(floats, "uint8")
    stored = np.clip(np.rint((floats - low) / np.where(scale > 0, scale, 1)), 0, 255).astype(np.uint8)
    return {"scale": scale, "offset": low, "tokens": stored}


def _from_stored_uint8(items: np.ndarray, sidecars: Mapping[str, np.ndarray], out: np.ndarray) -> None:
    import numpy as np

    np.multiply(items, sidecars["scale"], out=out)
    out += sidecars["offset"]


STORAGE_DTYPES: dict[str, StorageDtype] = {
    "float16": StorageDtype(
        zarr_dtype="float16",
        fill_value="NaN",
        item_bytes=2,
        to_stored=_to_stored_float16,
        step=2**-10,
        error="2^-11 of a value",
    ),
    "bfloat16": StorageDtype(
        # Its bits: zarr-python 3.1 has no such type. 0x7fc1 is a NaN with a payload that no encoder makes, so an absent
        # row never looks like a value.
        zarr_dtype="uint16",
        fill_value=0x7FC1,
        item_bytes=2,
        to_stored=_to_stored_bfloat16,
        from_stored=_from_stored_bfloat16,
        step=2**-7,
        error="2^-8 of a value",
    ),
    "uint8": StorageDtype(
        # tokens = items * scale + offset with scale = (max - min) / 255 of clip and channel.
        zarr_dtype="uint8",
        fill_value=0,
        item_bytes=1,
        to_stored=_to_stored_uint8,
        from_stored=_from_stored_uint8,
        is_affine=True,
        prefix="float16",  # prefix tokens are few
        step=2**-5,
        error="half a step of (max - min) / 255 of clip and channel",
    ),
}
WIDEST, SMALLEST = "bfloat16", "uint8"  # what to advise: tokens that overflow, a full disk

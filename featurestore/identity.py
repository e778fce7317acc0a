"""`FeatureIdentity`: everything that decides the bytes of an encoder's tokens, and nothing else.

No path, time, host or library version is in it: those are provenance and go to the journal. Stores of equal identities
hold the same features, up to the device's rounding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from featurestore.storage_dtypes import storage_dtype
from mervcache.errors import StoreFormatError, UserError
from mervcache.files import is_json_object, record_digest
from mervcache.reprs import brief

IDENTITY_LENGTH = 12  # hex digits in a group's name


def _leaves(record: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """Values of a nested record by dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in record.items():
        leaves |= _leaves(value, f"{under}{name}.") if is_json_object(value) else {under + name: value}
    return leaves


@dataclass(frozen=True, kw_only=True)
class FeatureIdentity:
    """One encoder's features by contract; its digest names the group in the store."""

    encoder: str  # "dinov2": lower case letters, digits, "_" and "."
    architecture: Mapping[str, Any]  # class and every size that shapes the computation
    weights_sha256: str  # of the loaded weights: sorted names, dtypes, shapes, bytes
    layer: str  # which output, in words: "output of block 23 of 24, no final norm"
    num_frames: int  # frames the encoder sees
    frame_rule: str  # "linspace-32/2": 32 indices by the reference's expression, every 2nd taken; pipeline.views
    decode: str  # decode contract: "frames/1", or "decord", "ffmpeg" by request
    preprocessing: Mapping[str, Any]  # resize rule, filter, crop, mean, std; dtype and exif where not the usual ones
    still_period: int  # time steps after which a still image's tokens repeat
    grid: tuple[int, int, int]  # stored T, H, W of a video
    pooling: str  # "adaptive-avg" to the grid, or "none" for the encoder's own grid
    width: int  # D
    prefix_tokens: int = 0  # class and register tokens stored as well, K
    compute_dtype: str = "float32"  # "float32" or "bfloat16": the forward's arithmetic
    storage_dtype: str = "float16"  # a name in STORAGE_DTYPES

    def __post_init__(self) -> None:
        storage_dtype(self.storage_dtype)  # checks the name
        if not self.encoder or not all(c.islower() or c.isdigit() or c in "_." for c in self.encoder):
            raise UserError(f"encoder names are lower case letters, digits, '_' and '.', got {self.encoder!r}")
        object.__setattr__(self, "grid", tuple(self.grid))

    def __repr__(self) -> str:
        sizes = "x".join(map(str, (*self.grid, self.width)))
        weights = f"weights {self.weights_sha256[:8]}, forward in {self.compute_dtype}"
        return brief(self, f"{self.encoder}@{self.id}: {sizes} {self.storage_dtype}, {weights}, {self.decode}")

    @cached_property
    def id(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON."""
        return record_digest(self.to_dict())[:IDENTITY_LENGTH]

    @property
    def group_name(self) -> str:
        """`ENCODER-IDENTITY12`, the folder of this encoder in a store."""
        return f"{self.encoder}-{self.id}"

    def grid_of(self, kind: str) -> tuple[int, int, int]:
        """Stored T, H, W of a `kind`: a still holds one period of the time axis only, the reader repeats it."""
        time, height, width = self.grid
        return (time if kind == "video" else min(self.still_period, time), height, width)

    @property
    def native_grid(self) -> tuple[int, int, int] | None:
        """T, H, W that the encoder makes of a clip, before pooling; None where the architecture does not say."""
        if self.pooling == "none":
            return self.grid
        sizes = [self.architecture.get(name) for name in ("tubelet_frames", "image_size", "patch_size")]
        known = [size for size in sizes if isinstance(size, int) and size > 0]
        if len(known) < len(sizes):
            return None
        tubelet, image, patch = known
        return (self.num_frames // tubelet, image // patch, image // patch)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> FeatureIdentity:
        """The identity of a `record` of `to_dict`; StoreFormatError for unknown fields, which a newer version wrote."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(record) - known):
            raise StoreFormatError(f"identity has unknown fields {', '.join(unknown)}; a newer version wrote it")
        return cls(**record)

    def differences(self, other: FeatureIdentity) -> dict[str, tuple[Any, Any]]:
        """Fields that differ from the `other` identity: name -> (value here, value there)."""
        here, there = self.to_dict(), other.to_dict()
        return {name: (here[name], there[name]) for name in here if here[name] != there[name]}

    def changes(self, new: FeatureIdentity) -> dict[str, tuple[Any, Any]]:
        """Differences by dotted name, "architecture.hidden_size" -> (value here, new value), None if absent."""
        here, there = _leaves(self.to_dict()), _leaves(new.to_dict())
        names = dict.fromkeys([*here, *there])
        return {name: (here.get(name), there.get(name)) for name in names if here.get(name) != there.get(name)}

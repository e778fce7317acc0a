"""What probes read of a store: tokens or averages of them, read in chunks and pooled at once, in bounded memory.

N clips, B clips of a chunk, T time, H W height width, G places of a frame, P tokens of a clip, D width, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, prod
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurestore import FeatureStore
from featurestore.storage_dtypes import storage_dtype
from mervcache.console import ProgressLine, format_bytes
from mervcache.errors import UserError
from trainer.data.tokens import TokenShape
from trainer.model.projectors import average_windows, pools_exactly

ProbeName = Literal["linear", "attentive"]
CHUNK_BYTES = 64 << 20  # of tokens in float32
LARGEST_BATCH = 64  # clips that an attentive probe reads at once
FULL = 4  # bytes of a float32


@dataclass(frozen=True, kw_only=True)
class Readout:
    """What a probe reads of every encoder.

    Linear probes read places of a frame averaged over time, one after another; attentive probes read tokens. Without
    `tokens_per_frame` a linear probe reads the mean of all stored tokens, an attentive one the tokens as stored.
    """

    probe: ProbeName
    tokens_per_frame: int | None = None  # a square; None: of the stored grid

    def grid(self, stored: TokenShape) -> tuple[int, int, int]:
        """T, H, W of what is read."""
        time, height, width = stored.grid
        if self.tokens_per_frame is not None:
            height = width = isqrt(self.tokens_per_frame)
        elif self.probe == "linear":
            height = width = 1
        return (1 if self.probe == "linear" else time, height, width)

    def why_not(self, stored: TokenShape) -> str:
        """Why it cannot be made exactly of a stored grid; "" where it can."""
        grid = self.grid(stored)
        if any(want > have for want, have in zip(grid, stored.grid, strict=True)):
            return f"{_text(grid[1:])} places are finer than the stored {_text(stored.grid[1:])}"
        if stored.is_pooled and not pools_exactly(grid, stored):
            native = f", an average of the encoder's {_text(stored.native_grid[1:])}," if stored.native_grid else ""
            return f"{_text(grid[1:])} places are no exact average of the stored {_text(stored.grid[1:])}{native}"
        return ""

    def shape(self, stored: TokenShape) -> tuple[int, ...]:
        """[F] or [P, D] of one clip."""
        size = prod(self.grid(stored))
        return (size * stored.width,) if self.probe == "linear" else (size, stored.width)

    def keeps(self, stored: TokenShape) -> bool:
        """Whether it is the tokens as they are stored."""
        return self.probe == "attentive" and self.grid(stored) == stored.grid

    def pool(self, tokens_BTHWD: Tensor, stored: TokenShape) -> Tensor:
        """[B, F] or [B, P, D]: averages in float32, or the stored tokens in their dtype."""
        if not self.keeps(stored):
            tokens_BTHWD = average_windows(tokens_BTHWD.float(), self.grid(stored))
        return tokens_BTHWD.reshape(len(tokens_BTHWD), *self.shape(stored))

    def __str__(self) -> str:
        if self.tokens_per_frame is None:
            return "mean of the stored tokens" if self.probe == "linear" else "stored tokens"
        tokens = f"{self.tokens_per_frame} token{'s'[: self.tokens_per_frame != 1]} per frame"
        return f"{tokens}, mean over time" if self.probe == "linear" else tokens


def exact_levels(shape: TokenShape) -> list[int]:
    """Tokens per frame that a stored grid holds exactly: `[1, 4, 16, 64]` of 8 x 8 from 16 x 16."""
    sides = range(1, min(shape.grid[1:]) + 1)
    return [side**2 for side in sides if not Readout(probe="linear", tokens_per_frame=side**2).why_not(shape)]


def is_mean_exact(shape: TokenShape) -> bool:
    """Whether the mean of the stored tokens is that of the encoder's own grid."""
    return not Readout(probe="linear").why_not(shape)


Plan = Mapping[tuple[str, Readout], tuple[int, ...]]  # (encoder, readout) -> shape of a clip


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What all probes read, in memory; row n is clip n of those it was made for."""

    arrays: dict[tuple[str, Readout], NDArray]
    num_unfinite: Mapping[str, int]  # encoder -> clips that hold infinite values or NaN
    is_finite_N: NDArray[np.bool_]  # in all encoders

    def keep(self, rows: NDArray[np.int64]) -> None:
        """Leave only these clips, one array after another."""
        for place in self.arrays:
            self.arrays[place] = self.arrays[place][rows]


def held_bytes(plan: Plan, shapes: Mapping[str, TokenShape], num_clips: int, dtypes: Mapping[str, np.dtype]) -> int:
    """Memory of all features."""
    return num_clips * sum(
        prod(shape) * (dtypes[encoder].itemsize if readout.keeps(shapes[encoder]) else FULL)
        for (encoder, readout), shape in plan.items()
    )


def working_bytes(plan: Plan, subsets: Sequence[Sequence[str]], num_clips: int) -> int:
    """Memory of the largest fit.

    A linear probe works in float64: features twice, their rotation, and products of them with eigenvectors; an
    attentive one on copies of a batch's tokens in float32.
    """
    most = 0
    for readout in {readout for _, readout in plan}:
        for subset in subsets:
            if any((encoder, readout) not in plan for encoder in subset):
                continue
            width = sum(prod(plan[encoder, readout]) for encoder in subset)
            least = min(width, num_clips)
            linear = 8 * (2 * num_clips * width + 2 * num_clips * least + 3 * least**2)
            most = max(most, linear if readout.probe == "linear" else 2 * FULL * LARGEST_BATCH * width)
    return most


def check_memory(held: int, working: int, limit: int, num_clips: int) -> None:
    """UserError where features and fits do not fit."""
    if held + working > limit:
        raise UserError(
            f"the features of {num_clips:,} clips take {format_bytes(held)}, fitting them {format_bytes(working)}, over"
            f" the {format_bytes(limit)} of --max-memory: raise it, or probe fewer --encoders, smaller --grids or"
            " --probes linear alone"
        )


def read_features(
    store: FeatureStore,
    clip_ids: Sequence[str],
    plan: Plan,
    shapes: Mapping[str, TokenShape],
    progress: ProgressLine,
) -> Features:
    """Read the tokens of each encoder once, a chunk of clips at a time, and keep only what the plan names."""
    arrays: dict[tuple[str, Readout], NDArray] = {}
    is_finite_EN = {}
    for encoder, stored in shapes.items():
        readouts = [readout for name, readout in plan if name == encoder]
        if not readouts:
            continue
        is_finite = is_finite_EN.setdefault(encoder, np.empty(len(clip_ids), dtype=bool))
        size = max(1, CHUNK_BYTES // (FULL * prod(stored.grid) * stored.width))
        for start in range(0, len(clip_ids), size):
            rows = slice(start, start + size)
            tokens_BTHWD = torch.from_numpy(store.read(clip_ids[rows], encoder=encoder))
            is_finite[rows] = torch.isfinite(tokens_BTHWD).flatten(1).all(dim=1).numpy()
            for readout in readouts:
                found = readout.pool(tokens_BTHWD, stored).numpy()
                place = (encoder, readout)
                if place not in arrays:
                    arrays[place] = np.empty((len(clip_ids), *plan[place]), dtype=found.dtype)
                arrays[place][rows] = found
            progress.advance(len(tokens_BTHWD))
    return Features(
        arrays=arrays,
        num_unfinite={encoder: int((~each).sum()) for encoder, each in is_finite_EN.items() if not each.all()},
        is_finite_N=np.logical_and.reduce(list(is_finite_EN.values())),
    )


def read_dtypes(store: FeatureStore) -> dict[str, np.dtype]:
    """The dtype that a store gives each encoder's tokens in."""
    return {key: np.dtype(storage_dtype(found.storage_dtype).float_dtype) for key, found in store.encoders.items()}


def _text(grid: Sequence[int]) -> str:
    return " x ".join(map(str, grid))

"""Align: features on an encoder's own grid -> tokens on the grid that all encoders share.

Adaptive average pooling with torch's windows, as separable means: output i of an axis of n inputs and m outputs is
the mean of inputs floor(i n / m) up to ceil((i + 1) n / m). It has no parameters and precedes the trainable projector,
so caching its output loses nothing. Sums are element-wise additions in a fixed order rather than a reduction or a
matrix product, so that bits depend on neither batch, threads nor device.

B batch, T time steps, H W patch rows and columns, K prefix tokens, D encoder width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mervcache.errors import UserError

if TYPE_CHECKING:
    import torch

Grid = tuple[int, int, int]
DEFAULT_GRID: Grid = (16, 8, 8)  # T, H, W: 64 tokens per frame (MERV, arXiv 2501.01426)


def align(
    features_BTHWD: torch.Tensor, grid: Grid | None = DEFAULT_GRID, *, native_time: int | None = None
) -> torch.Tensor:
    """Features of any float dtype -> tokens_BTHWD float32 on `grid`; grid None keeps the encoder's own.

    For a still image, features hold one period of the time axis only. Give `native_time`, the encoder's T of a whole
    clip: the result is then one period of the aligned tokens, `aligned_period(period, native_time, grid[0])` steps.
    """
    tokens = features_BTHWD.float()
    if grid is None:
        return tokens
    period, height, width = tokens.shape[1:4]
    time = period if native_time is None else native_time
    check_grid((time, height, width), grid)
    tokens = pool_axis(pool_axis(tokens, 3, grid[2]), 2, grid[1])
    return align_time(tokens, grid[0], native_time=native_time)


def align_time(steps_BT: torch.Tensor, time: int, *, native_time: int | None = None) -> torch.Tensor:
    """Pool axis 1 alone to `time` steps, float32; prefix tokens [B, T, K, D] need no more than this."""
    steps_BT = steps_BT.float()
    period = steps_BT.shape[1]
    if native_time is None or native_time == period:
        return pool_axis(steps_BT, 1, time)
    kept = aligned_period(period, native_time, time)
    if time == native_time or period == 1:
        return steps_BT
    repeated = steps_BT.repeat(1, native_time // period, *(1,) * (steps_BT.ndim - 2))
    return pool_axis(repeated, 1, time)[:, :kept]


def aligned_period(period: int, native_time: int, time: int) -> int:
    """Steps after which a still's tokens repeat once `native_time` steps are pooled to `time`.

    >>> aligned_period(8, 16, 16), aligned_period(8, 16, 8), aligned_period(1, 16, 8), aligned_period(8, 16, 6)
    (8, 4, 1, 6)
    """
    if native_time % period:
        raise UserError(f"a still's period of {period} steps must divide the encoder's {native_time} steps")
    window, rest = divmod(native_time, time)
    if time == native_time or period == 1:
        return period
    return period // window if not rest and period % window == 0 else time


def check_grid(native: Grid, grid: Grid) -> None:
    """Refuse a grid that pooling cannot give."""
    if len(grid) != 3 or min(grid) < 1:
        raise UserError(f"a grid is three numbers >= 1, time x height x width, got {grid}")
    if grid[0] > native[0]:
        raise UserError(
            f"cannot align {native[0]} time steps to {grid[0]}: pooling never adds steps; use a grid of at most "
            f"{native[0]} steps, or give the encoder more frames"
        )


def adaptive_windows(size: int, num_windows: int) -> list[tuple[int, int]]:
    """Half-open input ranges of each output, as in torch.nn.functional.adaptive_avg_pool1d.

    >>> adaptive_windows(14, 8)
    [(0, 2), (1, 4), (3, 6), (5, 7), (7, 9), (8, 11), (10, 13), (12, 14)]
    """
    return [(i * size // num_windows, -(-(i + 1) * size // num_windows)) for i in range(num_windows)]


def pool_axis(values: torch.Tensor, axis: int, num_windows: int) -> torch.Tensor:
    """Mean over the adaptive windows of one axis."""
    import torch

    size = values.shape[axis]
    if size == num_windows:
        return values
    if size % num_windows == 0:
        window = size // num_windows
        return _mean(values.unflatten(axis, (num_windows, window)).unbind(axis + 1))
    steps = values.unbind(axis)
    return torch.stack([_mean(steps[a:b]) for a, b in adaptive_windows(size, num_windows)], dim=axis)


def _mean(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total / len(parts)

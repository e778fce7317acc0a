"""Token maps: an encoder's tokens as colours, and a figure of those of one clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mervcache.errors import UserError, missing_extra
from mervcache.text import one_line, redact

if TYPE_CHECKING:
    from matplotlib.figure import Figure


CLIPPED = (1.0, 99.0)  # percentiles that become black and full colour: outlier tokens must not grey out the rest


@dataclass(frozen=True, kw_only=True)
class PrincipalColours:
    """Colours of an encoder's tokens: their first three principal components as red, green and blue."""

    mean_D: np.ndarray
    directions_D3: np.ndarray  # fewer columns where D < 3
    low_3: np.ndarray  # components that become black
    high_3: np.ndarray  # and full colour

    @classmethod
    def fit(cls, tokens_BTHWD: np.ndarray) -> PrincipalColours:
        """Components of all the tokens given; colours are comparable between all maps that one fit makes."""
        flat = tokens_BTHWD.reshape(-1, tokens_BTHWD.shape[-1]).astype(np.float32)
        mean_D = flat.mean(axis=0)
        flat = flat - mean_D
        _, directions = np.linalg.eigh(flat.T @ flat)  # [D, D], ascending: D is small against the number of tokens
        strongest = directions[:, ::-1][:, : min(3, flat.shape[1])]
        strongest = strongest * np.where(strongest.sum(axis=0) < 0, -1, 1)  # an arbitrary sign could flip between runs
        low, high = np.percentile(flat @ strongest, CLIPPED, axis=0)
        return cls(mean_D=mean_D, directions_D3=strongest, low_3=low, high_3=high)

    def maps(self, tokens_BTHWD: np.ndarray) -> np.ndarray:
        """float tokens [B, T, H, W, D] -> uint8 RGB maps [B, T, H, W, 3]."""
        flat = tokens_BTHWD.reshape(-1, tokens_BTHWD.shape[-1]).astype(np.float32) - self.mean_D
        components = flat @ self.directions_D3
        scaled = np.clip((components - self.low_3) / np.maximum(self.high_3 - self.low_3, 1e-12), 0, 1)
        maps = np.zeros((len(scaled), 3), np.uint8)
        maps[:, : scaled.shape[1]] = np.round(255 * scaled)
        return maps.reshape(*tokens_BTHWD.shape[:-1], 3)


def principal_maps(tokens_BTHWD: np.ndarray) -> np.ndarray:
    """float tokens [B, T, H, W, D] -> uint8 RGB maps [B, T, H, W, 3], in the colours of these tokens alone."""
    return PrincipalColours.fit(tokens_BTHWD).maps(tokens_BTHWD)


def spread_steps(stored: int, num_steps: int) -> NDArray[np.int64]:
    """At most `num_steps` of so many stored time steps, evenly spaced."""
    return np.unique(np.linspace(0, stored - 1, min(num_steps, stored)).astype(np.int64))


def plot_maps(clips: Mapping[str, Mapping[str, NDArray[Any]]]) -> Figure:
    """A figure with a row per clip and encoder, and a column per time step.

    `clips` holds float tokens [T, H, W, D] by clip and encoder. All maps of an encoder have the colours of one fit, so
    that they can be compared between clips. UserError without matplotlib.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise UserError(missing_extra(error) or str(error)) from error
    by_encoder: dict[str, list[NDArray[Any]]] = {}
    for tokens in clips.values():
        for encoder, tokens_THWD in tokens.items():
            by_encoder.setdefault(encoder, []).append(tokens_THWD.reshape(-1, tokens_THWD.shape[-1]))
    # To the fit the tokens of all clips are one of a single row.
    colours = {
        encoder: PrincipalColours.fit(np.concatenate(parts)[None, None, None]) for encoder, parts in by_encoder.items()
    }
    rows = [(clip, encoder, tokens) for clip, of_clip in clips.items() for encoder, tokens in of_clip.items()]
    num_columns = max(len(tokens_THWD) for _, _, tokens_THWD in rows)
    size = (1.2 * num_columns + 1.5, 1.2 * len(rows) + 0.6)
    figure = pyplot.figure(figsize=size, layout="constrained")  # pyright: ignore[reportUnknownMemberType]: matplotlib's
    pyplot.close(figure)  # it belongs to the caller; pyplot would show it a second time
    axes = figure.subplots(len(rows), num_columns, squeeze=False)
    for row, (clip, encoder, tokens_THWD) in enumerate(rows):
        maps_THWC = colours[encoder].maps(tokens_THWD[None])[0]
        for column, axis in enumerate(axes[row]):
            axis.set(xticks=[], yticks=[])
            if column < len(maps_THWC):
                axis.imshow(maps_THWC[column], interpolation="nearest")
            else:
                axis.set_visible(False)
        axes[row, 0].set_ylabel(encoder, rotation=0, ha="right", va="center")
        if encoder == next(iter(clips[clip])):
            # Not parsed as mathematics: an id may hold a dollar sign.
            axes[row, 0].set_title(one_line(redact(clip)), loc="left", fontsize="medium", parse_math=False)
    return figure

"""Token maps: tokens as colours, so that a person sees what an encoder sees.

Comes in: tokens of some clips of one encoder. Goes out: a small RGB image per clip and time step. Colours are the first
three principal components over all the tokens given, so they can be compared between the clips of one call.
"""

from __future__ import annotations

import numpy as np

CLIPPED = (1.0, 99.0)  # percentiles that become black and full colour: outlier tokens must not grey out the rest


def principal_maps(tokens_BTHWD: np.ndarray) -> np.ndarray:
    """float tokens [B, T, H, W, D] -> uint8 RGB maps [B, T, H, W, 3]."""
    shape = tokens_BTHWD.shape[:-1]
    flat = tokens_BTHWD.reshape(-1, tokens_BTHWD.shape[-1]).astype(np.float32)
    flat = flat - flat.mean(axis=0)
    _, directions = np.linalg.eigh(flat.T @ flat)  # [D, D], ascending: D is small against the number of tokens
    strongest = directions[:, ::-1][:, : min(3, flat.shape[1])]
    strongest = strongest * np.where(strongest.sum(axis=0) < 0, -1, 1)  # a sign of its own would flip between runs
    components = flat @ strongest
    low, high = np.percentile(components, CLIPPED, axis=0)
    scaled = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
    maps = np.zeros((len(scaled), 3), np.uint8)
    maps[:, : scaled.shape[1]] = np.round(255 * scaled)
    return maps.reshape(*shape, 3)

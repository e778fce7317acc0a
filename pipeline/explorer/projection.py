"""Vectors of clips as points of a plane."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from mervcache.errors import UserError

Floats = NDArray[np.float32]


def pca(vectors_CD: Floats) -> Floats:
    """The first two principal components [C, 2]; signs are chosen so that equal vectors give equal maps."""
    centred_CD = vectors_CD - vectors_CD.mean(axis=0)
    _, directions_DD = np.linalg.eigh(centred_CD.T @ centred_CD)  # ascending
    plane_D2 = directions_DD[:, ::-1][:, :2]
    plane_D2 = plane_D2 * np.where(plane_D2.sum(axis=0) < 0, -1, 1)
    points_C2 = centred_CD @ plane_D2
    return np.pad(points_C2, ((0, 0), (0, 2 - points_C2.shape[1])))


def umap(vectors_CD: Floats) -> Floats:
    """UMAP with cosine distance and a fixed seed [C, 2]; UserError where umap-learn is not installed."""
    try:
        from umap import UMAP  # pyright: ignore[reportMissingImports]: of no extra, the user installs it
    except ModuleNotFoundError as error:
        raise UserError(
            "UMAP is not installed: pip install 'merv-pipeline[umap]', or leave the projection at pca"
        ) from error
    if len(vectors_CD) < 4:
        return pca(vectors_CD)
    neighbours = min(15, len(vectors_CD) - 1)
    return UMAP(n_neighbors=neighbours, metric="cosine", random_state=0).fit_transform(vectors_CD)


PROJECTIONS: Mapping[str, Callable[[Floats], Floats]] = {"pca": pca, "umap": umap}


def project(vectors_CD: Floats, name: str) -> Floats:
    """Points [C, 2] by a projection's name."""
    if name not in PROJECTIONS:
        raise UserError(f"no projection {name!r}; there are: {', '.join(PROJECTIONS)}")
    return PROJECTIONS[name](vectors_CD)

"""How far two machines' tokens of the same clips are apart, and how far they may be.

Tolerances bound a clip's relative error: the root of its summed squared differences over that of its summed squared
stored values. On the machine that made them, and on one like it (same device, batch shape, threads), tokens are equal
to the bit. Elsewhere an encoder's sums round in another order, and the result may fall into the next stored number;
`TOLERANCES` allows for the first by compute dtype, `STEPS` for the second by storage dtype. The worst single token may
be `WORST_TOKEN` times as far off as the clip, which its cosine tells. benchmarks/README.md holds what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from featurestore.identity import FeatureIdentity
from featurestore.quality import ParityRow
from featurestore.storage_dtypes import from_stored
from featurestore.zarr_metadata import array_specs

TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
STEPS = {"float16": 2**-10, "bfloat16": 2**-7, "uint8": 2**-5}  # one unit in the last place
WORST_TOKEN = 4
Stored = Mapping[str, np.ndarray]  # a clip's stored items by array


def compare(key: str, kind: str, identity: FeatureIdentity, pairs: Iterable[tuple[Stored, Stored | None]]) -> ParityRow:
    """Stored items of clips beside those that were made here (None: they overflow the storage dtype here).

    Figures are None where a clip has none: it overflows here, or a crafted store holds what is no number.
    """
    pairs = list(pairs)
    equal, figures = True, []
    for theirs, mine in pairs:
        equal = equal and mine is not None and all(np.array_equal(theirs[name], mine[name]) for name in theirs)
        if mine is not None:
            figures.append(_differences(kind, identity, theirs, mine))
    whole = len(figures) == len(pairs) and bool(pairs) and bool(np.isfinite(figures).all())
    max_abs, relative, cosine = (
        (max(f[0] for f in figures), max(f[1] for f in figures), min(f[2] for f in figures))
        if whole
        else (None, None, None)
    )
    tolerance = TOLERANCES[identity.compute_dtype] + STEPS[identity.storage_dtype]
    cosine_tolerance = 1 - (WORST_TOKEN * tolerance) ** 2 / 2  # the cosine of two vectors that differ by so much
    is_within = whole and relative <= tolerance and cosine >= cosine_tolerance
    return ParityRow(
        encoder=key,
        identity=identity.id,
        kind=kind,
        canaries="",
        clips=len(pairs),
        frames="not compared",
        max_abs=max_abs,
        relative=relative,
        cosine_min=cosine,
        tolerance=tolerance,
        cosine_tolerance=cosine_tolerance,
        verdict="equal" if equal else "within" if is_within else "outside",
    )


def _differences(kind: str, identity: FeatureIdentity, theirs: Stored, mine: Stored) -> tuple[float, float, float]:
    """(largest difference, relative error, smallest cosine of a token) of one clip; NaN where its values are none."""
    largest, squares, total, cosine = 0.0, 0.0, 0.0, 1.0
    for name in ("tokens", "prefix"):
        if name not in theirs:
            continue
        a, b = (_floats(kind, identity, name, stored) for stored in (theirs, mine))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return (math.nan,) * 3
        largest = max(largest, float(np.abs(a - b).max()))
        squares, total = squares + float(((a - b) ** 2).sum()), total + float((a**2).sum())
        norms = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
        cosines = np.where(norms > 0, (a * b).sum(-1) / np.where(norms > 0, norms, 1), (norms == 0) & (a == b).all(-1))
        cosine = min(cosine, float(cosines.min()))
    relative = (squares / total) ** 0.5 if total > 0 else (0.0 if squares == 0 else 1.0)
    return largest, relative, min(cosine, 1.0)


def _floats(kind: str, identity: FeatureIdentity, name: str, stored: Stored) -> np.ndarray:
    """float64 [..., D]: differences of float16 numbers are exact in it."""
    spec = array_specs(identity, kind, blocks=0, block_rows=1)[name]
    sides = {side: stored[side] for side in ("scale", "offset") if side in stored}
    return np.asarray(from_stored(stored[name], logical_dtype=spec.logical_dtype, **sides), dtype=np.float64)

"""What a device does to an encoder's tokens: do bits depend on the neighbours, and do the values fit float16.

Used by gpu_check.py. Comes in: loaded encoders and frames. Goes out: one mapping of figures per encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.worker.encode import TokenEncoder, encode_batch

LARGEST = 65504.0  # of float16
SMALLEST_NORMAL = 2.0**-14  # below it float16 loses digits


def neighbours(run: TokenEncoder, clips: Sequence[np.ndarray]) -> dict[str, Any]:
    """Tokens of a clip in a full batch beside those of the same clip at the same place of a batch of zeros.

    A store promises the first two figures to be equal. A batch of one is another shape and may differ; how much is
    told, because encoding live in another batch shape would differ as much.
    """
    slots = list(range(len(clips)))
    full, _ = encode_batch(run, dict(enumerate(clips)), slots)
    equal = 0
    for slot in slots:
        rows = [slot if other == slot else None for other in slots]
        alone, _ = encode_batch(run, {slot: clips[slot]}, rows)
        equal += same_bits(alone["tokens"][slot], full["tokens"][slot])
    single, _ = encode_batch(run, {0: clips[0]}, [0])
    return {
        "batch": len(slots),
        "clips with equal bits": equal,
        "is equal": equal == len(slots),
        "equal in a batch of one": same_bits(single["tokens"][0], full["tokens"][0]),
        "largest difference in a batch of one": float(np.abs(single["tokens"][0] - full["tokens"][0]).max()),
    }


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal bytes: a NaN equals itself and 0.0 is not -0.0."""
    return one.tobytes() == other.tobytes()


def float16_fit(run: TokenEncoder, clips: Sequence[np.ndarray]) -> dict[str, Any]:
    """How the tokens, float32 before they are stored, sit in float16's range."""
    arrays, _ = encode_batch(run, dict(enumerate(clips)), list(range(len(clips))))
    return range_of(arrays["tokens"]) | {"weights": run.weights_label}


def range_of(tokens: np.ndarray) -> dict[str, Any]:
    """Largest absolute value, and the shares of values that float16 saturates or rounds coarsely."""
    size = np.abs(tokens)
    return {
        "values": int(size.size),
        "largest": float(np.nanmax(size)),
        "share not finite": float(np.mean(~np.isfinite(size))),
        "share above 65504": float(np.mean(size > LARGEST)),
        "share subnormal": float(np.mean((size > 0) & (size < SMALLEST_NORMAL))),
    }

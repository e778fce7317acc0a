"""Live tokens as a store would return them: the same rounding, and a still's period repeated."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from featurestore import FeatureIdentity
from featurestore.storage_dtypes import WIDEST, OverflowedTokens, from_stored, to_stored
from mervcache.errors import UserError

Arrays = dict[str, np.ndarray]  # tokens, and prefix tokens where there are some


def through_storage(arrays: Mapping[str, np.ndarray], identity: FeatureIdentity) -> Arrays:
    """Float tokens of one clip -> what a store returns for them: rounded, a still's period repeated.

    Raises UserError for tokens that overflow the identity's storage dtype; a store would leave the clip out.
    """
    try:
        stored = to_stored(arrays, identity.storage_dtype)
    except OverflowedTokens as error:
        raise UserError(
            f"{identity.encoder}: {error}; a store would leave the clip out, a live run ends here:"
            f" set storage_dtype: {WIDEST} in --extract-config"
        ) from error
    floats = from_stored(stored, identity.storage_dtype)
    return {part: repeat_steps(floats[part], identity.grid[0]) for part in arrays}


def repeat_steps(values_T: np.ndarray, time: int) -> np.ndarray:
    """One period of a still -> all time steps."""
    return values_T if len(values_T) == time else values_T[np.arange(time) % len(values_T)]

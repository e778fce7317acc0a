"""Masks: which encoders a sample shows to the model. A masked encoder is as absent as if its tokens were not stored.

A mask has an entry per encoder, in the order of the run; True is shown. With `mask_encoders` every sample draws one in
every epoch, as a pure function of seed, epoch and sample, so one checkpoint learns to answer from any subset.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb

from mervcache.errors import UserError, unknown_name
from trainer.config import MaskRule
from trainer.data.order import derive_seed

Mask = tuple[bool, ...]


def draw_mask(rule: MaskRule, num_encoders: int, *key: str | int, may_be_empty: bool) -> Mask:
    """The mask that follows from the key.

    `subsets`: every subset is equally likely. `sizes`: every number of encoders is equally likely, and among subsets of
    one size each: the whole set and single encoders, which tables read, are drawn more often. `may_be_empty`: the empty
    subset is one of them.
    """
    word, first = derive_seed("mask", *key), 0 if may_be_empty else 1
    if rule == "subsets":
        bits = first + word % (2**num_encoders - first)
        return tuple(bool(bits >> place & 1) for place in range(num_encoders))
    word, size = divmod(word, num_encoders + 1 - first)
    size += first
    places = list(combinations(range(num_encoders), size))[word % comb(num_encoders, size)]
    return tuple(place in places for place in range(num_encoders))


def mask_of(encoders: Sequence[str], shown: Sequence[str]) -> Mask:
    """The mask that shows these encoders."""
    for name in shown:
        if name not in encoders:
            raise UserError(unknown_name("encoder of the run", name, encoders))
    return tuple(encoder in shown for encoder in encoders)

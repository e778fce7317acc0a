"""Order: which samples make up each step's global batch.

A pure function of (seed, epoch, data digest): the only state of a run's reading is its step number, resuming costs
the same at any step, and the number of ranks changes nothing but who computes which part of a batch. Epochs follow each
other without a gap: a batch may hold the end of one and the start of the next, so every sample is read exactly once
per epoch and none is repeated to fill a batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from featurestore.errors import UserError
from featurestore.identity import canonical_json


@dataclass(frozen=True, kw_only=True)
class Order:
    """The batches of a run, by step."""

    num_samples: int
    batch_size: int  # over all ranks
    seed: int
    digest: str  # of the data: another selection of samples is another order

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1:
            raise UserError(f"nothing to order: {self.num_samples} samples in batches of {self.batch_size}")

    def batch(self, step: int) -> list[int]:
        """Indices of the samples of step 0, 1, ..."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        places = [divmod(position, self.num_samples) for position in positions]
        return [int(permutation(self.num_samples, self.seed, epoch, self.digest)[place]) for epoch, place in places]

    def num_steps(self, epochs: float) -> int:
        """Whole batches in so many epochs, at least one."""
        return max(1, int(epochs * self.num_samples) // self.batch_size)


def rank_share(batch: list[int], rank: int, num_ranks: int) -> list[int]:
    """A rank's contiguous part of a global batch."""
    if len(batch) % num_ranks:
        raise UserError(f"batch_size {len(batch)} must be a multiple of the number of ranks, {num_ranks}")
    share = len(batch) // num_ranks
    return batch[rank * share : (rank + 1) * share]


@lru_cache(maxsize=2)  # a batch touches at most two neighbouring epochs of a set larger than the batch
def permutation(num_samples: int, seed: int, epoch: int, digest: str) -> np.ndarray:
    """Indices 0..num_samples-1 in the order of this epoch.

    Philox's raw stream is fixed by its definition, unlike `Generator.permutation`, which numpy may change (NEP 19).
    """
    words = np.random.Philox(key=derive_seed("order", seed, epoch, digest)).random_raw(num_samples)
    return np.argsort(words, kind="stable")


def derive_seed(*parts: str | int) -> int:
    """63 bits that depend on every part: one number per purpose, so that streams do not overlap."""
    return int.from_bytes(hashlib.sha256(canonical_json(list(parts)).encode()).digest()[:8], "big") >> 1

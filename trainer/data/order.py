"""Order of training samples: a pure function of (seed, epoch, data digest).

The only state is the step number, resuming costs the same at any step, and the number of ranks changes only who
computes which part of a batch. Samples flow in streams (one, or one per modality) that run from epoch to epoch without
a gap, so no batch is short or padded with repeats and every sample is read exactly as often as its weight says; samples
that fill no batch before the run ends are counted by `Order.num_dropped`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mervcache.errors import UserError
from mervcache.files import canonical_json


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Samples that are read equally often."""

    indices: np.ndarray  # int64, into the samples of the run
    name: str = ""  # part of the seed
    weight: float = 1.0  # times per epoch

    @property
    def num_extra(self) -> int:
        """Samples of an epoch beyond its whole passes, at least one where the weight is not whole."""
        rest = self.weight % 1
        return max(1, round(rest * len(self.indices))) if rest and len(self.indices) else 0

    @property
    def num_per_epoch(self) -> int:
        return int(self.weight) * len(self.indices) + self.num_extra

    def of_epoch(self, epoch: int, seed: int, digest: str) -> np.ndarray:
        """Indices to read in this epoch, in no meaningful order.

        The part of a pass is a window that moves round one permutation: no sample comes twice in it, the next epoch
        reads the samples behind it, and after any number of epochs no two samples differ by more than one reading.
        """
        whole = np.tile(self.indices, int(self.weight))
        if not self.num_extra:
            return whole
        places = np.arange(epoch * self.num_extra, (epoch + 1) * self.num_extra) % len(self.indices)
        window = permutation(len(self.indices), "extra", self.name, seed, digest)[places]
        return np.concatenate([whole, self.indices[window]])


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Samples that may share a batch."""

    groups: tuple[Group, ...]
    name: str = ""  # part of the seed

    @property
    def num_per_epoch(self) -> int:
        return sum(group.num_per_epoch for group in self.groups)

    def of_epoch(self, epoch: int, seed: int, digest: str) -> np.ndarray:
        """Indices in the order of this epoch."""
        indices = np.concatenate([group.of_epoch(epoch, seed, digest) for group in self.groups])
        purpose = f"order/{self.name}" if self.name else "order"
        return indices[permutation(len(indices), purpose, seed, epoch, digest)]


class Order:
    """The batches of a run, by step."""

    def __init__(self, streams: Sequence[Stream], *, batch_size: int, seed: int, digest: str) -> None:
        """`batch_size` over all ranks; `digest` of the data: another selection of samples is another order."""
        self.streams = tuple(stream for stream in streams if stream.num_per_epoch)
        self.batch_size, self.seed, self.digest = batch_size, seed, digest
        self.num_per_epoch = sum(stream.num_per_epoch for stream in self.streams)
        if not self.streams or batch_size < 1:
            raise UserError(f"nothing to order: {self.num_per_epoch} samples in batches of {batch_size}")
        # A batch touches at most two neighbouring epochs of a stream that is larger than the batch.
        self._epoch = lru_cache(maxsize=2 * len(self.streams))(self._read_epoch)
        self._turns = lru_cache(maxsize=2)(self._shuffle_turns)

    def batch(self, step: int) -> list[int]:
        """Indices of the samples of step 0, 1, ..."""
        epoch, place = self._place(step)
        stream = int(self._turns(epoch)[place])
        first = self.batches_before(step)[stream] * self.batch_size
        size = self.streams[stream].num_per_epoch
        places = [divmod(position, size) for position in range(first, first + self.batch_size)]
        return [int(self._epoch(stream, epoch)[place]) for epoch, place in places]

    def num_steps(self, epochs: float) -> int:
        """Whole batches of every stream in so many epochs, at least one."""
        return max(1, sum(int(epochs * stream.num_per_epoch) // self.batch_size for stream in self.streams))

    def num_dropped(self, epochs: float) -> dict[str, int]:
        """stream -> readings of these epochs that fill no batch any more before the run ends."""
        done = self.batches_before(self.num_steps(epochs))
        rest = [int(epochs * s.num_per_epoch) - n * self.batch_size for s, n in zip(self.streams, done, strict=True)]
        return {stream.name or "all": max(0, count) for stream, count in zip(self.streams, rest, strict=True)}

    def batches_before(self, step: int) -> list[int]:
        """How many batches each stream has given before this step."""
        epoch, place = self._place(step)
        turns = self._turns(epoch)[:place]
        return [self._num_whole(i, epoch) + int((turns == i).sum()) for i in range(len(self.streams))]

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch in which a step's batch ends, and the batch's place among those."""
        epoch = step * self.batch_size // self.num_per_epoch  # or a later one: every stream ends its last batch in it
        while self._first_step(epoch + 1) <= step:
            epoch += 1
        return epoch, step - self._first_step(epoch)

    def _first_step(self, epoch: int) -> int:
        return sum(self._num_whole(stream, epoch) for stream in range(len(self.streams)))

    def _num_whole(self, stream: int, epoch: int) -> int:
        """Whole batches of a stream in the epochs before this one."""
        return epoch * self.streams[stream].num_per_epoch // self.batch_size

    def _read_epoch(self, stream: int, epoch: int) -> np.ndarray:
        return self.streams[stream].of_epoch(epoch, self.seed, self.digest)

    def _shuffle_turns(self, epoch: int) -> np.ndarray:
        """Which stream gives the first, second, ... batch of an epoch."""
        counts = [self._num_whole(i, epoch + 1) - self._num_whole(i, epoch) for i in range(len(self.streams))]
        turns = np.repeat(np.arange(len(counts)), counts)
        return turns[permutation(len(turns), "turns", self.seed, epoch, self.digest)]


def rank_shares(batch: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Every rank's contiguous part of a global batch."""
    size = share_size(batch, num_ranks)
    return [list(batch[rank * size : (rank + 1) * size]) for rank in range(num_ranks)]


def balanced_shares(batch: Sequence[int], lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Every rank's part of a global batch, so that ranks get equal counts and like sums of length.

    The longest first, each to the rank with the least work that has room, as princetonvisualai/merv.
    """
    size = share_size(batch, num_ranks)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    work = [0] * num_ranks
    for place in sorted(range(len(batch)), key=lambda place: (-lengths[place], place)):
        with_room = (number for number in range(num_ranks) if len(shares[number]) < size)
        least = min(with_room, key=lambda number: (work[number], number))
        shares[least].append(batch[place])
        work[least] += lengths[place]
    return shares


def share_size(batch: Sequence[int], num_ranks: int) -> int:
    """Samples of a global batch for each rank."""
    if len(batch) % num_ranks:
        raise UserError(f"batch_size {len(batch)} must be a multiple of the number of ranks, {num_ranks}")
    return len(batch) // num_ranks


def permutation(num_entries: int, *key: str | int) -> np.ndarray:
    """Numbers 0..num_entries-1 in an order that follows from the key.

    Philox's raw stream is fixed by its definition, unlike `Generator.permutation`, which numpy may change (NEP 19).
    """
    words = np.random.Philox(key=derive_seed(*key)).random_raw(num_entries)
    return np.argsort(words, kind="stable")


def derive_seed(*parts: str | int) -> int:
    """63 bits that depend on every part: one number per purpose, so that streams do not overlap."""
    return int.from_bytes(hashlib.sha256(canonical_json(list(parts)).encode()).digest()[:8], "big") >> 1

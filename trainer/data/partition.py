"""Micro-batches of a global batch under a token budget: a pure function of lengths, ranks and budget.

Samples are sorted by length and cut where the least costly cut lies, so that micro-batches hold samples of like length
and cost alike: the number of micro-batches is the smallest multiple of the ranks that the budget allows, and the most
costly one is as cheap as that number allows. The cost of a micro-batch is its positions with padding; attention, whose
cost grows with the square of the length, is a small part of an LLM's work at these lengths.

Every rank has as many micro-batches as the others: FSDP gathers weights in each of them. Where samples are too few,
some are empty, and the rank computes something that does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trainer.config import TrainConfig

Part = list[int]  # places of a micro-batch's samples in the global batch
Lengths = Sequence[int] | Mapping[int, int]  # by place


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What a micro-batch may hold: samples, or positions where there is a token budget."""

    samples: int
    tokens: int | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> Limit:
        return cls(samples=config.micro_batch_size, tokens=config.token_budget)

    def over(self, config: TrainConfig) -> TrainConfig:
        """The config with this limit."""
        return replace(config, micro_batch_size=self.samples, token_budget=self.tokens)

    def halved(self, longest: int) -> Limit | None:
        """Half of it; None where it is a sample already. `longest` is the length of the longest sample."""
        if self.tokens is None:
            return replace(self, samples=self.samples // 2) if self.samples > 1 else None
        return replace(self, tokens=max(self.tokens // 2, longest)) if self.tokens > longest else None

    def is_smaller_than(self, other: Limit) -> bool:
        """Whether it is of the same kind and less."""
        if self.tokens is None or other.tokens is None:
            return self.tokens is other.tokens and self.samples < other.samples
        return self.tokens < other.tokens

    def __str__(self) -> str:
        return f"micro_batch_size {self.samples}" if self.tokens is None else f"token_budget {self.tokens}"


def partition(lengths: Sequence[int], num_ranks: int, budget: int) -> list[list[Part]]:
    """The micro-batches of every rank: as many for each, the most costly first; empty ones only where samples lack.

    Micro-batches of the same number are of like cost, because FSDP's ranks wait for each other in each. Of those the
    most costly goes to the rank with the least work so far. A sample longer than the budget takes its place: the device
    has to hold it all the same.
    """
    budget = max(budget, *lengths)
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    ascending = [lengths[place] for place in order]
    num_parts = -(-len(_cut(ascending, budget)) // num_ranks) * num_ranks
    low, high = max(lengths), budget
    while low < high:  # the smallest limit that needs no more micro-batches
        middle = (low + high) // 2
        if len(_cut(ascending, middle)) <= num_parts:
            high = middle
        else:
            low = middle + 1
    sizes = _cut(ascending, high)
    parts, start = [], 0
    for size in sizes:
        parts.append(order[start : start + size])
        start += size
    _split(parts, lengths, num_parts)
    parts.sort(key=lambda part: (-cost(part, lengths), part))
    shares: list[list[Part]] = [[] for _ in range(num_ranks)]
    work = [0] * num_ranks
    for first in range(0, num_parts, num_ranks):
        by_work = sorted(range(num_ranks), key=lambda rank: (work[rank], rank))
        for rank, part in zip(by_work, parts[first : first + num_ranks], strict=True):
            shares[rank].append(part)
            work[rank] += cost(part, lengths)
    return shares


def cost(part: Sequence[int], lengths: Lengths) -> int:
    """Positions of a micro-batch, padding included."""
    return len(part) * max((lengths[place] for place in part), default=0)


def useful_share(shares: Sequence[Sequence[Part]], lengths: Lengths, *, is_sharded: bool) -> float:
    """Share of the ranks' time that is work on samples, where a position costs the same anywhere; the rest is padding
    and waiting.

    Ranks wait for each other at the end of a step, under FSDP (`is_sharded`) in every micro-batch.
    """
    costs = [[cost(part, lengths) for part in share] for share in shares]
    if is_sharded:
        longest = max(map(len, costs))
        step = sum(max(row[index] for row in costs if index < len(row)) for index in range(longest))
    else:
        step = max(map(sum, costs))
    real = sum(lengths[place] for share in shares for part in share for place in part)
    return real / (step * len(shares))


def padding_share(parts: Sequence[Part], lengths: Lengths) -> float:
    """Share of the positions of these micro-batches that are padding."""
    positions = sum(cost(part, lengths) for part in parts)
    return 1 - sum(lengths[place] for part in parts for place in part) / positions if positions else 0.0


def _cut(ascending: Sequence[int], limit: int) -> list[int]:
    """Numbers of samples of the micro-batches, each as many as the limit allows."""
    sizes = [0]
    for length in ascending:
        if sizes[-1] and (sizes[-1] + 1) * length > limit:
            sizes.append(0)
        sizes[-1] += 1
    return sizes


def _split(parts: list[Part], lengths: Lengths, num_parts: int) -> None:
    """Cut the most costly micro-batches in two until there are enough; single samples cannot be cut."""
    while len(parts) < num_parts and any(len(part) > 1 for part in parts):
        index = max((i for i, part in enumerate(parts) if len(part) > 1), key=lambda i: cost(parts[i], lengths))
        part = parts.pop(index)
        parts += [part[: len(part) // 2], part[len(part) // 2 :]]
    parts += [[] for _ in range(num_parts - len(parts))]

"""Statistics of an ablation: encoder importance, and intervals that cover videos and seeds. Pure numpy.

Suffixes: Q questions, V videos, S seeds, B bootstrap draws, K quantities (mean scores, or differences of them), N
encoders, M subsets of the encoders by bit mask: bit e of the mask is encoder e, mask 0 is the empty subset.

Videos are resampled with replacement, because questions about one video are not independent. Seeds are few, and a
resample of two or three of them hardly leaves the observed range, so their part of a draw is Student's t: deviations of
the seeds' means times normal multipliers, over a chi with S - 1 degrees of freedom. Videos and seeds are drawn
independently, and the same draw serves all quantities, so that differences are paired. Variance between seeds on one
video is in both parts: the intervals are conservative, never too short for that reason. With one seed they cover videos
only. Intervals are percentiles of the draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import factorial

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 10_000
LEVEL = 0.95  # of intervals
CHUNK = 256  # draws at once: 256 x 5,000 videos are 10 MB


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Estimates of K quantities, and what they could have been on other videos and with other seeds."""

    estimate_K: Floats
    draws_BK: Floats

    def interval(self) -> tuple[Floats, Floats]:
        """Percentile interval of every quantity."""
        return percentile_interval(self.draws_BK)


class Resampling:
    """Bootstrap draws over the videos of a fixed list of questions; the same ones in every call.

    Two objects with equal arguments make equal draws.
    """

    def __init__(self, video_Q: NDArray[np.integer], *, draws: int = DRAWS, seed: int = 0) -> None:
        if draws < 1 or not len(video_Q):
            raise ValueError(f"a bootstrap has at least one draw and one question, got {draws} and {len(video_Q)}")
        _, self._index_Q, self._count_V = np.unique(video_Q, return_inverse=True, return_counts=True)
        self._order_Q = np.argsort(self._index_Q, kind="stable")
        self._start_V = np.concatenate([[0], np.cumsum(self._count_V)[:-1]])
        self.num_videos, self.num_draws, self._seed = len(self._count_V), draws, seed
        self._weight_BV = self._draw_videos()

    def _draw_videos(self) -> NDArray[np.uint16]:
        """How often each video is in each draw; of V videos V - 1 are drawn, which makes the variance unbiased."""
        generator, size = np.random.default_rng([self._seed, 0]), self.num_videos
        weight_BV = np.ones((self.num_draws, size), np.uint16)
        if size > 1:
            for start in range(0, self.num_draws, CHUNK):
                rows = min(CHUNK, self.num_draws - start)
                drawn = generator.integers(0, size, (rows, size - 1)) + size * np.arange(rows)[:, None]
                weight_BV[start : start + rows] = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
        return weight_BV

    def _draw_seeds(self, num_seeds: int) -> Floats:
        """Multipliers [B, S] of the seeds' deviations: the sum is t-tailed, with the variance of a mean of S seeds."""
        if num_seeds < 2:
            return np.zeros((self.num_draws, num_seeds))
        generator = np.random.default_rng([self._seed, num_seeds])
        normal_BS = generator.standard_normal((self.num_draws, num_seeds))
        chi_B = np.sqrt(generator.chisquare(num_seeds - 1, self.num_draws) / (num_seeds - 1))
        return normal_BS / chi_B[:, None] / np.sqrt(num_seeds * (num_seeds - 1))

    def __call__(self, value_SKQ: Floats) -> Draws:
        """Means over seeds and questions of K values per question, and their draws.

        A difference is exact where it is taken per question: equal runs give draws of exactly 0.
        """
        num_seeds, _, num_questions = value_SKQ.shape
        sum_SKV = np.add.reduceat(value_SKQ[..., self._order_Q], self._start_V, axis=-1)
        sum_VK = sum_SKV.mean(axis=0).T
        draws_BK = np.empty((self.num_draws, value_SKQ.shape[1]))
        for start in range(0, self.num_draws, CHUNK):
            weight_BV = self._weight_BV[start : start + CHUNK].astype(np.float64)
            draws_BK[start : start + CHUNK] = (weight_BV @ sum_VK) / (weight_BV @ self._count_V)[:, None]
        mean_SK = sum_SKV.sum(axis=-1) / num_questions
        draws_BK += self._draw_seeds(num_seeds) @ (mean_SK - mean_SK.mean(axis=0))
        return Draws(estimate_K=mean_SK.mean(axis=0), draws_BK=draws_BK)

    def rank_correlations(self, one_KQ: Floats, other_Q: Floats) -> Draws:
        """Spearman's rho of K quantities with another one over the questions, and its draws.

        A draw repeats the questions of a video as often as the video, and ranks anew. The estimate is nan where a
        quantity is constant; a draw in which one is has no correlation to show, so it is 0.
        """
        ties_K, other = [_Ties(value_Q) for value_Q in one_KQ], _Ties(other_Q)
        draws_BK = np.empty((self.num_draws, len(ties_K)))
        for start in range(0, self.num_draws, CHUNK):
            weight_BQ = self._weight_BV[start : start + CHUNK, self._index_Q].astype(np.float64)
            draws_BK[start : start + CHUNK] = _rank_correlations(ties_K, other, weight_BQ)
        estimate_1K = _rank_correlations(ties_K, other, np.ones((1, len(other_Q))))
        return Draws(estimate_K=estimate_1K[0], draws_BK=np.nan_to_num(draws_BK))


class _Ties:
    """Values by their order, for ranks where each occurs a number of times."""

    def __init__(self, value_Q: Floats) -> None:
        self._order_Q = np.argsort(value_Q, kind="stable")
        _, self._start_G, self._group_Q = np.unique(value_Q[self._order_Q], return_index=True, return_inverse=True)

    def ranks(self, weight_BQ: Floats) -> Floats:
        """[B, Q]: ranks where value q occurs weight_BQ[b, q] times; equal ones share their mean rank."""
        count_BG = np.add.reduceat(weight_BQ[:, self._order_Q], self._start_G, axis=1)
        middle_BG = np.cumsum(count_BG, axis=1) - (count_BG - 1) / 2
        rank_BQ = np.empty_like(weight_BQ)
        rank_BQ[:, self._order_Q] = middle_BG[:, self._group_Q]
        return rank_BQ


def mean_ranks(value_Q: Floats) -> Floats:
    """Ranks from 1; equal values share their mean rank."""
    return _Ties(value_Q).ranks(np.ones((1, len(value_Q))))[0]


def _rank_correlations(ties_K: Sequence[_Ties], other: _Ties, weight_BQ: Floats) -> Floats:
    """[B, K]: Pearson's correlation of ranks, each question counted so often; nan where a quantity is constant."""

    def centred(ties: _Ties) -> Floats:
        rank_BQ = ties.ranks(weight_BQ)
        return rank_BQ - (weight_BQ * rank_BQ).sum(axis=1, keepdims=True) / weight_BQ.sum(axis=1, keepdims=True)

    other_BQ, found = centred(other), []
    square_B = (weight_BQ * other_BQ**2).sum(axis=1)
    for ties in ties_K:
        rank_BQ = centred(ties)
        product_B = (weight_BQ * rank_BQ * other_BQ).sum(axis=1)
        found.append(_ratio(product_B, (weight_BQ * rank_BQ**2).sum(axis=1), square_B))
    return np.stack(found, axis=1)


def percentile_interval(draws_BK: Floats, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Lower and upper end along the first axis, unbiased also for few draws."""
    low, high = np.quantile(draws_BK, [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")
    return low, high


def two_sided_p(difference_BK: Floats) -> Floats:
    """p of "the difference is 0": twice the smaller share of draws on either side of 0, and of 0 itself.

    The observed value counts as one more draw, so that p is never 0. Draws of exactly 0 give 1.
    """
    sides = np.minimum((difference_BK <= 0).sum(axis=0), (difference_BK >= 0).sum(axis=0))
    return np.minimum(1.0, 2 * (1 + sides) / (1 + len(difference_BK)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of the p values of one family (Holm 1979)."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def shapley_values(value_M: Floats) -> Floats:
    """Shapley value of every encoder from the scores of all 2^N subsets along the last axis.

    phi_e = sum over S without e of |S|! (N - |S| - 1)! / N! (v(S + e) - v(S)), Shapley 1953. Their sum is
    v(all) - v(empty).
    """
    pairs = _marginals(_num_encoders(value_M))
    return np.stack([(value_M[..., on] - value_M[..., off]) @ weight for on, off, weight in pairs], axis=-1)


@cache
def _marginals(n: int) -> tuple[tuple[NDArray[np.intp], NDArray[np.intp], Floats], ...]:
    """Of every encoder: masks with it, the same masks without it, and their weights."""
    found = []
    for encoder in range(n):
        off = np.array([mask for mask in range(1 << n) if not mask >> encoder & 1])
        sizes = [int(mask).bit_count() for mask in off]
        weight = np.array([factorial(size) * factorial(n - size - 1) / factorial(n) for size in sizes])
        found.append((off | 1 << encoder, off, weight))
    return tuple(found)


def pairs_of(n: int) -> list[tuple[int, int]]:
    """Pairs of encoders in the order of `interactions`."""
    return list(combinations(range(n), 2))


def interactions(value_M: Floats) -> Floats:
    """Shapley interaction index of every pair of encoders from the scores of all 2^N subsets along the last axis.

    I_ij = sum over S without i and j of |S|! (N - |S| - 2)! / (N - 1)! (v(S + ij) - v(S + i) - v(S + j) + v(S)),
    Grabisch and Roubens 1999. Positive: the two are worth more together; negative: they replace each other.
    """
    n, found = _num_encoders(value_M), []
    for i, j in pairs_of(n):
        off = np.array([mask for mask in range(1 << n) if not mask >> i & 1 and not mask >> j & 1])
        sizes = [int(mask).bit_count() for mask in off]
        weight = np.array([factorial(size) * factorial(n - size - 2) / factorial(n - 1) for size in sizes])
        one, other = 1 << i, 1 << j
        second = (value_M[..., off | one | other] - value_M[..., off | one]) - (
            value_M[..., off | other] - value_M[..., off]
        )
        found.append(second @ weight)
    return np.stack(found, axis=-1) if found else np.zeros((*value_M.shape[:-1], 0))


def _num_encoders(value_M: Floats) -> int:
    n = value_M.shape[-1].bit_length() - 1
    if value_M.shape[-1] != 1 << n:
        raise ValueError(f"a game has a value for each of 2^N subsets, got {value_M.shape[-1]}")
    return n


def utilisation(all_: Draws, drop: Draws) -> Draws:
    """Conditional Utilisation Rate of every encoder: (all - without) / all, arXiv 2507.03262.

    `all_` has one quantity, `drop` the difference all - without of every encoder. The draws are linear around the
    estimate (delta method), so that a draw of `all_` near 0 has no infinite rate.
    """
    whole = float(all_.estimate_K[0])
    rate_N = drop.estimate_K / whole
    deviation_BN = (drop.draws_BK - drop.estimate_K) - rate_N * (all_.draws_BK - whole)
    return Draws(estimate_K=rate_N, draws_BK=rate_N + deviation_BN / whole)


@dataclass(frozen=True, kw_only=True)
class InformationGap:
    """Largest minus smallest Conditional Utilisation Rate, and what it would be if all rates were equal."""

    value: float
    low: float
    high: float
    null_mean: float  # expected gap of equal rates: the upward bias of a maximum minus a minimum
    null_high: float  # exceeded by equal rates with probability 1 - LEVEL
    p: float


def information_gap(rate: Draws, level: float = LEVEL) -> InformationGap:
    """Information Gap (arXiv 2507.03262) with an interval that the bias of max - min does not shift.

    The null is the range of the draws around their estimates: equal rates with the same errors. Its quantile q bounds
    the error of all pairwise differences at once (as Tukey's range does), and the gap is one of them: gap - q, not
    below 0, to gap + q covers with at least `level`. It excludes 0 exactly where the null is rejected at 1 - level.
    """
    value = float(np.ptp(rate.estimate_K))
    null_B = np.ptp(rate.draws_BK - rate.estimate_K, axis=1)
    q = float(np.quantile(null_B, level, method="weibull"))
    return InformationGap(
        value=value,
        low=max(0.0, value - q),
        high=value + q,
        null_mean=float(null_B.mean()),
        null_high=q,
        p=float((1 + (null_B >= value).sum()) / (1 + len(null_B))),
    )


def _signs(value_K: Floats) -> NDArray[np.int8]:
    """[..., K, K]: 1 where the first is larger, -1 where the second is."""
    return np.sign(value_K[..., :, None] - value_K[..., None, :]).astype(np.int8)


def spearman(one_K: Floats, other_K: Floats) -> Floats:
    """Spearman's rho along the last axis, ties at their mean rank; nan where either is constant."""
    rank, other = (_signs(value).sum(axis=-1, dtype=np.float64) for value in (one_K, other_K))  # 2 rank - K - 1
    return _ratio((rank * other).sum(axis=-1), (rank**2).sum(axis=-1), (other**2).sum(axis=-1))


def kendall(one_K: Floats, other_K: Floats) -> Floats:
    """Kendall's tau-b along the last axis; nan where either is constant."""
    sign, other = (_signs(value).astype(np.float64) for value in (one_K, other_K))
    axes = (-2, -1)
    return _ratio((sign * other).sum(axis=axes), (sign**2).sum(axis=axes), (other**2).sum(axis=axes))


def _ratio(product: Floats, square: Floats, other: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return product / np.sqrt(square * other)


Correlation = Callable[[Floats, Floats], Floats]


def mean_correlation(
    one_SK: Floats, other_SK: Floats, pairs: Sequence[tuple[int, int]], correlation: Correlation
) -> Floats:
    """Mean over pairs of a seed of `one` and a seed of `other`, [..., S, K] to [...].

    Of two seeds of one method it is the ceiling of what another method can reach, whose seeds differ likewise.
    """
    return np.mean([correlation(one_SK[..., a, :], other_SK[..., b, :]) for a, b in pairs], axis=0)


def pareto_set(cost_K: Sequence[float], value_K: Sequence[float]) -> list[bool]:
    """Whether nothing is at least as good at no more cost and better in one of the two."""
    points = list(zip(cost_K, value_K, strict=True))
    return [not any(c <= cost and v >= value and (c < cost or v > value) for c, v in points) for cost, value in points]

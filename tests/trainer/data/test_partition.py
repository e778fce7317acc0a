from functools import cache
from itertools import pairwise
from math import ceil, inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import rank_shares
from trainer.data.partition import Limit, cost, padding_share, partition, useful_share

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=12)
RANKS, BUDGETS = st.integers(1, 4), st.integers(1, 200)


def least_cost(lengths, num_parts):
    """Of the most costly of so many parts of the sorted lengths, by trying every cut."""
    ascending = sorted(lengths)

    @cache
    def least(start, parts):
        if start == len(ascending):
            return 0
        if parts == 0:
            return inf
        ends = range(start + 1, len(ascending) + 1)
        return min(max((end - start) * ascending[end - 1], least(end, parts - 1)) for end in ends)

    return least(0, num_parts)


def fewest_parts(lengths, budget):
    limit = max(budget, *lengths)
    return next(count for count in range(1, len(lengths) + 1) if least_cost(lengths, count) <= limit)


@given(lengths=LENGTHS, num_ranks=RANKS, budget=BUDGETS)
def test_every_sample_is_in_one_micro_batch_of_one_rank(lengths, num_ranks, budget):
    shares = partition(lengths, num_ranks, budget)
    assert sorted(place for share in shares for part in share for place in part) == list(range(len(lengths)))
    assert shares == partition(lengths, num_ranks, budget)


@given(lengths=LENGTHS, num_ranks=RANKS, budget=BUDGETS)
def test_ranks_have_as_many_micro_batches_and_no_more_than_the_budget_needs(lengths, num_ranks, budget):
    shares = partition(lengths, num_ranks, budget)
    assert len(shares) == num_ranks
    assert {len(share) for share in shares} == {ceil(fewest_parts(lengths, budget) / num_ranks)}


@given(lengths=LENGTHS, num_ranks=RANKS, budget=BUDGETS)
def test_no_micro_batch_is_over_the_budget_or_the_longest_sample(lengths, num_ranks, budget):
    parts = [part for share in partition(lengths, num_ranks, budget) for part in share]
    assert all(cost(part, lengths) <= max(budget, *lengths) for part in parts)
    # one is empty only where every other is a sample
    assert all(parts) or {len(part) for part in parts} == {0, 1}


@given(lengths=LENGTHS, num_ranks=RANKS, budget=BUDGETS)
def test_the_most_costly_micro_batch_is_as_cheap_as_their_number_allows(lengths, num_ranks, budget):
    shares = partition(lengths, num_ranks, budget)
    found = max(cost(part, lengths) for share in shares for part in share)
    assert found == least_cost(lengths, sum(map(len, shares)))


@given(lengths=LENGTHS, num_ranks=RANKS, budget=BUDGETS)
def test_micro_batches_of_one_number_cost_alike_and_work_is_shared(lengths, num_ranks, budget):
    shares = partition(lengths, num_ranks, budget)
    rows = [[cost(part, lengths) for part in row] for row in zip(*shares, strict=True)]
    for row, following in pairwise(rows):
        assert min(row) >= max(following)
    work = [sum(cost(part, lengths) for part in share) for share in shares]
    assert max(work) - min(work) <= max(rows[0])


@given(lengths=LENGTHS, num_ranks=RANKS, budget=BUDGETS, order=st.randoms())
def test_the_order_of_the_batch_does_not_matter(lengths, num_ranks, budget, order):
    def as_lengths(found):
        shares = partition(found, num_ranks, budget)
        return sorted(sorted(sorted(found[place] for place in part) for part in share) for share in shares)

    shuffled = list(lengths)
    order.shuffle(shuffled)
    assert as_lengths(shuffled) == as_lengths(lengths)


def test_shares_by_hand():
    shares, lengths = [[[0, 1], [2]], [[3], [4]]], [2, 4, 5, 1, 3]  # positions: 8 and 5, 1 and 3
    assert padding_share([part for share in shares for part in share], lengths) == pytest.approx(2 / 17)
    assert useful_share(shares, lengths, is_sharded=False) == pytest.approx(15 / (2 * 13))
    assert useful_share(shares, lengths, is_sharded=True) == pytest.approx(15 / (2 * (8 + 5)))
    paired = [[[0, 1], [3]], [[2], [4]]]
    assert useful_share(paired, lengths, is_sharded=True) == pytest.approx(15 / (2 * (8 + 3)))


@pytest.mark.parametrize(("is_sharded", "least"), [(False, 0.95), (True, 0.93)])
def test_most_of_the_time_of_eight_ranks_is_work_on_instructions_of_usual_lengths(is_sharded, least):
    random = np.random.default_rng(0)
    before, after = [], []
    for _ in range(20):
        lengths = (1024 + random.lognormal(5.35, 0.75, 128).clip(20, 2048).astype(int)).tolist()
        old = [sorted(share, key=lengths.__getitem__) for share in rank_shares(range(128), 8)]
        before.append(useful_share([[s[:8], s[8:]] for s in old], lengths, is_sharded=is_sharded))
        after.append(useful_share(partition(lengths, 8, 11_000), lengths, is_sharded=is_sharded))
    assert np.mean(before) < 0.75
    assert np.mean(after) > least


def test_a_limit_is_halved_down_to_the_longest_sample():
    assert Limit(samples=5).halved(9) == Limit(samples=2)
    assert Limit(samples=1).halved(9) is None
    budget = Limit(samples=8, tokens=30)
    assert (budget.halved(9), budget.halved(20)) == (Limit(samples=8, tokens=15), Limit(samples=8, tokens=20))
    assert budget.halved(30) is None
    assert (str(Limit(samples=5)), str(budget)) == ("micro_batch_size 5", "token_budget 30")
    assert budget.halved(9).is_smaller_than(budget)
    assert not budget.is_smaller_than(Limit(samples=9))

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore.errors import UserError
from trainer.order import Order, permutation, rank_share

SIZES = st.integers(1, 60)
SEEDS = st.integers(0, 2**31)


@given(num_samples=SIZES, batch_size=st.integers(1, 20), seed=SEEDS, epochs=st.integers(1, 3))
def test_every_sample_is_read_once_per_epoch(num_samples, batch_size, seed, epochs):
    order = Order(num_samples=num_samples, batch_size=batch_size, seed=seed, digest="d")
    total = epochs * num_samples
    read = [index for step in range(-(-total // batch_size)) for index in order.batch(step)][:total]
    for epoch in range(epochs):
        assert sorted(read[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@given(num_samples=SIZES, seed=SEEDS, step=st.integers(0, 50), batch_size=st.integers(1, 20))
def test_a_step_needs_no_step_before_it(num_samples, seed, step, batch_size):
    order = Order(num_samples=num_samples, batch_size=batch_size, seed=seed, digest="d")
    in_turn = [order.batch(each) for each in range(step + 1)][step]
    permutation.cache_clear()
    assert order.batch(step) == in_turn


@given(num_ranks=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 30), seed=SEEDS)
def test_ranks_share_the_same_global_batch_without_overlap(num_ranks, step, seed):
    batch = Order(num_samples=31, batch_size=12, seed=seed, digest="d").batch(step)
    assert [i for rank in range(num_ranks) for i in rank_share(batch, rank, num_ranks)] == batch


@given(seed=SEEDS, epoch=st.integers(0, 1000))
def test_a_permutation_is_one(seed, epoch):
    assert Counter(permutation(40, seed, epoch, "d").tolist()) == Counter(range(40))


def test_seed_epoch_and_data_each_change_the_order():
    orders = [permutation(50, *key).tolist() for key in [(1, 0, "a"), (2, 0, "a"), (1, 1, "a"), (1, 0, "b")]]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_the_same_on_every_machine():
    assert permutation(8, 7, 0, "data").tolist() == [1, 7, 0, 4, 6, 2, 5, 3]


def test_steps_are_whole_batches_and_at_least_one():
    order = Order(num_samples=10, batch_size=4, seed=0, digest="d")
    assert [order.num_steps(epochs) for epochs in (0.1, 1, 2, 2.5)] == [1, 2, 5, 6]


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(UserError, match="batch_size 4 must be a multiple of the number of ranks, 3"):
        rank_share([1, 2, 3, 4], 0, 3)

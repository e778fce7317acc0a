from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mervcache.errors import UserError
from trainer.data.order import Group, Order, Stream, balanced_shares, permutation, rank_shares

SIZES = st.integers(1, 60)
SEEDS = st.integers(0, 2**31)


def stream(first, size, *, weight=1.0, name=""):
    return Stream(name=name, groups=(Group(indices=np.arange(first, first + size), weight=weight),))


def one_stream(*, num_samples, batch_size, seed=0, digest="d"):
    return Order([stream(0, num_samples)], batch_size=batch_size, seed=seed, digest=digest)


def two_streams(*, num_visual, num_text, batch_size, seed=0):
    """Indices below `num_visual` are visual."""
    streams = [stream(0, num_visual, name="visual"), stream(num_visual, num_text, name="text")]
    return Order(streams, batch_size=batch_size, seed=seed, digest="d")


def read(order, num_steps):
    return [index for step in range(num_steps) for index in order.batch(step)]


@given(num_samples=SIZES, batch_size=st.integers(1, 20), seed=SEEDS, epochs=st.integers(1, 3))
def test_every_sample_is_read_once_per_epoch(num_samples, batch_size, seed, epochs):
    order = one_stream(num_samples=num_samples, batch_size=batch_size, seed=seed)
    total = epochs * num_samples
    indices = read(order, -(-total // batch_size))[:total]
    for epoch in range(epochs):
        assert sorted(indices[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@given(
    num_visual=st.integers(0, 40), num_text=st.integers(1, 40), batch_size=st.integers(1, 16), seed=SEEDS,
    epochs=st.integers(1, 3),
)  # fmt: skip
def test_split_batches_are_whole_of_one_modality_and_lose_and_repeat_nothing(
    num_visual, num_text, batch_size, seed, epochs
):
    order = two_streams(num_visual=num_visual, num_text=num_text, batch_size=batch_size, seed=seed)
    num_steps = sum(epochs * size // batch_size for size in (num_visual, num_text))
    assert order.num_steps(epochs) == max(1, num_steps)
    counts = Counter()
    for step in range(num_steps):
        batch = order.batch(step)
        assert len(batch) == batch_size
        assert len({index < num_visual for index in batch}) == 1
        counts.update(batch)
    # What is unread after these epochs is less than a batch of each modality, and is counted.
    num_dropped = {"visual": epochs * num_visual % batch_size, "text": epochs * num_text % batch_size}
    if num_steps:
        assert order.num_dropped(epochs) == {name: num_dropped[name] for name in [s.name for s in order.streams]}
    for name, indices in {"visual": range(num_visual), "text": range(num_visual, num_visual + num_text)}.items():
        readings = [counts[index] for index in indices]
        assert max(readings, default=0) <= epochs
        assert max(readings, default=0) - min(readings, default=0) <= 1
        assert epochs * len(readings) - sum(readings) == num_dropped[name]


@given(
    num_visual=st.integers(0, 30), num_text=st.integers(1, 30), seed=SEEDS, step=st.integers(0, 40),
    batch_size=st.integers(1, 12),
)  # fmt: skip
def test_a_step_needs_no_step_before_it(num_visual, num_text, seed, step, batch_size):
    sizes = {"num_visual": num_visual, "num_text": num_text, "batch_size": batch_size, "seed": seed}
    walked = two_streams(**sizes)
    in_turn = [walked.batch(each) for each in range(step + 1)][step]
    assert two_streams(**sizes).batch(step) == in_turn


@given(num_ranks=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 30), seed=SEEDS)
def test_ranks_share_the_same_global_batch_without_overlap(num_ranks, step, seed):
    batch = one_stream(num_samples=31, batch_size=12, seed=seed).batch(step)
    assert [index for share in rank_shares(batch, num_ranks) for index in share] == batch


@given(lengths=st.lists(st.integers(1, 500), min_size=12, max_size=12), num_ranks=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_balanced_ranks_share_the_batch_in_equal_counts(lengths, num_ranks):
    batch = list(range(100, 112))
    shares = balanced_shares(batch, lengths, num_ranks)
    assert sorted(index for share in shares for index in share) == batch
    assert {len(share) for share in shares} == {12 // num_ranks}


def test_the_longest_goes_to_the_rank_with_the_least_work_that_has_room():
    lengths = [9, 1, 2, 1, 1, 1]  # 10 to rank 0; 12, 11 and 13 to rank 1, which is full; the rest to rank 0
    shares = balanced_shares([10, 11, 12, 13, 14, 15], lengths, 2)
    assert shares == [[10, 14, 15], [12, 11, 13]]


def test_batches_of_both_modalities_come_mixed_and_in_another_order_each_epoch():
    order = two_streams(num_visual=60, num_text=60, batch_size=6)
    turns = [[order.batch(step)[0] < 60 for step in range(first, first + 20)] for first in (0, 20)]
    assert sum(turns[0]) == sum(turns[1]) == 10
    assert turns[0] != turns[1]
    assert len(set(turns[0][:10])) == 2


@given(size=st.integers(1, 40), weight=st.sampled_from([0.1, 0.5, 0.75, 1.0, 1.5, 2.0, 2.25]), seed=SEEDS)
def test_a_weight_is_the_number_of_readings_per_epoch(size, weight, seed):
    group = Group(indices=np.arange(size), weight=weight)
    epochs = [Counter(group.of_epoch(epoch, seed, "d").tolist()) for epoch in range(8)]
    for counts in epochs:
        assert counts.total() == group.num_per_epoch
        assert all(int(weight) <= counts[index] <= int(weight) + 1 for index in range(size))
    readings = sum(epochs, Counter())
    assert max(readings.values()) - min(readings[index] for index in range(size)) <= 1


def test_half_of_a_source_is_another_half_in_the_next_epoch():
    group = Group(indices=np.arange(10), weight=0.5)
    first, second = (set(group.of_epoch(epoch, 7, "d").tolist()) for epoch in (0, 1))
    assert len(first) == len(second) == 5
    assert not first & second
    assert set(Group(indices=np.arange(10), weight=0.5).of_epoch(0, 8, "d").tolist()) != first


def test_epochs_are_as_long_as_the_weights_say():
    groups = (
        Group(indices=np.arange(10), weight=0.5, name="a"),
        Group(indices=np.arange(10, 20)),
        Group(indices=np.arange(20, 24), weight=1.5, name="b"),
    )
    order = Order([Stream(groups=groups)], batch_size=7, seed=0, digest="d")
    assert order.num_per_epoch == 5 + 10 + 6
    counts = Counter(read(order, 3))
    assert [sum(counts[i] for i in part) for part in (range(10), range(10, 20), range(20, 24))] == [5, 10, 6]
    assert (order.num_steps(1), order.num_steps(2.5), order.num_dropped(2.5)) == (3, 7, {"all": 3})


@given(seed=SEEDS, epoch=st.integers(0, 1000))
def test_a_permutation_is_one(seed, epoch):
    assert Counter(permutation(40, "order", seed, epoch, "d").tolist()) == Counter(range(40))


def test_seed_epoch_and_data_each_change_the_order():
    orders = [permutation(50, "order", *key).tolist() for key in [(1, 0, "a"), (2, 0, "a"), (1, 1, "a"), (1, 0, "b")]]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_the_same_on_every_machine():
    assert permutation(8, "order", 7, 0, "data").tolist() == [1, 7, 0, 4, 6, 2, 5, 3]
    assert one_stream(num_samples=8, batch_size=8, seed=7, digest="data").batch(0) == [1, 7, 0, 4, 6, 2, 5, 3]


def test_steps_are_whole_batches_and_at_least_one():
    order = one_stream(num_samples=10, batch_size=4)
    assert [order.num_steps(epochs) for epochs in (0.1, 1, 2, 2.5)] == [1, 2, 5, 6]
    assert [order.num_dropped(epochs) for epochs in (0.1, 1, 2, 2.5)] == [
        {"all": 0},
        {"all": 2},
        {"all": 0},
        {"all": 1},
    ]


def test_a_batch_that_ranks_cannot_share_is_refused():
    for share in (lambda: rank_shares([1, 2, 3, 4], 3), lambda: balanced_shares([1, 2, 3, 4], [1] * 4, 3)):
        with pytest.raises(UserError, match="batch_size 4 must be a multiple of the number of ranks, 3"):
            share()


def test_nothing_to_order_is_an_error():
    with pytest.raises(UserError, match="nothing to order: 0 samples in batches of 4"):
        one_stream(num_samples=0, batch_size=4)

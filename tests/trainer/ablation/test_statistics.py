"""Statistics against hand arithmetic, and intervals against known truth."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.ablation.statistics import (
    Draws,
    Resampling,
    holm,
    information_gap,
    interactions,
    kendall,
    mean_correlation,
    mean_ranks,
    pairs_of,
    pareto_set,
    percentile_interval,
    shapley_values,
    spearman,
    two_sided_p,
    utilisation,
)

# By mask {}, a, b, ab, c, ac, bc, abc. Orders of arrival and what each adds, by hand:
#   abc: a .2 b .1 c .2    acb: a .2 c .2 b .1    bac: b .0 a .3 c .2
#   bca: b .0 c .4 a .1    cab: c .3 a .1 b .1    cba: c .3 b .1 a .1
GAME = np.array([0.2, 0.4, 0.2, 0.5, 0.5, 0.6, 0.6, 0.7])


def test_shapley_values_are_the_mean_contribution_over_all_orders():
    expected = [1.0 / 6, 0.4 / 6, 1.6 / 6]  # a: .2+.2+.3+.1+.1+.1, b: .1+.1+0+0+.1+.1, c: .2+.2+.2+.4+.3+.3
    np.testing.assert_allclose(shapley_values(GAME), expected, rtol=1e-12)
    assert shapley_values(GAME).sum() == pytest.approx(0.7 - 0.2)


def test_shapley_values_need_the_empty_subset():
    moved = GAME.copy()
    moved[0] = 0.0  # every encoder that arrives first adds 0.2 more, a third of the orders
    np.testing.assert_allclose(shapley_values(moved) - shapley_values(GAME), [0.2 / 3] * 3)


def test_interactions_by_hand():
    # ab: without c .5-.4-.2+.2 = .1, with c .7-.6-.6+.5 = 0: mean .05
    # ac: without b .6-.4-.5+.2 = -.1, with b .7-.5-.6+.2 = -.2: mean -.15
    # bc: without a .6-.2-.5+.2 = .1, with a .7-.5-.6+.4 = 0: mean .05
    assert pairs_of(3) == [(0, 1), (0, 2), (1, 2)]
    np.testing.assert_allclose(interactions(GAME), [0.05, -0.15, 0.05], atol=1e-12)


def test_of_two_encoders_the_interaction_is_the_plain_second_difference():
    np.testing.assert_allclose(interactions(np.array([0.25, 0.5, 0.5, 0.5])), [-0.25])
    assert interactions(np.array([0.25, 0.5])).shape == (0,)


def test_shapley_values_and_interactions_of_four_encoders_that_add_up():
    worth = np.array([0.1, 0.02, 0.3, 0.05])
    value_M = np.array([0.2 + sum(worth[e] for e in range(4) if mask >> e & 1) for mask in range(16)])
    np.testing.assert_allclose(shapley_values(value_M), worth)
    np.testing.assert_allclose(interactions(value_M), np.zeros(6), atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_encoders_that_are_worth_something_together_only(size):
    """A unanimity game of `size` of 4 encoders: each gets 1/size, each pair of them 1/(size - 1), all others 0."""
    needed = (1 << size) - 1
    value_M = np.array([float(mask & needed == needed) for mask in range(16)])
    np.testing.assert_allclose(shapley_values(value_M), [1 / size] * size + [0] * (4 - size), atol=1e-12)
    expected = [1 / (size - 1) if j < size else 0 for i, j in pairs_of(4)]
    np.testing.assert_allclose(interactions(value_M), expected, atol=1e-12)


def test_a_game_without_all_subsets_is_refused():
    with pytest.raises(ValueError, match="2\\^N subsets, got 7"):
        shapley_values(GAME[:7])


def point(*values):
    return Draws(estimate_K=np.array(values), draws_BK=np.tile(values, (9, 1)))


def test_utilisation_and_its_gap_by_hand():
    rate = utilisation(point(0.8), point(0.2, 0.4, 0.0, -0.08))  # without: .6, .4, .8, .88
    np.testing.assert_allclose(rate.estimate_K, [0.25, 0.5, 0.0, -0.1])
    gap = information_gap(rate)
    assert gap.value == pytest.approx(0.6)  # .5 - -.1
    assert (gap.low, gap.high, gap.null_mean) == pytest.approx((0.6, 0.6, 0.0))  # draws without any error


def test_the_gap_of_equal_encoders_is_biased_upward_and_its_interval_knows():
    random = np.random.default_rng(5)
    covered, above, num_trials = 0, 0.0, 200
    for _ in range(num_trials):
        estimate = 0.1 + 0.02 * random.standard_normal(4)
        rate = Draws(estimate_K=estimate, draws_BK=estimate + 0.02 * random.standard_normal((1000, 4)))
        gap = information_gap(rate)
        covered += gap.low == 0.0
        above += gap.value / num_trials
        assert (gap.low == 0.0) == (gap.p > 0.05) or abs(gap.p - 0.05) < 0.005
    assert above > 0.03  # of a truth of 0; the range of four normal errors is 2.06 of them
    assert gap.null_mean == pytest.approx(2.06 * 0.02, rel=0.06)
    assert covered >= 0.92 * num_trials


def test_a_large_gap_is_told_from_the_null():
    random = np.random.default_rng(6)
    estimate = np.array([0.0, 0.5, 0.1, 0.1])
    gap = information_gap(Draws(estimate_K=estimate, draws_BK=estimate + 0.02 * random.standard_normal((999, 4))))
    assert gap.p == pytest.approx(1 / 1000)
    assert 0.4 < gap.low < 0.5 < gap.high < 0.6


def test_holm_by_hand():
    # sorted .01 .02 .03 .04: times 4 3 2 1 = .04 .06 .06 .04, then never below an earlier one
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_is_twice_the_smaller_side_with_the_observation_counted():
    difference_BK = np.array([[1.0, 0.0, -1.0]] * 18 + [[-1.0, 0.0, -1.0]])
    np.testing.assert_allclose(two_sided_p(difference_BK), [2 * 2 / 20, 1.0, 2 / 20])


def test_rank_correlations_by_hand():
    one, other = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert spearman(one, other) == pytest.approx(1 - 6 * 2 / (4 * 15))  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert kendall(one, other) == pytest.approx((5 - 1) / 6)
    assert spearman(one, -one) == kendall(one, -one) == -1


def test_rank_correlations_with_ties_by_hand():
    one, other = np.array([1.0, 1.0, 2.0, 3.0]), np.array([1.0, 2.0, 2.0, 3.0])
    # Pearson of ranks 1.5 1.5 3 4 and 1 2.5 2.5 4. Deviations -1 -1 .5 1.5 and -1.5 0 0 1.5: products 1.5 + 2.25,
    # squares 4.5 and 4.5.
    assert spearman(one, other) == pytest.approx(3.75 / 4.5)
    # pairs: 4 agree, 0 disagree, one is tied in each: 4 / sqrt(5 * 5)
    assert kendall(one, other) == pytest.approx(4 / 5)
    assert np.isnan(spearman(one, np.ones(4)))
    assert np.isnan(kendall(np.ones(4), other))


def test_correlations_are_averaged_over_pairs_of_seeds():
    value_SK = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    assert mean_correlation(value_SK, value_SK, [(0, 1), (0, 2), (1, 2)], spearman) == pytest.approx((1 - 1 - 1) / 3)
    assert mean_correlation(value_SK[:1], value_SK, [(0, 1), (0, 2)], kendall) == 0
    draws_BSK = np.stack([value_SK, -value_SK])
    np.testing.assert_allclose(mean_correlation(draws_BSK, value_SK, [(0, 1)], spearman), [1, -1])


def test_the_pareto_set():
    assert pareto_set([1, 4, 16, 64, 64], [0.5, 0.6, 0.6, 0.7, 0.65]) == [True, True, False, True, False]
    assert pareto_set([1, 1], [0.5, 0.5]) == [True, True]  # equal points do not beat each other


def test_equal_runs_differ_by_exactly_zero_in_every_draw():
    random = np.random.default_rng(0)
    value_SKQ = random.random((3, 1, 100))
    draws = Resampling(np.arange(100) // 3, draws=500)(value_SKQ - value_SKQ.copy())
    assert not draws.estimate_K.any()
    assert not draws.draws_BK.any()
    assert two_sided_p(draws.draws_BK) == 1.0


def test_estimates_are_plain_means_and_draws_repeat():
    random = np.random.default_rng(1)
    value_SKQ, video_Q = random.random((2, 3, 40)), random.integers(0, 9, 40)
    one, other = (Resampling(video_Q, draws=300, seed=4)(value_SKQ) for _ in range(2))
    np.testing.assert_allclose(one.estimate_K, value_SKQ.mean(axis=(0, 2)))
    np.testing.assert_array_equal(one.draws_BK, other.draws_BK)
    assert (one.draws_BK != Resampling(video_Q, draws=300, seed=5)(value_SKQ).draws_BK).any()


def test_the_order_of_questions_does_not_matter():
    random = np.random.default_rng(3)
    value_SKQ, video_Q, order = random.random((2, 1, 60)), np.arange(60) // 4, random.permutation(60)
    sorted_ = Resampling(video_Q, draws=300)(value_SKQ)
    shuffled = Resampling(video_Q[order], draws=300)(value_SKQ[..., order])
    np.testing.assert_allclose(shuffled.draws_BK, sorted_.draws_BK)


def test_questions_about_one_video_count_once():
    """Ten copies of a question add no information: the interval is that of the question once."""
    value_Q = np.random.default_rng(2).random(30)
    once = Resampling(np.arange(30), draws=2000)(value_Q[None, None])
    often = Resampling(np.repeat(np.arange(30), 10), draws=2000)(np.repeat(value_Q, 10)[None, None])
    np.testing.assert_allclose(once.draws_BK, often.draws_BK)
    apart = Resampling(np.arange(300), draws=2000)(np.repeat(value_Q, 10)[None, None])
    assert apart.draws_BK.std() < 0.4 * often.draws_BK.std()


def test_one_video_and_one_seed_have_no_spread():
    found = Resampling(np.zeros(4, int), draws=200)(np.array([[[0.0, 1.0, 1.0, 0.0]]]))
    assert (found.draws_BK == 0.5).all()


def test_seeds_widen_the_interval_as_students_t():
    """Two seeds at 0.4 and 0.6: mean 0.5, standard error 0.1; t of one degree of freedom has its 97.5 % at 12.7."""
    value_SKQ = np.array([[[0.4] * 5], [[0.6] * 5]])
    low, high = Resampling(np.arange(5), draws=40_000)(value_SKQ).interval()
    assert high[0] - 0.5 == pytest.approx(12.706 * 0.1, rel=0.1)
    assert 0.5 - low[0] == pytest.approx(12.706 * 0.1, rel=0.1)


@pytest.mark.parametrize(
    ("num_seeds", "seed_sd", "noise"),
    [(1, 0.0, 0.5), (3, 0.05, 0.1), (3, 0.0, 0.5), (6, 0.03, 0.5)],
    ids=["one seed", "seeds decide", "videos decide", "both"],
)
def test_intervals_cover_the_truth(num_seeds, seed_sd, noise):
    """The mean of 0.5 + seed + video + noise; 60 videos of 1 to 4 questions."""
    random, num_trials, covered = np.random.default_rng(12), 300, 0
    for trial in range(num_trials):
        video_Q = np.repeat(np.arange(60), random.integers(1, 5, 60))
        video_V, seed_S = 0.2 * random.standard_normal(60), seed_sd * random.standard_normal((num_seeds, 1, 1))
        error_SKQ = noise * random.standard_normal((num_seeds, 1, len(video_Q)))
        low, high = Resampling(video_Q, draws=400, seed=trial)(0.5 + seed_S + video_V[video_Q] + error_SKQ).interval()
        covered += bool(low[0] <= 0.5 <= high[0])
    assert covered >= 0.91 * num_trials  # 0.95 less three standard errors of 300 trials


def test_percentile_interval_of_known_draws():
    low, high = percentile_interval(np.arange(1.0, 1000.0)[:, None])  # 999 draws cut the line into 1000 equal parts
    assert (low[0], high[0]) == pytest.approx((25, 975))


def test_rank_correlations_with_ties_are_those_of_spearman():
    random = np.random.default_rng(0)
    one_KQ, other_Q = random.integers(0, 4, (3, 40)).astype(float), random.integers(0, 5, 40).astype(float)
    found = Resampling(np.arange(40), draws=5).rank_correlations(one_KQ, other_Q)
    np.testing.assert_allclose(found.estimate_K, [spearman(one_Q, other_Q) for one_Q in one_KQ])
    np.testing.assert_allclose(mean_ranks(np.array([5.0, 1.0, 5.0, 7.0])), [2.5, 1.0, 2.5, 4.0])


def test_a_draw_is_the_correlation_of_the_questions_repeated():
    random = np.random.default_rng(1)
    video_Q = np.array([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6, 7])
    one_Q, other_Q = random.integers(0, 5, 12).astype(float), random.standard_normal(12)
    resampling = Resampling(video_Q, draws=50, seed=3)
    share_BQ = resampling(np.eye(12)[None]).draws_BK  # each question's share of the draw's questions
    draws_B = resampling.rank_correlations(one_Q[None], other_Q).draws_BK[:, 0]
    for share_Q, draw in zip(share_BQ, draws_B, strict=True):
        times_Q = np.rint(60 * share_Q / share_Q[share_Q > 0].min()).astype(int)  # up to a common factor
        repeated = spearman(np.repeat(one_Q, times_Q), np.repeat(other_Q, times_Q))
        assert draw == pytest.approx(float(np.nan_to_num(repeated)), abs=1e-9)


def test_the_interval_of_a_rank_correlation_is_wider_where_clips_are_of_few_videos():
    random = np.random.default_rng(2)
    one_Q = random.standard_normal(200)
    other_Q = one_Q + random.standard_normal(200)

    def width(video_Q, one_Q, other_Q):
        low, high = Resampling(video_Q, draws=400).rank_correlations(one_Q[None], other_Q).interval()
        return float(high[0] - low[0])

    alone = width(np.arange(200), one_Q, other_Q)
    assert 0.1 < alone < 0.3  # about 2 x 1.96 x (1 - rho^2) x 1.06 / sqrt(200), rho 0.69: 0.16
    repeated = [np.repeat(values, 4) for values in (np.arange(200), one_Q, other_Q)]
    assert width(*repeated) == pytest.approx(alone)  # four spans of each video say no more than one
    assert width(np.arange(800), *repeated[1:]) < 0.6 * alone


def test_a_constant_has_no_rank_correlation():
    found = Resampling(np.arange(20), draws=30).rank_correlations(np.ones((1, 20)), np.arange(20.0))
    assert np.isnan(found.estimate_K[0])
    assert (found.draws_BK == 0).all()

"""Intervals: coverage on data with a known truth, closed forms, and data that leave nothing to resample."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treedecode.common import intervals


def test_wilson_solves_the_score_equation():
    # its ends are the proportions p at which the data lie z standard errors of p away
    for right, trials in ((3, 10), (0, 25), (25, 25), (150, 300)):
        for end in intervals.wilson(right, trials):
            if 0 < end < 1:
                assert (right / trials - end) ** 2 == pytest.approx(1.959963985**2 * end * (1 - end) / trials)
    assert intervals.wilson(0, 25).low == 0.0
    assert intervals.wilson(25, 25).high == 1.0


def test_equal_values_give_wilsons_interval():
    assert intervals.mean_interval(np.ones(40)) == intervals.wilson(40, 40)
    assert intervals.mean_interval(np.zeros(40)) == intervals.wilson(0, 40)
    assert intervals.mean_interval([0.5] * 10) == intervals.wilson(5, 10)
    assert intervals.mean_interval([1.0]).low < 0.3


@pytest.mark.parametrize(("share", "problems"), [(0.08, 100), (0.5, 60), (0.97, 200)])
def test_intervals_hold_the_truth_as_often_as_their_level(share, problems):
    rng = np.random.default_rng(1)
    samples = (rng.random((400, problems)) < share).astype(float)
    held = [low <= share <= high for low, high in (intervals.mean_interval(s, num_resamples=600) for s in samples)]
    assert 0.91 <= np.mean(held) <= 0.985


def test_a_pair_is_compared_on_the_same_problems():
    """Easy and hard problems, which two strategies have in common, do not widen the interval of the difference."""
    rng = np.random.default_rng(2)
    easy = (rng.random(300) < 0.5).astype(float)
    better = np.where(rng.random(300) < 0.1, 1.0, easy)
    difference = intervals.paired_difference(better, easy)
    assert difference.estimate == pytest.approx((better - easy).mean())
    assert 0 < difference.low < difference.estimate < difference.high
    apart = intervals.mean_interval(better)
    assert difference.high - difference.low < 0.7 * (apart.high - apart.low)
    assert intervals.paired_difference(easy, better).high == pytest.approx(-difference.low, abs=2e-3)


def test_pairs_that_agree_give_wilsons_bound_for_none():
    same = [1.0, 0.0, 1.0, 1.0] * 25
    difference = intervals.paired_difference(same, same)
    assert difference == (0.0, -intervals.wilson(0, 100).high, intervals.wilson(0, 100).high)


def test_bca_leans_to_the_skewed_side():
    values = np.r_[np.ones(4), np.zeros(196)]
    low, high = intervals.mean_interval(values)
    means = intervals.resampled_means(values, num_resamples=4000, seed=0)
    assert low >= np.quantile(means, 0.025)
    assert high > np.quantile(means, 0.975)


def test_columns_are_resampled_together():
    values = np.random.default_rng(0).random((20, 3))
    values[:, 2] = values[:, 0] + values[:, 1]
    means = intervals.resampled_means(values, num_resamples=50, seed=3)
    np.testing.assert_allclose(means[:, 2], means[:, 0] + means[:, 1])
    np.testing.assert_allclose(means[:, 0], intervals.resampled_means(values[:, 0], num_resamples=50, seed=3))
    assert (intervals.resample_counts(20, 50, 3).sum(axis=1) == 20).all()


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=40))
def test_an_interval_is_in_range_and_holds_the_mean(values):
    low, high = intervals.mean_interval(values, num_resamples=300)
    assert 0 <= low <= np.mean(values) + 1e-12
    assert np.mean(values) - 1e-12 <= high <= 1


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: intervals.mean_interval([]), "values: expected one value for each problem"),
        (lambda: intervals.mean_interval([0.5, 1.5]), "values: expected values from 0 to 1"),
        (lambda: intervals.mean_interval([0.5, float("nan")]), "values: expected values from 0 to 1"),
        (lambda: intervals.mean_interval([0.0, 1.0], level=1.0), "level: expected a number between 0 and 1"),
        (lambda: intervals.paired_difference([0.0], [0.0, 1.0]), "second: expected 1 values"),
        (lambda: intervals.wilson(1, 0), "num_trials: expected at least 1"),
        (lambda: intervals.wilson(3, 2), "num_right: expected from 0 to 2"),
    ],
)
def test_bad_arguments(call, error):
    with pytest.raises(ValueError, match=error):
        call()

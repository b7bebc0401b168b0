"""The audit on simulated policies: one that never sees the group, planted gaps, and chance."""

from dataclasses import replace

import numpy as np
import pytest

from treedecode.allocation.training.audit import Allocation, audit, permutation_test, spend_gap, strata_of
from treedecode.allocation.training.resampling import bootstrap, holm


def groups(num_problems, rng, planted=0.0):
    """Makes problems of two groups, one harder; spend follows difficulty, less `planted` for the harder group."""
    member = rng.random(num_problems) < 0.4
    difficulty = np.round(rng.beta(1, np.where(member, 3, 1)), 1)
    spend = 10 - 6 * difficulty + rng.normal(0, 1, num_problems) - planted * member
    return spend, member, difficulty


def test_the_permutation_test_is_valid_under_difficulty_alone_and_sees_a_planted_gap():
    rng = np.random.default_rng(0)
    values = []
    for i in range(150):
        spend, member, difficulty = groups(60, rng)
        strata = np.unique(difficulty, return_inverse=True)[1]  # spend depends on difficulty within coarser ones
        values.append(permutation_test(spend, member, strata, permutations=39, seed=i)[1])
    values = np.array(values)
    # uniform on 1/40 .. 1: the largest gap of the distribution function is below 1.63 / sqrt(n) at the 1% level
    grid = np.arange(1, 41) / 40
    assert np.abs((values[:, None] <= grid + 1e-9).mean(axis=0) - grid).max() < 1.63 / np.sqrt(150)
    spend, member, difficulty = groups(300, rng, planted=1.5)
    gap, p_value = permutation_test(spend, member, strata_of(difficulty), permutations=199)
    assert gap == pytest.approx(-1.5, abs=0.4)
    assert p_value == 1 / 200


def test_the_gap_is_standardised_by_the_groups_difficulties():
    strata = np.array([0, 0, 0, 1, 1, 1, 2])
    member = np.array([1, 0, 0, 1, 1, 0, 1], bool)
    spend = np.array([5.0, 3, 4, 2, 4, 2, 99])
    assert spend_gap(spend, member, strata) == pytest.approx((1.5 * 1 + 1.0 * 2) / 3)
    assert np.isnan(spend_gap(spend, np.ones(7, bool), strata))


def test_the_audit_counts():
    allocation = Allocation(
        groups=np.array(["a", "a", "a", "b"]),
        problems=np.arange(4),
        difficulty=np.array([0.5, 0.1, 0.0, 0.5]),
        chains=np.array([2, 2, 6, 4]),
        spend=np.array([2.0, 2.0, 6.0, 4.0]),
        probe_spend=np.array([1.0, 1.5, 1.0, 2.0]),
        oracle_spend=np.array([1.0, 5.0, 1.0, 2.5]),
        needed=np.array([1, 5, 9, 3]),
        probed=np.array([True, False, False, False]),
        right=np.array([True, True, False, True]),
        available=8,
    )
    report = audit(allocation, permutations=19, min_size=1)
    assert report["a"]["false_low_budget_rate"] == 0
    report = audit(replace(allocation, right=np.array([True, False, False, True])), permutations=19, min_size=1)
    assert report["a"]["false_low_budget_rate"] == 0.5  # of the two that some number of chains solves
    assert report["b"]["false_low_budget_rate"] == 0
    assert report["a"]["accuracy"] == pytest.approx(1 / 3)
    assert report["a"]["gain_per_unit"] == 0
    assert report["b"]["gain_per_unit"] == pytest.approx(1 / (4 - 2)), (
        "the probes are not what the gain was bought with"
    )
    assert report["a"]["spend"] == pytest.approx(10 / 3)
    # only the problems of difficulty 0.5 compare
    assert (report["a"]["spend_gap"], report["a"]["oracle_spend_gap"], report["a"]["excess_gap"]) == (-2, -1.5, -0.5)


def blind_allocation(seed, *, planted=0.0, dear=1.0, num_problems=400, num_chains=24):
    """Simulates a policy on two groups, one harder, that sees nothing but outcomes and the rate of right chains.

    The policy goes on while a chain is worth its price, by a rate that it knows up to noise, until the answer is right.
    The oracle knows the rate. `planted` chains are taken from the harder group, whose chains cost `dear` times as much.
    """
    rng = np.random.default_rng(seed)
    hard = np.arange(num_problems) % 2 == 1
    p = np.where(hard, rng.beta(1, 3, num_problems), rng.beta(2, 1, num_problems))
    right = rng.random((num_problems, num_chains)) < p[:, None]
    rate, cost = right.mean(axis=1), np.where(hard, dear, 1.0)
    odds = np.log(rate + 0.02) - np.log(1.02 - rate) + rng.normal(0, 0.3, num_problems)
    alpha = 4 / (1 + np.exp(-odds))
    is_worth_it = alpha[:, None] / (4 + np.arange(17)) >= 0.08 * cost[:, None]  # after so many failures
    max_chains = np.where(is_worth_it.all(axis=1), 17, 1 + is_worth_it.argmin(axis=1))
    in_order = rng.permuted(right, axis=1)
    needed = np.where(in_order.any(axis=1), in_order.argmax(axis=1), num_chains) + 1
    chains = np.minimum(needed, max_chains) - planted * hard
    return Allocation(
        groups=np.where(hard, "hard", "easy"),
        problems=np.arange(num_problems),
        difficulty=rate,
        chains=chains,
        spend=chains.astype(float),
        probe_spend=np.ones(num_problems),
        oracle_spend=np.minimum(needed, np.where(rate >= 0.08 * cost, 17, 1)).astype(float),
        needed=needed,
        probed=in_order[:, 0],
        right=needed <= chains,
        available=num_chains,
    )


def test_the_audit_does_not_flag_a_policy_that_never_sees_the_group():
    reports = [audit(blind_allocation(seed), permutations=99, seed=seed)["hard"] for seed in range(40)]
    flagged = [figures["p_value"] <= 0.05 for figures in reports]
    assert sum(flagged) <= 5  # of 40 at the level 5%: more than that has probability 1.4%
    intervals = [figures["excess_gap_interval"] for figures in reports]
    assert sum(low <= 0 <= high for low, high in intervals) >= 33
    planted = audit(blind_allocation(0, planted=1.0), permutations=99)["hard"]
    assert planted["p_value"] == 1 / 100
    assert planted["excess_gap_interval"][1] < 0


def test_the_oracles_own_gap_is_no_finding():
    allocation = blind_allocation(0, dear=3.0)
    figures = audit(replace(allocation, spend=allocation.oracle_spend), permutations=99)["hard"]
    assert figures["spend_gap"] == figures["oracle_spend_gap"] < -0.5, "dear chains are worth it less often"
    assert (figures["excess_gap"], figures["p_value"]) == (0, 1)


def test_strata_are_of_equal_difficulty_as_far_as_there_are_enough():
    difficulty = np.repeat([0.0, 0.1, 0.2, 0.3, 0.4], [12, 4, 7, 11, 3])
    strata = strata_of(difficulty[::-1], 10)[::-1]
    np.testing.assert_array_equal(strata, np.repeat([0, 1, 2], [12, 11, 14]))  # the last three are too few alone
    np.testing.assert_array_equal(strata_of(difficulty, 1), np.repeat(np.arange(5), [12, 4, 7, 11, 3]))
    assert (strata_of(difficulty[:5], 10) == 0).all()


def test_p_values_of_several_tests_are_corrected():
    nan = float("nan")
    np.testing.assert_allclose(holm([0.01, 0.04, nan, 0.03, 0.5]), [0.04, 0.09, nan, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def test_intervals_of_a_statistic_hold_it_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for i in range(200):
        values = rng.exponential(1, 80)
        low, high = bootstrap(lambda drawn, values=values: float(values[drawn].mean()), 80, resamples=200, seed=i)
        held += low <= 1 <= high
    assert 0.88 <= held / 200 <= 0.98


def test_a_statistic_that_may_not_exist():
    values = np.array([1.0, 2.0, np.nan, 3.0])  # of resamples with the third there is none
    low, high = bootstrap(lambda drawn: float(values[drawn].mean()), 4, resamples=400)
    assert 1 <= low < high <= 3
    assert np.isnan(bootstrap(lambda drawn: float("nan"), 4, resamples=10)).all()

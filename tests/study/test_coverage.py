"""Coverage: pass@k against enumeration, and Beta-binomial fits of counts made from known ones."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from treedecode.study.coverage import fit_beta_binomial, pass_at_k
from treedecode.study.laws import CannotFit


@pytest.mark.parametrize("num_right", range(7))
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_chain(num_right, k):
    right = [True] * num_right + [False] * (6 - num_right)
    share = np.mean([any(subset) for subset in combinations(right, k)])
    assert pass_at_k(6, np.array([num_right]), k)[0] == pytest.approx(share)


def test_pass_at_k_where_factorials_overflow():
    exact = 1 - comb(9990, 5000) / comb(10000, 5000)
    np.testing.assert_allclose(pass_at_k(10000, np.array([10, 0, 10000, 5001]), 5000), [exact, 0, 1, 1], atol=1e-12)


def test_fits_recover_the_parameters():
    rng = np.random.default_rng(0)
    counts = rng.binomial(32, rng.beta(0.4, 1.3, 600))
    fit = fit_beta_binomial(32, counts, num_resamples=100)
    for name, truth in (("alpha", 0.4), ("beta", 1.3)):
        low, high = fit.intervals[name]
        assert low <= truth <= high
        assert low <= getattr(fit, name) <= high
        assert high - low < truth / 1.5


def test_the_fit_is_the_maximum():
    from scipy.stats import betabinom

    rng = np.random.default_rng(1)
    counts = rng.binomial(8, rng.beta(2, 3, 300))
    fit = fit_beta_binomial(8, counts, num_resamples=2)
    best = betabinom.logpmf(counts, 8, fit.alpha, fit.beta).sum()
    for alpha, beta in ((1.02, 1), (0.98, 1), (1, 1.02), (1, 0.98), (1.02, 1.02)):
        assert betabinom.logpmf(counts, 8, fit.alpha * alpha, fit.beta * beta).sum() < best


def test_coverage_of_the_fit():
    rng = np.random.default_rng(2)
    rates = rng.beta(0.5, 2, 3000)
    fit = fit_beta_binomial(16, rng.binomial(16, rates), num_resamples=2)
    k = np.array([1, 16, 64])  # also for more chains than were sampled
    np.testing.assert_allclose(fit.pass_at_k(k), [(1 - (1 - rates) ** n).mean() for n in k], atol=0.02)
    assert fit.pass_at_k(np.array([1]))[0] == pytest.approx(fit.alpha / (fit.alpha + fit.beta))


@pytest.mark.parametrize(
    ("num_chains", "counts", "why"),
    [
        (1, [0, 1, 1], "one chain of a problem"),
        (8, [0, 0, 0], "every chain of every problem is wrong"),
        (8, [8, 8], "every chain of every problem is right"),
        (8, [0, 8, 8], "all chains are right or all are wrong"),
        (8, [4] * 50, "differ no more than chance makes them"),
    ],
)
def test_what_determines_nothing_is_refused(num_chains, counts, why):
    with pytest.raises(CannotFit, match=f"^cannot be fitted: .*{why}"):
        fit_beta_binomial(num_chains, np.array(counts))


def test_bad_arguments():
    with pytest.raises(ValueError, match="k: expected from 1 to 4"):
        pass_at_k(4, np.array([1]), 5)
    with pytest.raises(ValueError, match="num_right: expected"):
        pass_at_k(4, np.array([5]), 2)
    with pytest.raises(ValueError, match="num_right: expected"):
        fit_beta_binomial(4, np.array([-1, 2]))

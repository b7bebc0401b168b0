"""Self-consistency: the Beta posterior and both early stops."""

import numpy as np
import pytest
from support.strategy_cases import Agreeing, solve_one

import treedecode as td
from treedecode.strategies.self_consistency import leads


@pytest.mark.parametrize(("first", "second"), [(1, 0), (2, 1), (3, 3), (9, 2), (30, 10)])
def test_the_beta_posterior_is_its_integral(first, second):
    p = np.linspace(0, 1, 200_001)
    density = p**first * (1 - p) ** second
    expected = np.trapezoid(density[100_000:], p[100_000:]) / np.trapezoid(density, p)
    assert leads(np.array([second, first, 0])) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("stop", "chains"), [("never", 12), ("window", 3), ("beta", 6)])
def test_chains_that_agree_end_early(stop, chains):
    # Beta: 1 - 2**-(a + 1) >= 0.95 from a = 4 on; chains come 3 at a time, and some have no answer
    strategy = td.SelfConsistency(num_samples=12, stop=stop, window=3)
    solution = solve_one(strategy, task=Agreeing(end=("a", "e", "i", "o", "u", "t", " ", "r", "s"), max_new_tokens=60))
    assert len(solution.tree.leaves()) == chains
    assert solution.answer == "yes"
    assert solution.score == 1

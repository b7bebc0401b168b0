"""Division of budgets, weights and votes: ties, scores far below 0, and votes for nobody."""

import numpy as np
import pytest
from support.fake_task import FakeTask, Recorder
from support.strategy_cases import solve_one

import treedecode as td
from treedecode.allocation.allocate import Bid, allocate
from treedecode.search.search import Search
from treedecode.strategies.rebase import share_out, softmax
from treedecode.verify.judges import parse_vote


@pytest.mark.parametrize(
    ("weights", "budget", "shares"),
    [
        ([0.5, 0.5], 3, [2, 1]),
        ([0.25] * 4, 2, [1, 1, 0, 0]),
        ([0.25] * 4, 7, [2, 2, 2, 1]),
        ([0.2, 0.6, 0.2], 4, [1, 2, 1]),
        ([1 / 64] * 64, 21, [1] * 21 + [0] * 43),
        ([1.0, 0.0], 5, [5, 0]),
        ([0.5, 0.5], 0, [0, 0]),
    ],
)
def test_of_equal_remainders_the_first_gets_more(weights, budget, shares):
    assert share_out(np.array(weights), budget).tolist() == shares


@pytest.mark.parametrize("shift", [-500.0, -1000.0, 0.0, 700.0])
def test_softmax_of_scores_far_from_0(shift):
    weights = softmax(np.array([0.0, -1.0, 1.0]) + shift)
    np.testing.assert_allclose(weights, [0.24472847, 0.09003057, 0.66524096], rtol=1e-6)


def test_a_floor_above_the_most_chains_is_that_number():
    costs = {"chain_cost": 1.0, "trees": (), "tree_costs": (), "single_chain_cost": 1.0, "spent": 0.0}
    bids = [Bid(num_chains=n, alpha=1.0, beta=3.0, unsolved=0.5, **costs) for n in (1, 3, 4)]
    grants, _ = allocate(bids, 100.0, max_chains=4, floor=9)
    assert [bid.num_chains + grant.num_chains for bid, grant in zip(bids, grants, strict=True)] == [4, 4, 4]


def test_a_vote_for_choice_0_is_a_number_of_no_candidate():
    assert parse_vote("The best choice is 0.") == 0


def test_weights_begin_anew_after_resampling(monkeypatch):
    """Where particles are resampled after every step, they vote with the odds of the last one alone."""
    votes = []
    vote = Search.vote
    monkeypatch.setattr(Search, "vote", lambda *args: (votes.append(args[1:]), vote(*args))[1])
    task = FakeTask(max_new_tokens=9, end=tuple(".aeinorst"), stop="nothing", max_step_tokens=3)
    num_compared = 0
    for seed in range(12):
        asked = Recorder()
        solve_one(td.ParticleFilter(num_particles=6, ess_threshold=1, answer="weighted"), asked, task=task, seed=seed)
        scores = {text: score for call in asked.calls for text, score in call}
        [(solutions, weights)] = votes
        votes.clear()
        last = np.array([scores[solution.text] for solution in solutions])
        if len(asked.calls) > 1 and np.ptp(weights):  # else resampling has dropped all that would have gone on
            np.testing.assert_allclose(weights, softmax(np.log(last / (1 - last))), rtol=1e-9)
            num_compared += 1
    assert num_compared >= 3

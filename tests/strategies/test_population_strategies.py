"""What REBASE, ETS and the particle filter share out, against papers' formulas, worked examples and brute force."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_task import FakeTask, Recorder
from support.strategy_cases import ENDLESS, parents_of, solve_one

import treedecode as td
from treedecode.strategies.ets import best_subtree
from treedecode.strategies.particle_filter import effective_sample_size, systematic_resampling
from treedecode.strategies.rebase import share_out, softmax

weights_of = st.lists(st.floats(0.01, 1), min_size=1, max_size=12).map(lambda x: np.array(x) / sum(x))


# -- REBASE, ETS --


@settings(deadline=None)
@given(weights_of, st.integers(1, 40))
def test_shares_are_whole_and_fair(weights, budget):
    counts = share_out(weights, budget)
    assert counts.sum() == budget
    assert (np.abs(counts - weights * budget) < 1).all()
    heavier = weights[:, None] > weights[None] + 1e-9
    assert (counts[:, None] >= counts[None])[heavier].all()
    nearest = np.rint(weights * budget)
    if nearest.sum() == budget and not (np.abs(weights * budget % 1 - 0.5) < 1e-9).any():
        assert counts.tolist() == nearest.tolist()


def test_rebase_by_hand():
    # exp([0.9, 0.7, 0.1] / 0.2) = [90.02, 33.12, 1.65]: of 8 they get 5.77, 2.12 and 0.11
    assert share_out(softmax(np.array([0.9, 0.7, 0.1]) / 0.2), 8).tolist() == [6, 2, 0]


def test_rebase_gives_each_branch_its_children():
    asked = Recorder()
    solve_one(td.REBASE(width=8), asked, task=ENDLESS)
    assert {len(call) for call in asked.calls} == {8}
    for before, children in parents_of(asked.calls[:3]):
        assert len({text for text, _ in before}) == len(before)
        assert children == share_out(softmax(np.array([score for _, score in before]) / 0.2), 8).tolist()


@st.composite
def trees(draw):
    parents = [-1]
    for i in range(draw(st.integers(1, 9))):
        parents.append(draw(st.integers(0, i)))
    costs = draw(st.lists(st.integers(0, 6), min_size=len(parents), max_size=len(parents)))
    leaves = draw(st.lists(st.integers(0, len(parents) - 1), min_size=1, max_size=7))
    values = draw(st.lists(st.integers(0, 9), min_size=len(leaves), max_size=len(leaves)))
    return parents, np.array(costs, float), np.array(leaves), np.array(values, float)


@settings(deadline=None, max_examples=200)
@given(trees())
def test_the_best_subtree_is_that_of_brute_force(tree):
    parents, costs, leaves, values = tree

    def worth(kept):
        nodes = set()
        for leaf in leaves[kept]:
            while leaf >= 0:
                nodes.add(int(leaf))
                leaf = parents[leaf]
        return values[kept].sum() - costs[sorted(nodes)].sum()

    masks = [np.array(mask) for mask in itertools.product([False, True], repeat=len(leaves)) if any(mask)]
    kept = best_subtree(parents, costs, leaves, values)
    assert kept.any()
    assert worth(kept) == pytest.approx(max(map(worth, masks)))


def test_ets_without_a_cost_is_rebase_and_with_one_keeps_less():
    same = [solve_one(strategy, seed=3) for strategy in (td.REBASE(width=8), td.ETS(width=8, kv_weight=0))]
    assert same[0].text == same[1].text
    assert same[0].tree.to_json() == same[1].tree.to_json()
    dear, cheap = Recorder(), Recorder()
    task = ENDLESS
    solve_one(td.ETS(width=8, kv_weight=50), dear, task=task)
    solve_one(td.ETS(width=8, kv_weight=0.1), cheap, task=task)
    kept = [sum(count > 0 for count in next(parents_of(asked.calls))[1]) for asked in (dear, cheap)]
    assert kept[0] == 1 < kept[1]


# -- particle filter --


@settings(deadline=None, max_examples=50)
@given(weights_of)
def test_systematic_resampling_is_unbiased(weights):
    grid = (np.arange(500) + 0.5) / 500
    counts = np.array([systematic_resampling(weights, u) for u in grid])
    n = len(weights)
    assert (counts.sum(axis=1) == n).all()
    assert (np.abs(counts - n * weights) < 1 + 1e-9).all()
    assert np.abs(counts.mean(axis=0) - n * weights).max() <= 1 / 500 + 1e-9


def test_effective_sample_size():
    assert effective_sample_size(np.full(7, 1 / 7)) == pytest.approx(7)
    assert effective_sample_size(np.array([0, 1.0, 0])) == 1
    assert effective_sample_size(np.array([0.5, 0.5, 0])) == pytest.approx(2)


def test_particles_are_resampled_when_they_degenerate():
    task = ENDLESS
    equal, never = Recorder(lambda problem, text: 0.5), Recorder()
    solve_one(td.ParticleFilter(num_particles=6, ess_threshold=0.9), equal, task=task)
    solve_one(td.ParticleFilter(num_particles=6, ess_threshold=0), never, task=task)
    for asked in (equal, never):
        for _, children in parents_of(asked.calls[:3]):
            assert min(children) >= 1

    def only_the_first(problem, text):
        seen.setdefault(len(seen), text)
        return 1.0 if text.startswith(seen[0]) else 0.0

    seen, one = {}, Recorder(only_the_first)
    solve_one(td.ParticleFilter(num_particles=6), one, task=task)
    assert next(parents_of(one.calls))[1] == [6, 0, 0, 0, 0, 0]


def test_particles_need_probabilities():
    with pytest.raises(ValueError, match="verifier: expected probabilities, as is_logit=False says"):
        solve_one(td.ParticleFilter(num_particles=3), Recorder(lambda problem, text: 2.0))
    for answer in ("best", "weighted", "majority"):
        strategy = td.ParticleFilter(num_particles=3, is_logit=True, answer=answer)
        solve_one(strategy, Recorder(lambda problem, text: 2.0 - len(text)))


def test_particles_vote_with_their_weights():
    """Never resampled, a particle's weight is the product of its odds, whatever its last score is."""
    strategy = td.ParticleFilter(num_particles=8, ess_threshold=0, answer="weighted")
    task, by_last_score = FakeTask(max_new_tokens=9, end=tuple(".aeinorst"), stop="nothing", max_step_tokens=3), 0
    for seed in range(10):
        asked = Recorder()
        solution = solve_one(strategy, asked, task=task, seed=seed)
        texts = [solution.tree.text(leaf) for leaf in solution.tree.leaves()]
        scores = {text: score for call in asked.calls for text, score in call}
        depth = len(asked.calls)
        votes, last = Counter(), Counter()
        for leaf, text in zip(solution.tree.leaves(), texts, strict=True):
            answer = task.extract(text) if text.endswith(task.end) or solution.tree.nodes[leaf].ended else None
            if answer is None:
                continue
            path = [scores[solution.tree.text(node)] for node in solution.tree.path(leaf)[1:]]
            path += [path[-1]] * (depth - len(path))  # a complete one is looked at again
            votes[answer.lower()] += math.prod(score / (1 - score) for score in path)
            last[answer.lower()] += path[-1]
        if votes:
            assert solution.answer.lower() == max(votes, key=votes.get)
            by_last_score += max(votes, key=votes.get) != max(last, key=last.get)
    assert by_last_score

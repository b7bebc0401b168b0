"""REBASE and ETS: how they share out a width, against worked examples and brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_task import Recorder
from support.strategy_cases import ENDLESS, parents_of, solve_one

import treedecode as td
from treedecode.strategies.ets import best_subtree
from treedecode.strategies.rebase import share_out, softmax

weights_of = st.lists(st.floats(0.01, 1), min_size=1, max_size=12).map(lambda x: np.array(x) / sum(x))


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

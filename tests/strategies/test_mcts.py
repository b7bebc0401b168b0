"""MCTS: the PUCT rule by hand, and a search replayed step by step."""

import math

import numpy as np
import pytest
from support.fake_task import FakeTask, Recorder
from support.strategy_cases import ENDLESS, TASK, solve_one

import treedecode as td
from treedecode.strategies.puct import PuctNode, exploration


def test_puct_by_hand():
    root = PuctNode()
    often = PuctNode(parent=root, prior=0.25)
    once = PuctNode(parent=root, prior=0.75)
    root.children = [often, once]
    often.back_up(0.9)
    often.back_up(0.75, 2)  # drawn twice
    once.back_up(0.2)
    assert (root.visits, root.total) == (4, pytest.approx(2.6))
    assert (often.q, once.q) == (pytest.approx(0.8), 0.2)
    c = exploration(4, 1.25, 19652)
    assert c == pytest.approx(1.25 + math.log(19657 / 19652))
    assert often.puct(c, 0.2, 1.0) == pytest.approx(0.75 + c * 0.25 * 2 / 4)
    assert once.puct(c, 0.2, 1.0) == pytest.approx(0.0 + c * 0.75 * 2 / 2)
    once.add_pending(5)
    assert once.puct(c, 0.2, 1.0) == pytest.approx(c * 0.75 * 3 / 7), "a visit under way changes no value"
    assert often.puct(c, 0.2, 1.0) > once.puct(c, 0.2, 1.0)
    assert often.puct(c, 0.5, 0.5) == pytest.approx(c * 0.25 * 3 / 4), "nothing to compare yet"


def test_mcts_expands_what_puct_says():
    asked, simulations, depth = Recorder(), 14, 5
    strategy = td.MCTS(num_simulations=simulations, width=2, parallel=1, answer="visits")
    solution = solve_one(strategy, asked, task=ENDLESS)
    calls = list(asked.calls)
    children, value, visits, total = {"": []}, {}, {"": 0}, {"": 0.0}

    def path_of(text):
        return [above for above in visits if text.startswith(above)]

    for _ in range(simulations):
        leaf = ""
        means = [total[one] / visits[one] for one in value]
        low, high = min(means, default=0), max(means, default=0)
        while children.get(leaf):
            n, siblings = visits[leaf], children[leaf]
            c = 1.25 + math.log((19653 + n) / 19652)
            q = [(total[one] / visits[one] - low) / (high - low) for one in siblings]
            u = [c * math.sqrt(n) / (1 + visits[one]) / len(siblings) for one in siblings]
            leaf = siblings[int(np.argmax(np.add(q, u)))]
        if len(path_of(leaf)) == depth + 1:  # 14 tokens, three a step
            backed_up = [(leaf, value[leaf])]
        else:
            backed_up = calls.pop(0)
            assert all(text.startswith(leaf) for text, _ in backed_up), "another leaf was expanded"
            children[leaf] = [text for text, _ in backed_up]
        for text, score in backed_up:
            value[text] = score
            visits.setdefault(text, 0)
            total.setdefault(text, 0.0)
            for above in path_of(text):
                visits[above] += 1
                total[above] += score
    leaf = ""
    while children.get(leaf):
        leaf = max(children[leaf], key=lambda one: (visits[one], value[one]))
    assert solution.text.startswith(leaf)
    assert len(calls) == (0 if len(path_of(leaf)) == depth + 1 else 1), "what is left is the score of the whole"


def test_equal_steps_are_one_child_that_is_backed_up_for_each():
    roots = []

    class Watched(td.MCTS):
        def _select(self, root):
            roots.append(root)
            return super()._select(root)

    settings = {"num_simulations": 1, "width": 12, "sampling": td.Sampling(temperature=0.5)}
    solve_one(Watched(**settings), task=FakeTask(max_step_tokens=1))
    [root] = roots
    assert 1 < len(root.children) < 12, "some of the steps are equal"
    assert root.visits == 12
    for child in root.children:
        assert child.visits == round(12 * child.prior)
        assert child.q == pytest.approx(child.value)
    assert root.q == pytest.approx(sum(child.prior * child.value for child in root.children))


def test_the_answer_is_the_best_or_the_most_visited():
    for answer in ("value", "visits"):
        asked = Recorder()
        solution = solve_one(td.MCTS(num_simulations=12, width=3, parallel=3, answer=answer), asked)
        scores = {text: score for call in asked.calls for text, score in call}
        assert scores[solution.text] == solution.score
        if answer == "value":
            done = {text for text in scores if text.endswith(".") and TASK.extract(text) is not None}
            assert solution.score >= max(scores[text] for text in done)

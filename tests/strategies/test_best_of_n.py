"""Best of n: the best scored and the weighted answer."""

import pytest
from support.fake_task import Recorder
from support.strategy_cases import TASK, solve_one

import treedecode as td


def test_the_best_and_the_weighted_answer():
    differ = 0
    for seed in range(6):
        asked = Recorder()
        best = solve_one(td.BestOfN(num_samples=12), asked, seed=seed)
        weighted = solve_one(td.BestOfN(num_samples=12, answer="weighted"), seed=seed)
        leaves = [best.tree.nodes[i] for i in best.tree.leaves()]
        done = [
            (node.score, TASK.extract(text))
            for node in leaves
            if (text := best.tree.text(best.tree.nodes.index(node))).endswith(".") or node.ended
        ]
        answered = [(score, answer) for score, answer in done if answer is not None]
        assert (best.score, best.answer) == max(answered)
        sums = {name: sum(score for score, answer in answered if answer.lower() == name) for name in "abc"}
        assert weighted.answer.lower() == max(sums, key=sums.get)
        differ += best.answer.lower() != weighted.answer.lower()
    assert differ


def test_weighted_votes_refuse_negative_scores():
    with pytest.raises(ValueError, match="verifier: weighted votes need scores >= 0, got -"):
        solve_one(td.BestOfN(num_samples=3, answer="weighted"), Recorder(lambda problem, text: -len(text) - 1.0))

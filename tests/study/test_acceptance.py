"""Acceptance criteria: each verdict from numbers that leave no other."""

import numpy as np
import pytest

from treedecode.study.acceptance import FAILS, HOLDS, NOT_SHOWN, UNKNOWN, judge_criteria
from treedecode.study.laws import Curve

HARD = np.random.default_rng(0).random(400)
APART = {"throughput_ratio": 6.0, "per_problem_s": 0.6, "problems": 2, "tokens": 300.0, "tokens_per_s": 500.0}
ROW = {
    "error": None,
    "problems": 400,
    "tokens": 400.0,
    "tokens_x": 4.0,
    "tokens_per_s": 3000.0,
    "latency_x": 2.9,
    "latency_s": 1.0,
    "batched_s": 0.1333,
    "one_after_another": APART,
}


def solved(share):
    return (share > HARD).astype(float)


MAJORITY = Curve(np.array([1.0, 2.0, 4.0, 8.0]), np.stack([solved(s) for s in (0.3, 0.35, 0.4, 0.45)], axis=1))


def judged(share, problems=slice(None), **changes):
    rows = [
        {**ROW, "key": key, "correct": solved(share)[problems].tolist(), **changes}
        for key in ("tree_of_thoughts", "dynamic_allocation_4x")
    ]
    curve = Curve(MAJORITY.costs, MAJORITY.accuracy[problems])
    return judge_criteria(rows, {"self_consistency": curve, "best_of_n": curve})


def criterion_with(text, results):
    (result,) = [each for each in results if text in each["bar"]]
    return result


CRITERIA = ("majority of 8", "best of 8", "tree of thoughts (3, 5) beats", "takes at most 3x", "at least 5x")


@pytest.mark.parametrize("text", CRITERIA)
def test_verdicts(text):
    good = judged(0.6)
    bad = judged(0.3, latency_x=3.1, one_after_another={**APART, "throughput_ratio": 4.0})
    assert criterion_with(text, good)["verdict"] == HOLDS
    assert criterion_with(text, bad)["verdict"] == FAILS


def test_what_was_not_measured_cannot_be_told():
    assert criterion_with("mcts", judged(0.6))["verdict"] == UNKNOWN
    beyond = judged(0.6, tokens_x=20.0, latency_x=None, one_after_another=None)
    for text in CRITERIA[2:]:
        assert criterion_with(text, beyond)["verdict"] == UNKNOWN
    for result in judge_criteria([{**ROW, "key": "dynamic_allocation_4x", "correct": [1.0]}], {}):
        assert result["verdict"] == UNKNOWN


def test_an_interval_with_both_in_it_shows_neither():
    # equal answers at equal tokens are no win and, of so many problems, no loss of more than a point
    assert criterion_with("tree of thoughts (3, 5) beats", judged(0.4))["verdict"] == NOT_SHOWN
    assert criterion_with("majority of 8", judged(0.45))["verdict"] == HOLDS
    few = slice(0, 30)
    assert criterion_with("majority of 8", judged(0.45, few))["verdict"] == NOT_SHOWN
    assert criterion_with("tree of thoughts (3, 5) beats", judged(0.42))["verdict"] == HOLDS
    assert criterion_with("tree of thoughts (3, 5) beats", judged(0.42, few))["verdict"] == NOT_SHOWN


@pytest.mark.parametrize(("spent", "verdict"), [(4.2, HOLDS), (4.25, FAILS)])
def test_more_than_the_budget_is_no_win(spent, verdict):
    for text in CRITERIA[:2]:
        result = criterion_with(text, judged(0.6, tokens_x=spent))
        assert result["verdict"] == verdict
        assert f"it spends {spent:.2f}x" in result["evidence"]
        assert "at most 4.2x" in result["bar"]


def test_a_ratio_of_throughputs_says_what_ran_on_both_sides():
    evidence = criterion_with("at least 5x", judged(0.6))["evidence"]
    assert "3000 with all 400 problems side by side (400 tokens in 0.133 s each)" in evidence
    assert "500 with the first 2 one after another (300 tokens in 0.6 s each)" in evidence

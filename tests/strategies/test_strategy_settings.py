"""Settings of strategies that are refused, and scores that none can use."""

import math

import pytest
from support.fake_task import Recorder, talkative_decoder
from support.strategy_cases import TASK, solve_one

import treedecode as td


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: td.BestOfN(num_samples=0), ValueError, "num_samples: expected a number >= 1, got 0"),
        (lambda: td.BestOfN(answer="majority"), ValueError, "answer: expected one of 'best', 'weighted', got"),
        (lambda: td.StepBeamSearch(num_beams=6, width=4), ValueError, "num_beams: expected a multiple of the width 4"),
        (lambda: td.DVTS(lookahead=-1), ValueError, "lookahead: expected a number >= 0, got -1"),
        (lambda: td.REBASE(temperature=0), ValueError, "temperature"),
        (lambda: td.ETS(kv_weight=-1), ValueError, "kv_weight: expected a number >= 0"),
        (lambda: td.MCTS(evaluate="guess"), ValueError, "evaluate: expected one of 'verifier', 'rollout', got 'guess'"),
        (lambda: td.MCTS(width=2.5), TypeError, "width: expected an int, got 2.5"),
        (lambda: td.ParticleFilter(ess_threshold=2), ValueError, "ess_threshold: expected a number from 0 to 1"),
        (lambda: td.IterativeRefinement(good="1"), TypeError, "good: expected a number, got '1'"),
        (lambda: td.IterativeRefinement(good=math.nan), ValueError, "good: expected a number, got nan"),
        (lambda: td.IterativeRefinement(doubt=True), TypeError, "doubt: expected a number, got True"),
        (lambda: td.TreeOfThoughts(dead="a"), TypeError, "dead: expected a number, got 'a'"),
        (lambda: td.TreeOfThoughts(dead=math.nan), ValueError, "dead: expected a number, got nan"),
        (lambda: td.IterativeRefinement(revise_prompt=""), ValueError, "revise_prompt: is empty"),
        (lambda: td.IterativeRefinement(critique_stop="no"), TypeError, "critique_stop: expected a tuple of strings"),
    ],
)
def test_settings_are_checked(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("name", [name for name, one in td.strategies.STRATEGIES.items() if one.needs_verifier])
def test_strategies_that_score_branches_need_a_verifier(name):
    with pytest.raises(ValueError, match=f"verifier: {name} scores branches and needs one"):
        td.solve(talkative_decoder(), TASK.problems(1), strategy=td.strategies.STRATEGIES[name](), task=TASK)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_scores_are_finite(score):
    for strategy in (td.BestOfN(num_samples=3), td.REBASE(width=3), td.MCTS(num_simulations=2, width=2)):
        with pytest.raises(ValueError, match="verifier: expected a finite number for every branch, got"):
            solve_one(strategy, Recorder(lambda problem, text: score if "e" in text else 0.5))

"""Accuracies of a pool of chains against all of its subsets, and the pool against self-consistency itself."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.study_cases import Digits, Length, length

import treedecode as td
from treedecode.strategies import SelfConsistency
from treedecode.study import pool
from treedecode.study.pool import ChainPool, PooledChains


def chains(answers, truth=0, scores=None):
    """Chains by the class of their answer, which is right if it is `truth`."""
    classes = np.array(answers)
    scores = np.full(len(classes), np.nan) if scores is None else np.array(scores, float)
    return PooledChains(classes, classes == truth, scores, np.ones(len(classes), np.int64))


def majority(answers):
    """The most frequent answer of a list, the first of equals; None without answers."""
    given = [answer for answer in answers if answer >= 0]
    return max(dict.fromkeys(given), key=given.count) if given else None


def best(answers, scores):
    """The answer with the highest score, the first of equals; one with an answer before one without."""
    return answers[max(range(len(answers)), key=lambda i: (answers[i] >= 0, scores[i], -i))]


answers_of_six = st.lists(st.sampled_from([-1, 0, 0, 1, 2]), min_size=6, max_size=6)


@settings(max_examples=25, deadline=None)
@given(answers_of_six, st.integers(1, 6))
def test_majority_is_the_mean_over_subsets(answers, k):
    truth = [majority([answers[i] for i in subset]) == 0 for subset in combinations(range(6), k)]
    accuracy = pool.majority_accuracy(chains(answers), k, num_subsets=2000)
    tolerance = 1e-12 if k in (1, 6) else 4.5 * 0.5 / 2000**0.5
    assert accuracy == pytest.approx(np.mean(truth), abs=tolerance)


@settings(max_examples=60, deadline=None)
@given(answers_of_six, st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=6, max_size=6), st.integers(1, 6))
def test_best_is_the_mean_over_subsets(answers, scores, k):
    subsets = list(combinations(range(6), k))
    truth = [best([answers[i] for i in subset], [scores[i] for i in subset]) == 0 for subset in subsets]
    assert pool.best_accuracy(chains(answers, scores=scores), k) == pytest.approx(np.mean(truth))


def test_the_pool_is_self_consistency_and_its_record_holds_every_chain(make_decoder):
    task = Digits()
    problems = task.problems(4)
    pooled = td.solve(make_decoder(), problems, strategy=ChainPool(8), task=task, verifier=Length())
    voted = td.solve(make_decoder(), problems, strategy=SelfConsistency(8), task=task)
    pools = [pool.pooled_chains(s.tree, task, s.problem) for s in pooled.solutions]
    for solution, vote, sampled in zip(pooled.solutions, voted.solutions, pools, strict=True):
        assert (solution.answer, solution.text) == (vote.answer, vote.text)
        assert solution.spending.generated_tokens == sampled.tokens.sum() == vote.spending.generated_tokens
        assert len(sampled.right) == 8
        assert pool.majority_accuracy(sampled, 8) == vote.correct
        texts = [solution.tree.text(leaf) for leaf in solution.tree.leaves()]
        assert sampled.right.tolist() == [task.verify(solution.problem, text) for text in texts]
        np.testing.assert_allclose(sampled.scores, [length(text) for text in texts])
    curve = pool.curve(pools, [1, 2, 8], "majority")
    np.testing.assert_allclose(curve[:, 2], [s.correct for s in voted.solutions])
    np.testing.assert_allclose(curve[:, 0], [each.right.mean() for each in pools])


def test_a_chain_that_was_cut_off_has_no_answer():
    cut = PooledChains(np.array([-1, 0]), np.array([True, False]), np.array([0.9, 0.1]), np.ones(2, np.int64))
    assert pool.majority_accuracy(cut, 2) == 0.0
    assert pool.best_accuracy(cut, 2) == 0.0


class EveryText(Digits):
    def verify(self, problem, text):
        return True


def test_a_solution_without_an_answer_is_right_nowhere(make_decoder):
    task = EveryText()
    result = td.solve(make_decoder(), task.problems(6), strategy=ChainPool(3), task=task)
    pools = [pool.pooled_chains(s.tree, task, s.problem) for s in result.solutions]
    assert {True, False} == {bool(right) for sampled in pools for right in sampled.right}
    for solution, sampled in zip(result.solutions, pools, strict=True):
        assert sampled.right.tolist() == (sampled.classes >= 0).tolist()
        assert solution.correct == (solution.answer is not None)
    single = td.solve(make_decoder(), task.problems(6), strategy=SelfConsistency(1), task=task)
    assert {solution.correct for solution in single.solutions} == {True, False}
    assert [solution.correct for solution in single.solutions] == [s.answer is not None for s in single.solutions]


def test_bad_arguments():
    with pytest.raises(ValueError, match="k: expected from 1 to 2"):
        pool.majority_accuracy(chains([0, 1]), 3)
    with pytest.raises(ValueError, match="not all of them have a score"):
        pool.best_accuracy(chains([0, 1]), 1)

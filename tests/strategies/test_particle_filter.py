"""Particle filter: resampling, its trigger, and votes by weight."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_task import FakeTask, Recorder
from support.strategy_cases import ENDLESS, parents_of, solve_one

import treedecode as td
from treedecode.strategies.particle_filter import effective_sample_size, systematic_resampling

weights_of = st.lists(st.floats(0.01, 1), min_size=1, max_size=12).map(lambda x: np.array(x) / sum(x))


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

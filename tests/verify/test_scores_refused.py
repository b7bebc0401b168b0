"""Scores that a strategy cannot use: refused before the run by the kind of verifier, or when a function returns one."""

from dataclasses import replace

import pytest
from support.fake_task import FakeTask, Recorder, rate, talkative_decoder

import treedecode as td
from treedecode.verify import Judge, Likelihood, TextScorer, value_judge

TASK = FakeTask()
WEIGHTED = [
    td.BestOfN(num_samples=3, answer="weighted"),
    td.StepBeamSearch(num_beams=2, width=2),
    td.DVTS(num_beams=2, width=2),
    td.REBASE(width=2),
    td.ETS(width=2),
]


class Output(Recorder):
    """Scores like a reward model with one label, which may be any number."""

    probability = False

    def __repr__(self):
        return "Output()"


def solve(strategy, verifier, task=TASK):
    dec = talkative_decoder()
    try:
        return td.solve(dec, task.problems(2), strategy=strategy, task=task, verifier=verifier)
    finally:
        dec.check_integrity()
        solve.num_forwards = len(dec.model.forwards)


@pytest.mark.parametrize("strategy", WEIGHTED, ids=lambda strategy: strategy.name)
@pytest.mark.parametrize("verifier", [Likelihood(), Output()], ids=repr)
def test_weighted_votes_need_scores_that_are_not_negative(strategy, verifier):
    with pytest.raises(ValueError, match=r'answer: "weighted" adds scores up.*answer="best" takes any'):
        solve(strategy, verifier)
    assert solve.num_forwards == 0
    solve(replace(strategy, answer="best"), verifier)


def test_particles_need_probabilities_or_logits():
    with pytest.raises(
        ValueError, match=r"is_logit: False needs probabilities, and Likelihood.*is_logit=True takes any"
    ):
        solve(td.ParticleFilter(num_particles=2), Likelihood())
    assert solve.num_forwards == 0
    solve(td.ParticleFilter(num_particles=2, is_logit=True, answer="weighted"), Likelihood())


@pytest.mark.parametrize("strategy", WEIGHTED, ids=lambda strategy: strategy.name)
def test_a_function_is_refused_when_it_gives_a_negative_score(strategy):
    for verifier in (rate, TextScorer(rate), value_judge("so", max_new_tokens=2), Judge("so", len, max_new_tokens=2)):
        solve(strategy, verifier)
    with pytest.raises(ValueError, match=r'weighted votes need scores >= 0, got -.*answer="best" takes any scores'):
        solve(strategy, lambda problem, text: -1.0 - len(text))


class Silent(FakeTask):
    def extract(self, text):
        return None


@pytest.mark.parametrize("answer", ["weighted", "majority"])
def test_without_any_answer_the_best_scored_solution_is_shown(answer):
    differ = 0
    for seed in range(4):
        asked = Recorder()
        strategy = td.StepBeamSearch(num_beams=4, width=2, answer=answer)
        dec, task = talkative_decoder(), Silent(end=("nothing",), stop="nothing", max_step_tokens=14)
        [solution] = td.solve(dec, task.problems(1), strategy=strategy, task=task, verifier=asked, seed=seed).solutions
        last = asked.calls[-1]
        assert (solution.answer, solution.text, solution.score) == (None, max(last, key=lambda one: one[1])[0], 0.0)
        differ += solution.text != last[0][0]
    assert differ

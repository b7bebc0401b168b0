"""Beam search over steps and DVTS: the beams that go on, lookahead, and the choice among complete solutions."""

from collections import Counter

import numpy as np
import pytest
from support.fake_task import FakeTask, Recorder, rate
from support.fakes import FakeModel, FakeTokenizer, fake_decoder
from support.strategy_cases import ENDLESS, parents_of, solve_one

import treedecode as td
from treedecode.strategies.step_beam_search import next_steps

TASK = FakeTask(max_new_tokens=30)  # more than five steps of four


def solved(strategy, verifier, seed):
    """Solves a problem on a model without an end of sequence, so that solutions end in full stops alone."""
    decoder = fake_decoder(FakeModel(eos_logit=-50.0))
    result = td.solve(decoder, TASK.problems(1), strategy=strategy, task=TASK, verifier=verifier, seed=seed)
    decoder.check_integrity()
    return result.solutions[0]


def complete_ones_get(score):
    return Recorder(lambda problem, text: score if text.endswith(".") else 0.25 + rate(problem, text) / 2)


@pytest.mark.parametrize(
    ("tree", "scores", "keep", "num_steps", "expected"),
    [
        ([0, 0, 0, 1, 1], [0.5, 0.5, 0.5, 0.1, 0.2], 2, 6, [3, 3, 0, 3, 3]),  # of equals the first
        ([0, 0, 0], [0.1, 0.9, 0.5], 3, 8, [2, 3, 3]),  # what is left over goes to the best
        ([2, 5], [0.1, 0.2], 4, 8, [8, 8]),  # fewer beams than are kept have more steps each
    ],
)
def test_next_steps_by_hand(tree, scores, keep, num_steps, expected):
    assert next_steps(np.array(tree), np.array(scores), keep, num_steps).tolist() == expected


def test_beams_go_on_from_the_best():
    asked = Recorder()
    solve_one(td.StepBeamSearch(num_beams=6, width=3), asked, task=ENDLESS)
    assert [len(call) for call in asked.calls[:2]] == [6, 6]
    for before, children in parents_of(asked.calls[:3]):
        best = sorted(before, key=lambda one: -one[1])[:2]
        assert [count > 0 for count in children] == [one in best for one in before]


def test_lookahead_rates_the_steps_further_on():
    plain, ahead = Recorder(), Recorder()
    task = ENDLESS
    solve_one(td.StepBeamSearch(num_beams=2, width=2), plain, task=task)
    solve_one(td.StepBeamSearch(num_beams=2, width=2, lookahead=2), ahead, task=task)
    for (step, _), (rolled, _) in zip(plain.calls[0], ahead.calls[0], strict=True):
        assert rolled.startswith(step)
        assert len(FakeTokenizer().encode(rolled)) > len(FakeTokenizer().encode(step))


def test_trees_of_dvts_know_nothing_of_each_other():
    asked, task = Recorder(), ENDLESS
    solve_one(td.DVTS(num_beams=6, width=2), asked, task=task)
    first = [text for text, _ in asked.calls[0]]

    def other(problem, text):
        score = rate(problem, text)
        return 1 - score if any(text.startswith(begin) for begin in first[:2]) else score

    changed = Recorder(other)
    solve_one(td.DVTS(num_beams=6, width=2), changed, task=task)
    for before, after in zip(asked.calls, changed.calls, strict=True):
        assert len(before) == len(after) == 6
        assert before[2:] == after[2:]
    assert asked.calls[1][:2] != changed.calls[1][:2]
    for before, children in parents_of(asked.calls[:3]):
        for i in range(0, 6, 2):
            pair = [score for _, score in before[i : i + 2]]
            assert (children[i] > 0, children[i + 1] > 0) == (pair[0] >= pair[1], pair[0] < pair[1])


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_complete_solutions_do_not_displace_growing_beams(score):
    mixed = 0
    for seed in range(8):
        asked = complete_ones_get(score)
        solved(td.StepBeamSearch(num_beams=6, width=3, max_steps=5), asked, seed)
        assert {len(call) for call in asked.calls} == {6}
        for before, children in parents_of(asked.calls):
            growing = sorted((one for one in before if not one[0].endswith(".")), key=lambda one: -one[1])
            went_on = {one for one, count in zip(before, children, strict=True) if count}
            assert went_on == set(growing[:2])
            mixed += len(growing) < 6
    assert mixed


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_tree_of_dvts_goes_on_while_one_of_its_beams_grows(score):
    mixed = 0
    for seed in range(12):
        asked = complete_ones_get(score)
        solved(td.DVTS(num_beams=6, width=3, max_steps=5), asked, seed)
        for (before, children), after in zip(parents_of(asked.calls), asked.calls[1:], strict=True):
            went_on = 0
            for i in range(0, len(before), 3):
                growing = [one for one in before[i : i + 3] if not one[0].endswith(".")]
                best = max(growing, key=lambda one: one[1], default=None)
                assert [count > 0 for count in children[i : i + 3]] == [one == best for one in before[i : i + 3]]
                mixed += 0 < len(growing) < 3
                went_on += 3 * bool(growing)
            assert len(after) == went_on
    assert mixed


@pytest.mark.parametrize("answer", ["best", "weighted", "majority"])
@pytest.mark.parametrize("strategy", [td.StepBeamSearch, td.DVTS])
def test_the_answer_is_chosen_among_all_complete_solutions(strategy, answer):
    for seed in range(8):
        asked = Recorder()
        solution = solved(strategy(num_beams=6, width=3, answer=answer), asked, seed)
        complete = [one for call in asked.calls for one in call if one[0].endswith(".")]
        found = [one for one in complete if TASK.extract(one[0]) is not None]
        if answer == "best":
            assert (solution.text, solution.score) == max(found, key=lambda one: one[1])
            continue
        votes = Counter()
        for text, score in found:
            votes[TASK.extract(text).lower()] += score if answer == "weighted" else 1
        assert votes[solution.answer.lower()] == max(votes.values())
        assert solution.score == pytest.approx(max(votes.values()) / sum(votes.values()))

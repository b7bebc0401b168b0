"""Limits in seconds, on a clock that forwards and verifiers move on."""

import asyncio
import time

import pytest
from support.fake_task import FakeTask, rate, talkative_decoder
from support.gates import gate

import treedecode as td

TASK = FakeTask(end=("nothing",), max_new_tokens=10)  # chains of ten tokens, or of fewer with an end of sequence


class Clock:
    """The machine's, and what has been added to it."""

    def __init__(self):
        self.ahead, self._machine = 0.0, time.monotonic

    def __call__(self):
        return self._machine() + self.ahead


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def decoder(clock, **options):
    """A decoder whose forwards take 10 seconds."""
    dec = talkative_decoder(**options)
    forward = dec.model.forward

    def slow(*arguments):
        clock.ahead += 10
        return forward(*arguments)

    dec.model.forward = slow
    return dec


def solve(dec, count, verifier=None, **settings):
    strategy = td.SelfConsistency(2) if verifier is None else td.BestOfN(2)
    solutions = td.solve(dec, TASK.problems(count), strategy=strategy, task=TASK, verifier=verifier, **settings)
    assert dec.num_branches == 0
    dec.check_integrity()
    return solutions.solutions


def test_the_time_of_a_problem_is_not_that_of_those_before_it(clock):
    enough, little = (td.Budget(per_problem=td.Budget(seconds=seconds)) for seconds in (150, 45))
    before = clock.ahead
    found = solve(decoder(clock, max_branches=3), 8, budget=enough)
    assert clock.ahead - before > 400, "they come one after another"
    assert not any(one.is_cut for one in found)
    found = solve(decoder(clock, max_branches=3), 8, budget=little)
    assert sum(one.is_cut for one in found) > 4
    assert all(one.spending.generated_tokens for one in found)


@pytest.mark.parametrize("per_problem", [False, True])
def test_a_scorer_that_is_waited_for_is_given_up(clock, per_problem):
    begun = []

    async def scorer(problem, text):
        begun.append(text)
        clock.ahead += 300
        await asyncio.Event().wait()

    limit = td.Budget(seconds=400)
    found = solve(decoder(clock), 3, scorer, budget=td.Budget(per_problem=limit) if per_problem else limit)
    assert begun
    assert all(one.is_cut and one.text for one in found)


def test_a_function_that_takes_its_time_is_not_called_again(clock):
    asked = []

    def slow(problem, text):
        asked.append(problem.id)
        clock.ahead += 100
        return rate(problem, text)

    same_length = td.Sampling(ignore_eos=True)  # so that all want to be scored after the same forward
    found = solve(decoder(clock), 4, slow, budget=td.Budget(seconds=250), sampling=same_length)
    assert asked == ["test/0"] * 2
    assert {one.problem.id for one in found if not one.is_cut} <= set(asked)
    assert all(one.text for one in found)


def test_a_verifier_that_runs_out_of_its_own_time_has_failed(clock):
    async def scorer(problem, text):
        raise TimeoutError("no answer from the judge")

    with pytest.raises(TimeoutError, match="no answer from the judge") as error:
        solve(decoder(clock), 2, scorer, budget=td.Budget(seconds=1e6))
    assert any("while solving the problem" in note for note in error.value.__notes__)


def test_what_follows_a_cut_problem_has_time(clock):
    """A callback that scores on another decoder, when the problem before it has run out of time."""
    scored = []

    def later(solution):
        scores = solve(decoder(clock), 1, lambda problem, text: 0.5)
        scored.append((solution.is_cut, scores[0].score))

    solve(decoder(clock), 2, budget=td.Budget(per_problem=td.Budget(seconds=35)), callback=later)
    assert scored == [(True, 0.5)] * 2


def test_a_run_within_a_verifier_has_the_time_of_the_outer_one(clock):
    asked = []

    def inner(problem, text):
        asked.append(text)
        clock.ahead += 100
        return 0.5

    def outer(problem, text):
        return float(solve(decoder(clock), 3, inner)[0].score or 0.0)

    [solution] = solve(decoder(clock), 1, outer, budget=td.Budget(seconds=400))
    assert 0 < len(asked) < 4
    assert solution.text


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_dynamic_allocation_waits_no_longer_than_the_time_it_has(clock, mode):
    """A problem that waits for what the others do is cut; its chain stays."""
    strategy = td.DynamicAllocation(budget=3, gate=gate(None, TASK), mode=mode, lag=1)
    dec = decoder(clock)
    limit = td.Budget(per_problem=td.Budget(seconds=200))
    found = td.solve(dec, TASK.problems(6), strategy=strategy, task=TASK, budget=limit).solutions
    assert all(one.text and one.spending.generated_tokens for one in found)
    assert any(one.is_cut for one in found)
    assert dec.num_branches == 0
    dec.check_integrity()

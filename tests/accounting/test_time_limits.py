"""Limits in seconds, tested with a clock that forwards and verifiers advance."""

import asyncio
import time

import pytest
from support.fake_task import FakeTask, rate, talkative_decoder
from support.gates import gate

import treedecode as td

TASK = FakeTask(end=("nothing",), max_new_tokens=10)  # chains of ten tokens, or of fewer with an end of sequence


class Clock:
    """The machine's clock plus `ahead` seconds."""

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
    """Makes a decoder whose forwards take 10 seconds."""
    dec = talkative_decoder(**options)
    forward = dec.model.forward

    def slow(*arguments):
        clock.ahead += 10
        return forward(*arguments)

    dec.model.forward = slow
    return dec


def solve(dec, count, verifier=None, **settings):
    strategy = td.SelfConsistency(2) if verifier is None else td.BestOfN(2)
    result = td.solve(dec, TASK.problems(count), strategy=strategy, task=TASK, verifier=verifier, **settings)
    assert dec.num_branches == 0
    dec.check_integrity()
    return result.solutions


def test_the_time_of_a_problem_begins_with_its_branches(clock):
    enough, little = (td.Budget(per_problem=td.Budget(seconds=seconds)) for seconds in (150, 45))
    too_long = [solution.is_cut for solution in solve(decoder(clock, max_branches=3), 8)]
    before = clock.ahead
    solutions = solve(decoder(clock, max_branches=3), 8, budget=enough)
    assert clock.ahead - before > 400, "they come one after another"
    assert [solution.is_cut for solution in solutions] == too_long
    solutions = solve(decoder(clock, max_branches=3), 8, budget=little)
    assert sum(solution.is_cut for solution in solutions) > 4
    assert all(solution.spending.generated_tokens for solution in solutions)


@pytest.mark.parametrize("per_problem", [False, True])
def test_a_scorer_is_cancelled_when_time_is_up(clock, per_problem):
    begun = []

    async def scorer(problem, text):
        begun.append(text)
        clock.ahead += 300
        await asyncio.Event().wait()

    limit = td.Budget(seconds=400)
    solutions = solve(decoder(clock), 3, scorer, budget=td.Budget(per_problem=limit) if per_problem else limit)
    assert begun
    assert all(solution.is_cut and solution.text for solution in solutions)


def test_a_blocking_scorer_is_not_called_again_after_the_time(clock):
    asked = []

    def slow(problem, text):
        asked.append(problem.id)
        clock.ahead += 100
        return rate(problem, text)

    same_length = td.Sampling(ignore_eos=True)  # so that all want to be scored after the same forward
    solutions = solve(decoder(clock), 4, slow, budget=td.Budget(seconds=250), sampling=same_length)
    assert asked == ["test/0"] * 2
    assert {solution.problem.id for solution in solutions if not solution.is_cut} <= set(asked)
    assert all(solution.text for solution in solutions)


def test_a_timeout_of_the_verifier_is_an_error(clock):
    async def scorer(problem, text):
        raise TimeoutError("no answer from the judge")

    with pytest.raises(TimeoutError, match="no answer from the judge") as error:
        solve(decoder(clock), 2, scorer, budget=td.Budget(seconds=1e6))
    assert any("while solving the problem" in note for note in error.value.__notes__)


def test_a_callback_after_a_cut_problem_has_time(clock):
    """The callback scores on another decoder after the time of its problem is up."""
    scored = []

    def later(solution):
        scores = solve(decoder(clock), 1, lambda problem, text: 0.5)
        scored.append((solution.is_cut, scores[0].score))

    solve(decoder(clock), 2, budget=td.Budget(per_problem=td.Budget(seconds=35)), callback=later)
    assert scored == [(True, 0.5)] * 2


def test_a_run_within_a_verifier_ends_with_the_outer_one(clock):
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
    """A problem that waits for the others is cut, and keeps its chain."""
    strategy = td.DynamicAllocation(budget=3, gate=gate(None, TASK), mode=mode, lag=1)
    dec = decoder(clock)
    limit = td.Budget(per_problem=td.Budget(seconds=200))
    solutions = td.solve(dec, TASK.problems(6), strategy=strategy, task=TASK, budget=limit).solutions
    assert all(solution.text and solution.spending.generated_tokens for solution in solutions)
    assert any(solution.is_cut for solution in solutions)
    assert dec.num_branches == 0
    dec.check_integrity()

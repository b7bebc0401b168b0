"""Each op and each wait of a call fails once: nothing of the call is left, and the next call works."""

import functools
import inspect

import pytest
from support.fake_task import FakeTask, Recorder, talkative_decoder
from support.fakes import fake_decoder

import treedecode as td
from treedecode.cache.page_pool import PagePool
from treedecode.engine.branch_store import BranchStore
from treedecode.engine.engine import Engine

PROMPTS = [list(range(2, 15)), list(range(2, 12)), [40, 41, 42]]
TASK = FakeTask()
SAMPLING = td.Sampling(seed=3)


class Planted(Exception):
    """The error that is planted."""


class Faults:
    """Counts calls of what may fail, and lets one of them raise."""

    def __init__(self, dec, patch):
        self.number, self.fail_at = 0, None
        places = [
            (PagePool, ("append", "fork", "allocate_rows")),
            (BranchStore, ("open", "fork", "append")),
            (Engine, ("prefill", "sample", "logits")),
            (type(dec.model), ("forward",)),
        ]
        for owner, names in places:
            for name in names:
                patch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _strike(self):
        self.number += 1
        if self.number == self.fail_at:
            raise Planted

    def _wrapped(self, function):
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def call(*args, **options):
                result = await function(*args, **options)
                self._strike()  # what was awaited has been done
                return result

        else:

            @functools.wraps(function)
            def call(*args, **options):
                self._strike()
                return function(*args, **options)

        return call


async def _search_frontier(dec):
    with await dec.roots(PROMPTS) as roots, roots.fork(3) as frontier:
        await frontier.extend(sampling=SAMPLING, max_new_tokens=5)
        frontier.append(".")
        with frontier.fork(2) as wide:
            await wide.extend(sampling=SAMPLING, max_new_tokens=4)
            return wide.texts()


def solve(strategy, dec):
    result = td.solve(dec, TASK.problems(2), strategy=strategy, task=TASK, verifier=Recorder())
    return [(solution.answer, solution.text, solution.score) for solution in result.solutions]


CALLS = {
    "generate": lambda dec: dec.generate(PROMPTS, num_branches=3, sampling=SAMPLING, max_new_tokens=6),
    "beam search": lambda dec: dec.beam_search(PROMPTS, num_beams=3, max_new_tokens=6),
    "frontier": lambda dec: dec.run(_search_frontier(dec)),
    "best of n": functools.partial(solve, td.BestOfN(num_samples=3)),
    "step beam search": functools.partial(solve, td.StepBeamSearch(num_beams=2, width=2, max_steps=3, answer="best")),
    "mcts": functools.partial(solve, td.MCTS(num_simulations=4, width=2)),
    "particle filter": functools.partial(solve, td.ParticleFilter(num_particles=3)),
}


@pytest.mark.parametrize("captured", [False, True], ids=["op by op", "captured"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_nothing_is_left_of_a_call_that_fails(call, captured, monkeypatch):
    make = talkative_decoder if isinstance(call, functools.partial) else fake_decoder
    want = call(make(captured=captured))
    dec = make(captured=captured)
    faults = Faults(dec, monkeypatch)
    call(dec)
    assert faults.number > 5
    num_failed, at = 0, 0
    while True:
        at += 1
        faults.number, faults.fail_at = 0, at
        try:
            call(dec)
        except Planted:
            num_failed += 1
        if faults.number < at:
            break
        faults.fail_at = None
        dec.check_integrity()
        pool, engine = dec.engine.pool, dec.engine
        assert dec.num_branches == 0
        assert pool.num_free_rows == pool.max_branches
        assert pool.num_free_pages + len(engine.store.index.pages()) == pool.num_pages
        assert dec.recorder.num_accounts == 0
        assert len(engine.jobs) == engine.num_beam_searches == 0
        assert engine.store.lock.acquire(blocking=False)
        engine.store.lock.release()
        assert call(dec) == want, f"the call after the one that failed at {at}"
    assert num_failed > 5

"""One problem solved by a strategy, on a model that is a hash, and what its verifier was asked."""

import itertools

from support.fake_task import FakeTask, Recorder, talkative_decoder
from support.fakes import FakeModel, fake_decoder

import treedecode as td

TASK = FakeTask()
ENDLESS = FakeTask(stop="nothing", end=("nothing",), max_step_tokens=3)


def solve_one(strategy, verifier=None, task=TASK, seed=0):
    # no end of sequence either where no text is to end
    decoder = fake_decoder(FakeModel(eos_logit=-50.0)) if "nothing" in task.end else talkative_decoder()
    settings = {"strategy": strategy, "task": task, "verifier": verifier or Recorder(), "seed": seed}
    [solution] = td.solve(decoder, task.problems(1), **settings).solutions
    decoder.check_integrity()
    return solution


def parents_of(calls):
    """For each call after the first, how many of its texts go on from each text of the one before."""
    for before, after in itertools.pairwise(calls):
        yield before, [sum(text.startswith(old) and text != old for text, _ in after) for old, _ in before]

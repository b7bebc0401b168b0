"""Solves one problem by a strategy on a model that is a hash, and follows the texts that its verifier scored."""

import itertools

from support.fake_task import FakeTask, Recorder, talkative_decoder
from support.fakes import FakeModel, fake_decoder

import treedecode as td

TASK = FakeTask()
ENDLESS = FakeTask(stop="nothing", end=("nothing",), max_step_tokens=3)


class Agreeing(FakeTask):
    """Every text comes to the same answer."""

    def extract(self, text):
        return "yes"


def solve_one(strategy, verifier=None, task=TASK, seed=0):
    """Solves a problem; where no text is to end, the model gives no end of sequence either."""
    decoder = fake_decoder(FakeModel(eos_logit=-50.0)) if "nothing" in task.end else talkative_decoder()
    settings = {"strategy": strategy, "task": task, "verifier": verifier or Recorder(), "seed": seed}
    [solution] = td.solve(decoder, task.problems(1), **settings).solutions
    decoder.check_integrity()
    return solution


def parents_of(calls):
    """Counts, for each call of the verifier after the first, its texts that go on from each text of the call before."""
    for before, after in itertools.pairwise(calls):
        yield before, [sum(text.startswith(old) and text != old for text, _ in after) for old, _ in before]

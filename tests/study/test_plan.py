"""Entries of the plan: each spends compute on what its name says, and on nothing else."""

from support.fakes import FakeModel, FakeTokenizer
from support.study_cases import Digits, Length

import treedecode as td
from treedecode.strategies import IterativeRefinement, SelfConsistency
from treedecode.study import rows
from treedecode.study.plan import MAX_PASSES, POOL_SIZE, default_plan
from treedecode.study.rows import Entry, Measured, Timing


class Judge(Length):
    """A verifier that generates two tokens for every score."""

    num_samples = 1

    def __repr__(self):
        return "Judge()"

    async def __call__(self, frontier, problem):
        with frontier.fork(1) as side:
            await side.extend(max_new_tokens=2)
        return await super().__call__(frontier, problem)


class Low(Length):
    """A verifier that no solution is good enough for."""

    def __repr__(self):
        return "Low()"

    async def __call__(self, frontier, problem):
        frontier.scores = [0.1 + length / 1000 for length in frontier.num_tokens]
        return frontier.scores


def entry(key, *, follows_instructions=False):
    (result,) = [each for each in default_plan("gate", follows_instructions=follows_instructions) if each.key == key]
    return result


def decoder():
    memory = 4000 * 4 * 2 * 2 * 16 * 4
    return td.Decoder(FakeModel(), FakeTokenizer(), kv_memory=memory, page_size=4, max_branches=128)


def test_votes_do_not_pay_for_scores():
    task, dec = Digits(), decoder()
    votes, pool = entry(f"self_consistency_{POOL_SIZE}"), entry("chain_pool")
    assert votes.label == f"Self-consistency ({POOL_SIZE} chains)"
    assert votes.label != pool.label
    costs = {}
    for planned in (votes, pool):
        for verifier in (None, Judge()):
            result = td.solve(dec, task.problems(2), strategy=planned.build(1.0, 1), task=task, verifier=verifier)
            costs[planned.key, verifier is not None] = result.ledger.total.generated_tokens
    assert costs[votes.key, True] == costs[votes.key, False] == costs[pool.key, False]
    assert costs[pool.key, True] > costs[pool.key, False]
    assert isinstance(votes.build(1.0, 1), SelfConsistency)


def test_ten_passes_can_happen_and_are_counted():
    class Open(Digits):
        def extract(self, text):
            return str(len(text)) + text  # hardly an answer twice

    for follows_instructions in (True, False):
        strategy = entry("refinement", follows_instructions=follows_instructions).build(1.0, 1)
        assert isinstance(strategy, IterativeRefinement)
        assert (strategy.max_passes, strategy.good, strategy.max_repeats) == (MAX_PASSES, 0.99, MAX_PASSES - 1)
    dec, task = decoder(), Open()
    problems = task.problems(3)
    result = td.solve(dec, problems, strategy=strategy, task=task, verifier=Low())
    timing = Timing(False, 1.0, 0.5, None, "none", [], [], [], True)
    measured = Measured(Entry("r", "R", "iterative_refinement"), strategy, result.solutions, timing)
    assert rows.row(measured, measured)["passes"] == MAX_PASSES
    once = IterativeRefinement(max_passes=1, critique_prompt="", good=None)
    fewer = td.solve(dec, problems, strategy=once, task=task, verifier=Low())
    assert rows.row(Measured(measured.entry, once, fewer.solutions, timing), measured)["passes"] == 1

"""Run: one call of `solve`, a strategy on many problems side by side."""

import asyncio
import hashlib
import json
import math
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import asdict, fields, replace
from functools import cached_property
from typing import Any

from treedecode.accounting.budget import DEADLINE, Budget
from treedecode.accounting.ledger import Ledger, RunSpending
from treedecode.accounting.meter import BudgetExhausted, Spending
from treedecode.engine.sampling import Sampling
from treedecode.models.fingerprint import fingerprint
from treedecode.search.branch_quota import BranchQuota
from treedecode.search.checks import checked_problems, checked_prompts, checked_task, warn_of_little_room
from treedecode.search.journal import Journal
from treedecode.search.run_account import RunAccount
from treedecode.search.run_config import RunConfig
from treedecode.search.search import Outcome, Search
from treedecode.search.solutions import Result, Solution
from treedecode.search.strategy import Strategy
from treedecode.tasks.base import Problem
from treedecode.verify.scorers import scorer_name, scorer_of
from treedecode.verify.value import Value

_SPENT_SECONDS = 10.0  # between two entries of what the run has spent; a solution has one too


class Run:
    """Solves the problems of a `RunConfig`.

    Raises:
        TypeError: the problems, the task, the verifier or a prompt are something else.
        ValueError: the decoder, the task or the verifier do not fit the strategy, a prompt does not fit the model, or
            the budget cannot be kept.
    """

    def __init__(self, config: RunConfig) -> None:
        decoder, strategy = config.decoder, config.strategy
        self._decoder, self._strategy, self._config = decoder, strategy, config
        self._problems = checked_problems(config.problems)
        self._task = checked_task(config.task, self._problems)
        self._scorer = scorer_of(config.verifier)
        strategy.check(decoder, self._task, self._scorer)
        if isinstance(self._scorer, Value):
            self._scorer.check(decoder.model)
        self._branches_per_problem = strategy.num_branches * (1 + getattr(self._scorer, "num_samples", 0))
        if self._branches_per_problem > decoder.pool.max_branches:
            raise ValueError(
                f"strategy: {strategy.name} needs {self._branches_per_problem} branches for a problem, and the decoder "
                f"has {decoder.pool.max_branches} (max_branches)"
            )
        self._budget = config.budget or Budget()
        self._problem_budget = self._budget.per_problem or Budget()
        self._sampling = config.sampling or Sampling()
        prompt_of = config.prompt or (lambda problem: problem.prompt)
        self._prompts = checked_prompts(
            decoder,
            {problem.id: prompt_of(problem) for problem in self._problems},
            special_tokens=config.prompt is not None,  # a question that spells one out means its text
        )
        max_tokens = min(self._task.max_new_tokens, self._problem_budget.tokens or math.inf)
        warn_of_little_room(decoder, max_tokens, self._prompts)
        self._quota = BranchQuota(decoder.pool.max_branches - decoder.num_branches)
        self._account = RunAccount(decoder, self._budget)
        self._shared: Any = None

    @property
    def description(self) -> dict[str, Any]:
        """Everything that all solutions depend on, for the journal."""
        model, num_samples = self._decoder.model, self._config.num_samples
        module = model.module
        description = {
            "strategy": repr(self._strategy) if num_samples is None else _without_samples(self._strategy),
            "task": self._task.name,
            "sampling": repr(self._sampling),
            "seed": int(self._config.seed),
            "verifier": scorer_name(self._scorer) or "None",
            "budget": repr(self._budget),
            "model": [getattr(module, "name_or_path", None), model.vocab_size, model.num_layers, str(model.dtype)],
            "weights": None if module is None else fingerprint(module),
            "max_tokens": self._decoder.max_tokens,
        }
        # Where problems share something, a solution depends on all others: the run can have no more of them later.
        shares = type(self._strategy).share is not Strategy.share
        if shares or replace(self._budget, per_problem=None) != Budget():
            description["problems"] = _digest(self._problem_digests.items())
        return description

    @cached_property
    def _problem_digests(self) -> dict[str, str]:
        """By id, a digest of a problem, with its worked examples and chat template, which are in no setting."""
        return {
            problem.id: _digest([self._prompts[problem.id].tolist(), problem.answer, dict(problem.data)])
            for problem in self._problems
        }

    async def solve(self) -> Result:
        """Solves all problems that the journal does not have.

        Raises:
            ValueError: the journal is another run's.
            Exception: of a verifier or a strategy.
        """
        if self._config.journal is None:
            return await self._solve_all(None)
        journal = Journal(self._config.journal, self.description, self._problem_digests, self._config.num_samples)
        try:
            return await self._solve_all(journal)
        finally:
            journal.close()

    async def _solve_all(self, journal: Journal | None) -> Result:
        solutions: dict[str, Solution] = {}
        smaller: dict[str, Solution] = {}
        earlier = None
        if journal is not None:
            with journal.reading():
                solutions = {
                    problem.id: Solution.from_json(journal.solutions[problem.id], problem)
                    for problem in self._problems
                    if problem.id in journal.solutions
                }
                smaller = {problem_id: solutions.pop(problem_id) for problem_id in journal.smaller}
                earlier = None if journal.spent is None else RunSpending.from_json(journal.spent)
        notes = {problem_id: solution.notes for problem_id, solution in solutions.items()}
        self._shared = self._strategy.share([problem.id for problem in self._problems], notes)
        self._account.open(earlier)
        callback = self._config.callback

        async def solve(problem: Problem) -> None:
            solution = await self._solve_one(problem, smaller.get(problem.id))
            solutions[problem.id] = solution
            if journal is not None:
                journal.add(solution.to_json(), asdict(self._account.spent()))
            if callback is not None:
                callback(solution)

        def note_spent() -> None:
            if journal is not None:
                journal.add_spent(asdict(self._account.spent()))

        try:
            if callback is not None:
                for solution in list(solutions.values()):
                    callback(solution)
            unsolved = [problem for problem in self._problems if problem.id not in solutions]
            await _side_by_side([solve(problem) for problem in unsolved], note_spent)
        except BaseException:
            note_spent()  # what searches have cost that will begin anew
            raise
        finally:
            spent = self._account.spent()
            self._account.close()
        in_order = [solutions[problem.id] for problem in self._problems]
        return Result(in_order, _ledger(in_order, spent))

    async def _solve_one(self, problem: Problem, earlier: Solution | None) -> Solution:
        """Solves a problem; `earlier`: its solution with fewer samples, which is added to."""
        meter, recorder = self._decoder.meter, self._decoder.recorder
        await self._quota.acquire(self._branches_per_problem)
        begin, is_cut = time.perf_counter(), False
        deadline = self._account.deadline(self._problem_budget)
        limit = asyncio.timeout(None if deadline is None else deadline - time.monotonic())
        outer_deadline = DEADLINE.set(deadline)
        account = self._problem_budget.open(meter, self._account.id)
        search = Search(
            self._decoder,
            self._task,
            problem,
            prompt=self._prompts[problem.id],
            sampling=self._sampling,
            seed=int(self._config.seed),
            account=account,
            quota=self._quota,
            num_branches=self._branches_per_problem,
            score=self._scorer,
            shared=self._shared,
            earlier=None if earlier is None else earlier.tree,
        )
        recorder.start(account, search.tree)
        try:
            async with limit:  # ends waits, for a scorer for instance; forwards are looked at by the meter
                outcome = await self._strategy.solve(search)
        except Exception as error:
            if not isinstance(error, BudgetExhausted) and not (isinstance(error, TimeoutError) and limit.expired()):
                error.add_note(f"while solving the problem {problem.id!r}")
                raise
            outcome, is_cut = search.best_so_far(), True
        finally:
            DEADLINE.reset(outer_deadline)
            recorder.stop(account)
            spending = meter.close(account)
            search.release_quota()
        seconds = time.perf_counter() - begin
        if earlier is not None:
            spending, seconds = earlier.spending + spending, earlier.seconds + seconds
        return self._solution(search, outcome, is_cut, spending, seconds)

    def _solution(self, search: Search, outcome: Outcome, is_cut: bool, spending: Spending, seconds: float) -> Solution:
        tree = search.tree
        for leaf in tree.leaves():
            if tree.nodes[leaf].status == "open" and search.is_complete(leaf):
                tree.nodes[leaf].status = "final"
        if outcome.node >= 0:
            tree.nodes[outcome.node].status = "answer"
        correct = self._task.verify(search.problem, outcome.text) if self._config.grade else None
        if correct is not None and outcome.answer is None:  # a text that was cut is none, whatever the task makes of it
            correct = False
        return Solution(
            problem=search.problem,
            answer=outcome.answer,
            text=outcome.text,
            score=outcome.score,
            is_cut=is_cut or (outcome.node >= 0 and search.is_out_of_tokens(outcome.node)),
            correct=correct,
            spending=spending,
            seconds=seconds,
            tree=tree,
            notes=search.notes,
        )


def _ledger(solutions: list[Solution], spent: RunSpending) -> Ledger:
    return Ledger(
        problems={solution.problem.id: solution.spending for solution in solutions},
        total=spent.spending,
        seconds={solution.problem.id: solution.seconds for solution in solutions},
        total_seconds=spent.seconds,
        busy_seconds=spent.busy_seconds,
        joules=spent.joules,
        energy_source=spent.energy_source,
    )


def _without_samples(strategy: Strategy) -> str:
    """Returns the repr of a strategy with its `num_samples` left open."""
    settings = {field.name: repr(getattr(strategy, field.name)) for field in fields(strategy)} | {"num_samples": "any"}
    return f"{type(strategy).__qualname__}({', '.join(f'{name}={value}' for name, value in settings.items())})"


def _digest(parts: Iterable[Any]) -> str:
    """Hashes values as JSON; one that JSON does not have counts by its type."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(json.dumps(part, skipkeys=True, default=lambda value: type(value).__qualname__).encode() + b"\n")
    return digest.hexdigest()


async def _side_by_side(work: list[Coroutine[Any, Any, None]], pulse: Callable[[], None]) -> None:
    """Runs coroutines side by side; the first error ends the others, and is raised once they have ended.

    Args:
        pulse: called every `_SPENT_SECONDS` meanwhile.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    together = asyncio.gather(*tasks)
    try:
        while not (await asyncio.wait([together], timeout=_SPENT_SECONDS))[0]:
            pulse()
        await together
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(together, *tasks, return_exceptions=True)

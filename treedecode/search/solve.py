"""solve: a strategy on many problems, all in the same forwards."""

import asyncio
import hashlib
import json
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from treedecode.accounting.budget import DEADLINE, Budget
from treedecode.accounting.energy import EnergyCounter
from treedecode.accounting.ledger import Ledger, RunSpending
from treedecode.accounting.meter import BudgetExhausted, Spending
from treedecode.decoding.decoder import Decoder, Prompt
from treedecode.engine.sampling import Sampling
from treedecode.models.fingerprint import fingerprint
from treedecode.search.branch_quota import Places
from treedecode.search.checks import checked_problems, checked_prompts, checked_task, warn_of_little_room
from treedecode.search.journal import Journal
from treedecode.search.search import Outcome, Search
from treedecode.search.solutions import Result, Solution
from treedecode.search.strategy import Strategy
from treedecode.tasks.base import Problem, Task
from treedecode.verify.scorers import scorer_name, scorer_of
from treedecode.verify.value import Value

_SPENT_SECONDS = 10.0  # between two entries of what the run has spent; a solution has one too


def solve(
    decoder: Decoder,
    problems: Iterable[Problem],
    *,
    strategy: Strategy,
    task: Task | None = None,
    verifier: Any = None,
    budget: Budget | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    prompt: Callable[[Problem], Prompt] | None = None,
    grade: bool = True,
    journal: str | None = None,
    callback: Callable[[Solution], None] | None = None,
) -> Result:
    """Runs a strategy on problems: `solve_async`, where its arguments are described, for code that is no coroutine."""
    return decoder.run(
        solve_async(
            decoder,
            problems,
            strategy=strategy,
            task=task,
            verifier=verifier,
            budget=budget,
            sampling=sampling,
            seed=seed,
            prompt=prompt,
            grade=grade,
            journal=journal,
            callback=callback,
        )
    )


async def solve_async(
    decoder: Decoder,
    problems: Iterable[Problem],
    *,
    strategy: Strategy,
    task: Task | None = None,
    verifier: Any = None,
    budget: Budget | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    prompt: Callable[[Problem], Prompt] | None = None,
    grade: bool = True,
    journal: str | None = None,
    callback: Callable[[Solution], None] | None = None,
) -> Result:
    """Runs a strategy on problems: as many side by side as the decoder has branches for, all in the same forwards.

    A problem's solution depends on the problem, the seed and the strategy alone: not on what runs beside it, nor on
    their order (where no budget of the whole run, no limit in seconds and no strategy that divides a budget among
    problems says otherwise).

    Args:
        strategy: for instance `TreeOfThoughts(depth=3, width=5)`.
        task: how texts are read; None: the one that the problems are of, as `Task.problems` gives them.
        verifier: scores branches: a scorer of `treedecode.verify`, or a function of (problem, text).
        budget: hard limits. A problem they cut short gets the best answer it had; one they kept from starting, none.
        sampling: how branches sample; its seed is not used.
        seed: of the run.
        prompt: what the model reads for a problem; by default the problem's own prompt.
        grade: whether the task checks the solutions, which the strategy never sees.
        journal: a file that solutions are written to as they come. A later call with the same arguments takes them from
            there and solves the rest, and its budget and ledger go on from what was spent.
        callback: called with every solution as it comes, those of the journal first.

    Raises:
        TypeError, ValueError: an argument is wrong (named); nothing has been started or written then.
        Exception: of a verifier or a strategy, with the problem's id in a note; the run ends, the journal stays.
    """
    run = _Run(
        decoder,
        checked_problems(problems),
        strategy,
        task,
        verifier,
        budget,
        sampling or Sampling(),
        seed,
        prompt,
        grade,
    )
    book = Journal(journal, run.description) if journal is not None else None
    try:
        return await run.run(book, callback)
    finally:
        if book is not None:
            book.close()


class _Run:
    """One call of `solve`."""

    def __init__(
        self,
        decoder: Decoder,
        problems: Sequence[Problem],
        strategy: Strategy,
        task: Task | None,
        verifier: Any,
        budget: Budget | None,
        sampling: Sampling,
        seed: int,
        prompt: Callable[[Problem], Prompt] | None,
        grade: bool,
    ) -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(f"strategy: expected a treedecode.strategies.Strategy, got {strategy!r}")
        own = getattr(strategy, "sampling", None)
        if own is not None and own.seed is not None:
            raise ValueError(f"sampling: {strategy.name} has the seed {own.seed}; branches take theirs from the run's")
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise TypeError(f"seed: expected an int, got {seed!r}")
        task = checked_task(task, problems)
        scorer = scorer_of(verifier)
        if strategy.needs_verifier and scorer is None:
            raise ValueError(f"verifier: {strategy.name} scores branches and needs one")
        strategy.check(decoder, task, scorer)
        if isinstance(scorer, Value):
            scorer.check(decoder.model)
        self._num_places = strategy.num_branches * (1 + getattr(scorer, "num_samples", 0))
        if self._num_places > decoder.pool.max_branches:
            raise ValueError(
                f"strategy: {strategy.name} needs {self._num_places} branches for a problem, and the decoder has "
                f"{decoder.pool.max_branches} (max_branches)"
            )
        self.decoder, self.problems, self.strategy, self.task = decoder, problems, strategy, task
        self.scorer, self.budget, self.sampling = scorer, budget or Budget(), sampling
        self.seed, self.grade = int(seed), grade
        prompts = {problem.id: problem.prompt if prompt is None else prompt(problem) for problem in problems}
        self._prompts = checked_prompts(decoder, prompts)
        alone = (self.budget.per_problem or Budget()).tokens
        warn_of_little_room(decoder, min(task.max_new_tokens, alone or math.inf), self._prompts)
        self._places = Places(decoder.pool.max_branches - decoder.num_branches)
        self._energy = EnergyCounter(decoder.pool.device)
        if self.budget.joules is not None and not self._energy.is_available:
            raise ValueError(f"budget: joules are limited, and energy is {self._energy.source}")
        self._account = -1
        self._earlier: RunSpending | None = None
        self._begin = self._busy = 0.0
        self._shared: Any = None

    @property
    def description(self) -> dict[str, Any]:
        """What the solutions depend on, for the journal."""
        model = self.decoder.model
        module = model.module
        return {
            "strategy": repr(self.strategy),
            "task": self.task.name,
            "sampling": repr(self.sampling),
            "seed": self.seed,
            "verifier": scorer_name(self.scorer) or "None",
            "budget": repr(self.budget),
            "model": [getattr(module, "name_or_path", None), model.vocab_size, model.num_layers, str(model.dtype)],
            "weights": None if module is None else fingerprint(module),
            "max_tokens": self.decoder.max_tokens,
            "problems": [problem.id for problem in self.problems],
            # worked examples and chat templates are in no setting
            "prompts": _digest(prompt.tolist() for prompt in self._prompts.values()),
            "answers": _digest([problem.answer, dict(problem.data)] for problem in self.problems),
        }

    async def run(self, journal: Journal | None, callback: Callable[[Solution], None] | None) -> Result:
        meter = self.decoder.meter
        done: dict[str, Solution] = {}
        earlier = None
        if journal is not None:
            with journal.reading():
                known = journal.solutions
                done = {p.id: Solution.from_json(known[p.id], p) for p in self.problems if p.id in known}
                earlier = None if journal.spent is None else RunSpending.from_json(journal.spent)
        notes = {name: solution.notes for name, solution in done.items()}
        self._shared = self.strategy.share([problem.id for problem in self.problems], notes)
        self._open(earlier)

        async def one(problem: Problem) -> None:
            solution = await self._solve(problem)
            done[problem.id] = solution
            if journal is not None:
                journal.add(solution.to_json(), asdict(self._spent()))
            if callback is not None:
                callback(solution)

        def note_spent() -> None:
            if journal is not None:
                journal.add_spent(asdict(self._spent()))

        try:
            if callback is not None:
                for solution in list(done.values()):
                    callback(solution)
            await _all([one(problem) for problem in self.problems if problem.id not in done], note_spent)
        except BaseException:
            note_spent()  # what searches have cost that will begin anew
            raise
        finally:
            spent = self._spent()
            meter.close(self._account)
        solutions = [done[problem.id] for problem in self.problems]
        ledger = Ledger(
            problems={solution.problem.id: solution.spending for solution in solutions},
            total=spent.spending,
            seconds={solution.problem.id: solution.seconds for solution in solutions},
            total_seconds=spent.seconds,
            busy_seconds=spent.busy_seconds,
            joules=spent.joules,
            energy_source=spent.energy_source,
        )
        return Result(solutions, ledger)

    def _open(self, earlier: RunSpending | None) -> None:
        """Opens the run's account with what earlier processes have spent; this one begins now."""
        meter = self.decoder.meter
        energy = self._energy.joules if self._energy.is_available else None
        if earlier is None:
            self._account = self.budget.open(meter, energy=energy)
        else:
            energy = None if earlier.joules is None else energy  # of which only a part would be known
            self._account = self.budget.open(
                meter, energy=energy, seconds=earlier.seconds, joules=earlier.joules or 0.0
            )
            meter.add(self._account, earlier.spending)
        self._earlier, self._begin, self._busy = earlier, time.perf_counter(), self.decoder.stats.busy_seconds

    def _spent(self) -> RunSpending:
        """By all processes of the run up to now."""
        here = RunSpending(
            Spending(),
            time.perf_counter() - self._begin,
            self.decoder.stats.busy_seconds - self._busy,
            self._energy.joules() if self._energy.is_available else None,
            self._energy.source,
        )
        spent = here if self._earlier is None else self._earlier + here
        return replace(spent, spending=self.decoder.meter.spending(self._account))

    def _until(self, alone: Budget) -> float | None:
        """When a problem that begins now has to end, by `time.monotonic`; None = no limit in seconds."""
        now, found = time.monotonic(), [DEADLINE.get()]  # of a run whose verifier this one is part of
        if self.budget.seconds is not None:
            earlier = 0.0 if self._earlier is None else self._earlier.seconds
            found.append(now + self.budget.seconds - earlier - (time.perf_counter() - self._begin))
        if alone.seconds is not None:
            found.append(now + alone.seconds)
        return min((until for until in found if until is not None), default=None)

    async def _solve(self, problem: Problem) -> Solution:
        alone = self.budget.per_problem or Budget()
        await self._places.take(self._num_places)
        begin, is_cut = time.perf_counter(), False
        until = self._until(alone)
        limit, outer = asyncio.timeout(None if until is None else until - time.monotonic()), DEADLINE.set(until)
        account = alone.open(self.decoder.meter, self._account)
        search = Search(
            self.decoder,
            self.task,
            problem,
            prompt=self._prompts[problem.id],
            sampling=self.sampling,
            seed=self.seed,
            account=account,
            places=self._places,
            num_places=self._num_places,
            score=self.scorer,
            shared=self._shared,
        )
        self.decoder.recorder.start(account, search.tree)
        try:
            async with limit:  # whatever is waited for, a scorer for instance; forwards are looked at by the meter
                outcome = await self.strategy.solve(search)
        except Exception as error:
            if not isinstance(error, BudgetExhausted) and not (isinstance(error, TimeoutError) and limit.expired()):
                error.add_note(f"while solving the problem {problem.id!r}")
                raise
            outcome, is_cut = search.best_so_far(), True
        finally:
            DEADLINE.reset(outer)
            self.decoder.recorder.stop(account)
            spending = self.decoder.meter.close(account)
            search.give_places()
        return self._solution(search, outcome, is_cut, spending, time.perf_counter() - begin)

    def _solution(self, search: Search, outcome: Outcome, is_cut: bool, spending: Spending, seconds: float) -> Solution:
        for leaf in search.tree.leaves():
            if search.tree.nodes[leaf].status == "open" and search.is_complete(leaf):
                search.tree.nodes[leaf].status = "final"
        if outcome.node >= 0:
            search.tree.nodes[outcome.node].status = "answer"
        correct = None
        if self.grade:  # a text that was cut is no solution, whatever the task makes of it
            correct = outcome.answer is not None and self.task.verify(search.problem, outcome.text)
        return Solution(
            search.problem,
            outcome.answer,
            outcome.text,
            outcome.score,
            is_cut,
            correct,
            spending,
            seconds,
            search.tree,
            search.notes,
        )


def _digest(parts: Iterable[Any]) -> str:
    """Of JSON; anything else counts by its type."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(json.dumps(part, skipkeys=True, default=lambda value: type(value).__qualname__).encode() + b"\n")
    return digest.hexdigest()


async def _all(work: list[Coroutine[Any, Any, None]], pulse: Callable[[], None]) -> None:
    """Runs coroutines side by side; the first error ends the others, and is raised once they have.

    Args:
        pulse: called every `_SPENT_SECONDS` meanwhile.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    together = asyncio.gather(*tasks)
    try:
        while not (await asyncio.wait([together], timeout=_SPENT_SECONDS))[0]:
            pulse()
        await together
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(together, *tasks, return_exceptions=True)

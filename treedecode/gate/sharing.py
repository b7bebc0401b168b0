"""What the problems of a run share while one budget is divided among them."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treedecode.gate.allocate import Bid, Grant, allocate, at_price
from treedecode.search import Search

MIN_PRICE = 1e-4  # from which a price that nobody had to pay for long comes back soon; a chain gains 1 at most


@dataclass(frozen=True)
class Terms:
    """How a budget is divided.

    Attributes:
        budget: mean cost of a problem, in units of what one chain of its own costs.
        max_chains: of one problem.
        wave: chains sampled at a time; after them the gate looks again.
        floor: chains that every problem gets.
    """

    budget: float
    max_chains: int
    wave: int
    floor: int

    def divide(self, bids: Sequence[Bid], alone: float, spent: float) -> list[Grant]:
        """The next wave of everyone, out of what is left.

        Args:
            alone, spent: of all problems of the run, those that have ended too.
        """
        left = self.budget * alone - spent
        grants, _ = allocate(bids, left, max_chains=self.max_chains, floor=self.floor, wave=self.wave)
        return [self.limited(grant) for grant in grants]

    def limited(self, grant: Grant) -> Grant:
        """The next wave of a grant."""
        return Grant(min(grant.num_chains, self.wave), grant.tree)


@dataclass
class Member:
    """A problem of the run.

    Attributes:
        bids: those it has still to make, of one that an earlier process has solved: what it did is known.
        bid: the one it waits with; None = it is at work.
        alone: what one chain of it costs, by its first bid.
        spent: in all, up to its latest bid or its end.
        left: it has ended.
        waiting: resolves with what it is given.
    """

    bids: list[Bid] = field(default_factory=list)
    bid: Bid | None = None
    alone: float = 0.0
    spent: float = 0.0
    left: bool = False
    waiting: asyncio.Future[Grant] | None = None

    def offer(self, bid: Bid) -> None:
        self.bid, self.spent = bid, bid.spent
        self.alone = self.alone or bid.alone


@dataclass
class Record:
    """What a problem did, for those that go on without it: its bids, and what it cost in all. JSON, in its notes."""

    bids: list[Bid]
    spent: float

    @classmethod
    def by_problem(cls, notes: Mapping[str, Mapping[str, Any]]) -> "dict[str, Record]":
        """The records in the notes of solutions."""
        return {
            problem: cls([Bid.from_json(bid) for bid in note.get("bids", ())], note["spent"])
            for problem, note in notes.items()
        }


class Meeting:
    """All problems of a run meet when each has had its wave; what is left of the budget is divided among them anew.

    A problem that gets nothing stays: others may come to cost less than was thought. When nobody gets anything, all
    end. What each gets depends on all bids and on nothing else. Problems that an earlier process solved take part with
    the bids they made, so that a run that goes on from a journal divides its budget as one that was never interrupted.
    """

    def __init__(self, terms: Terms, problems: Sequence[str], known: Mapping[str, Record]) -> None:
        self.terms = terms
        self._members = {problem: Member() for problem in problems}
        self._finals: dict[str, float] = {}
        for problem, record in known.items():
            self._members[problem].bids = list(record.bids)
            self._finals[problem] = record.spent
            self._replay(problem)

    async def decide(self, search: Search, bid: Bid) -> Grant:
        """What a problem gets next. It has to have released its branches."""
        member = self._members[search.problem.id]
        search.give_places()
        member.offer(bid)
        member.waiting = asyncio.get_running_loop().create_future()
        self._proceed()
        grant = await member.waiting
        if not grant.ends:
            await search.take_places()
        return grant

    def leave(self, problem: str, spent: float) -> None:
        """A problem has ended, however."""
        member = self._members[problem]
        member.left, member.spent, member.waiting = True, spent, None
        self._proceed()

    def _replay(self, problem: str) -> None:
        """The next bid of a problem that is solved already, or its end."""
        member = self._members[problem]
        if member.bids:
            member.offer(member.bids.pop(0))
        else:
            member.left, member.spent = True, self._finals[problem]

    def _proceed(self) -> None:
        """Divides the budget as long as nobody is at work."""
        while True:
            present = {name: member for name, member in self._members.items() if not member.left}
            bids = [member.bid for member in present.values() if member.bid is not None]
            if not present or len(bids) < len(present):
                return
            members = self._members.values()
            grants = self.terms.divide(bids, sum(one.alone for one in members), sum(one.spent for one in members))
            everyone_ends = all(grant.ends for grant in grants)
            for (name, member), grant in zip(present.items(), grants, strict=True):
                if grant.ends and not everyone_ends:
                    continue
                member.bid = None
                if everyone_ends:
                    member.left = True
                if name in self._finals:
                    self._replay(name)
                elif member.waiting is not None and not member.waiting.done():
                    member.waiting.set_result(grant)
            if everyone_ends:
                return


class Stream:
    """Problems come one after another; a price follows what they spend, so that in the mean it is the budget.

    Dual mirror descent with the entropy (Balseiro, Lu and Mirrokni, 2020): after every problem the logarithm of the
    price rises by `step` times what it spent above the budget, as a share of it. So the mean of all that is above the
    budget is the logarithm of how far the price has come, over step times problems: it goes to 0 wherever the price
    stays within its bounds. (The plain subgradient needs a step as small as the price, which is not known, and where it
    cuts the price off at 0 it stays below the budget for good.) Spending is counted in chains of mean cost, the price
    in expected right answers per such chain, so neither depends on how long chains are.

    Short runs cost what their first price makes of them: it moves by a factor e only after 1 / (step * share above the
    budget) problems, and not at all for the first `lag`. From a first price that is off by a factor f, n problems are
    off in the mean by up to about log(f) / (step * n) of the budget. The gate's own price for a budget (`Gate.price`)
    is off by as much as these problems differ from its calibration problems.

    The price of a problem follows the spending of those that came at least `lag` before it, whichever of the others
    have ended by then: so its solution does not depend on the machine, and `lag` problems can be under way at once.
    """

    def __init__(
        self,
        terms: Terms,
        problems: Sequence[str],
        known: Mapping[str, Record],
        *,
        price: float,
        step: float,
        lag: int,
    ) -> None:
        self.terms = terms
        self._step, self._lag = step, lag
        self._place = {problem: i for i, problem in enumerate(problems)}
        self._members = [Member() for _ in problems]
        self._price, self._count, self._alone = price, 0, 0.0  # after the first `_count` problems; sum of `alone`
        self._priced: dict[int, tuple[float, float]] = {0: (price, 0.0)}  # by count: the price, and a chain's mean cost
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}
        for problem, record in known.items():
            if record.bids:
                self._members[self._place[problem]].offer(record.bids[0])
            self.leave(problem, record.spent)

    @property
    def price(self) -> float:
        """As of the first problems that have all ended; expected right answers per chain."""
        return self._price

    async def decide(self, search: Search, bid: Bid) -> Grant:
        """What a problem gets next, at the price of its place in the stream."""
        place = self._place[search.problem.id]
        self._members[place].offer(bid)
        after = max(0, place - self._lag)
        while after not in self._priced:
            future = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(after, []).append(future)
            await future
        price, mean = self._priced[after]
        grant = at_price(bid, price / (mean or bid.alone), self.terms.max_chains, self.terms.wave)
        owed = self.terms.floor - bid.num_chains
        if grant.tree < 0 and owed > grant.num_chains:
            grant = Grant(owed)
        return self.terms.limited(grant)

    def leave(self, problem: str, spent: float) -> None:
        """A problem has ended, however."""
        member = self._members[self._place[problem]]
        member.left, member.spent = True, spent
        while self._count < len(self._members) and self._members[self._count].left:
            one = self._members[self._count]
            self._count += 1
            self._alone += one.alone
            mean = self._alone / self._count
            if mean > 0:
                above = (one.spent - self.terms.budget * one.alone) / mean
                price = self._price * math.exp(self._step * above / self.terms.budget)
                self._price = min(max(price, MIN_PRICE), 1.0)
            self._priced[self._count] = (self._price, mean)
            for future in self._waiting.pop(self._count, ()):
                if not future.done():
                    future.set_result(None)

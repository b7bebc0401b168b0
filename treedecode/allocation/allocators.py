"""What the problems of a run share while one budget is divided among them."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treedecode.allocation.allocate import Bid, Grant, allocate, at_price
from treedecode.search.search import Search

_ABOVE = 1.0 + 1e-9  # a price is that of the first step that was too expensive, which is not to be taken
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
        first: its first bid.
        bid: the one it waits with; None = it is at work.
        alone: what one chain of it costs, by its first bid.
        spent: in all, up to its latest bid or its end.
        left: it has ended.
        waiting: resolves with what it is given.
    """

    bids: list[Bid] = field(default_factory=list)
    first: Bid | None = None
    bid: Bid | None = None
    alone: float = 0.0
    spent: float = 0.0
    left: bool = False
    waiting: asyncio.Future[Grant] | None = None

    @property
    def has_bid_or_left(self) -> bool:
        return self.left or self.first is not None

    def offer(self, bid: Bid) -> None:
        self.bid, self.spent = bid, bid.spent
        self.first = self.first or bid
        self.alone = self.first.alone


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
        self._at_work = {problem for problem in problems if problem not in known}
        for problem, record in known.items():
            self._members[problem].bids = list(record.bids)
            self._finals[problem] = record.spent
            self._replay(problem)

    async def decide(self, search: Search, bid: Bid) -> Grant:
        """What a problem gets next. It has to have released its branches."""
        member = self._members[search.problem.id]
        search.release_quota()
        member.offer(bid)
        member.waiting = asyncio.get_running_loop().create_future()
        self._at_work.discard(search.problem.id)
        self._proceed()
        grant = await member.waiting
        if not grant.ends:
            await search.acquire_quota()
        return grant

    def leave(self, problem: str, spent: float) -> None:
        """A problem has ended, however."""
        member = self._members[problem]
        member.left, member.spent, member.waiting = True, spent, None
        self._at_work.discard(problem)
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
        while not self._at_work:
            present = {name: member for name, member in self._members.items() if not member.left}
            if not present:
                return
            bids = [member.bid for member in present.values() if member.bid is not None]
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
                    continue
                if not everyone_ends:
                    self._at_work.add(name)
                if member.waiting is not None and not member.waiting.done():
                    member.waiting.set_result(grant)


@dataclass(frozen=True)
class Price:
    """What a chain has to gain.

    Attributes:
        value: expected right answers per chain of mean cost.
        chain_cost: that cost; 0 = of nobody yet.
    """

    value: float
    chain_cost: float


class Prices:
    """Prices that become known one after another.

    Attributes:
        known: those that are.
    """

    def __init__(self) -> None:
        self.known: list[Price] = []
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}  # by place

    def add(self, price: Price) -> None:
        """The next one; who waits for it goes on."""
        self.known.append(price)
        for future in self._waiting.pop(len(self.known) - 1, ()):
            if not future.done():
                future.set_result(None)

    async def at(self, place: int) -> Price:
        """That of a place, when it is known."""
        if place >= len(self.known):
            future = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(place, []).append(future)
            await future
        return self.known[place]


class Stream:
    """Problems come one after another; a price follows what they spend, so that in the mean it is the budget.

    Dual mirror descent with the entropy (Balseiro, Lu and Mirrokni, 2020): after every problem the logarithm of the
    price rises by `step` times what it spent above the budget, as a share of it. So the mean of all that is above the
    budget is the logarithm of how far the price has come, over step times problems: it goes to 0 wherever the price
    stays within its bounds. (The plain subgradient needs a step as small as the price, which is not known, and where it
    cuts the price off at 0 it stays below the budget for good.) Spending is counted in chains of mean cost, the price
    in expected right answers per such chain, so neither depends on how long chains are.

    The price of a problem follows the spending of those that came at least `lag` before it, whichever of the others
    have ended by then: so its solution does not depend on the machine, and `lag` problems can be under way at once.

    The first `lag` problems have no such spending to go by. Each takes the price that divides the budget among the
    first bids up to its own: being one of them and no other than they, it spends the budget in the mean as far as the
    gate is right. Plans are made as for one chain at a time: one that is shorter than a wave ends it, and is made anew.

    Args:
        price: where the descent begins: for a budget the gate knows one (`Gate.price`). With a floor it begins no lower
            than the last price of the first `lag` problems, as the gate's is that of a budget without one.
        step, lag: as above.
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
        self._first, self._step, self._lag = price, step, lag
        self._place = {problem: i for i, problem in enumerate(problems)}
        self._members = [Member() for _ in problems]
        self._opening = Prices()  # of the first `lag` problems
        self._prices = Prices()  # after the first 0, 1, 2, ... problems
        self._alone = 0.0  # of those
        for problem, record in known.items():
            if record.bids:
                self._members[self._place[problem]].offer(record.bids[0])
            self.leave(problem, record.spent)

    @property
    def price(self) -> float:
        """As of the first problems that have all ended; expected right answers per chain."""
        return self._prices.known[-1].value if self._prices.known else self._first

    async def decide(self, search: Search, bid: Bid) -> Grant:
        """What a problem gets next, at the price of its place in the stream."""
        place = self._place[search.problem.id]
        self._members[place].offer(bid)
        self._proceed()
        price = await (self._opening.at(place) if place < self._lag else self._prices.at(place - self._lag + 1))
        grant = at_price(bid, price.value / (price.chain_cost or bid.alone), self.terms.max_chains, self.terms.wave)
        owed = self.terms.floor - bid.num_chains
        if grant.tree < 0 and owed > grant.num_chains:
            grant = Grant(owed)
        return self.terms.limited(grant)

    def leave(self, problem: str, spent: float) -> None:
        """A problem has ended, however."""
        member = self._members[self._place[problem]]
        member.left, member.spent = True, spent
        self._proceed()

    def _proceed(self) -> None:
        """Finds the prices that follow from what is known by now."""
        members, opening, prices = self._members, self._opening.known, self._prices.known
        num_first = min(self._lag, len(members))
        while len(opening) < num_first and members[len(opening)].has_bid_or_left:
            self._opening.add(self._price_of_bids(len(opening) + 1))
        if len(opening) == num_first and not prices:
            last, first = opening[-1], self._first
            self._prices.add(Price(max(first, last.value) if self.terms.floor else first, last.chain_cost))
        while 0 < len(prices) <= len(members) and members[len(prices) - 1].left:
            self._prices.add(self._price_after(members[len(prices) - 1]))

    def _price_of_bids(self, count: int) -> Price:
        """That which divides the budget among the first bids of so many problems."""
        terms, bids = self.terms, [member.first for member in self._members[:count] if member.first is not None]
        if not bids:  # all have ended without one
            return Price(self._first, 0.0)
        alone = sum(bid.alone for bid in bids)
        left = terms.budget * alone - sum(bid.spent for bid in bids)
        _, price = allocate(bids, left, max_chains=terms.max_chains, floor=terms.floor)
        return Price(max(price * alone / len(bids) * _ABOVE, MIN_PRICE), alone / len(bids))

    def _price_after(self, member: Member) -> Price:
        """The next one, when a problem has ended."""
        latest, count = self._prices.known[-1], len(self._prices.known)
        self._alone += member.alone
        mean = self._alone / count
        if mean == 0:
            return latest
        above = (member.spent - self.terms.budget * member.alone) / mean
        rise = min(self._step * above / self.terms.budget, -math.log(MIN_PRICE))  # from the least price to 1
        return Price(min(max(latest.value * math.exp(rise), MIN_PRICE), 1.0), mean)

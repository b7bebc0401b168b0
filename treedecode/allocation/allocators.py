"""Allocators: objects that the problems of a run share while one budget is divided among them.

`OfflineAllocator` divides the budget among all problems of the run after each wave. `OnlineAllocator` takes problems as
a stream, at a price that follows the spending of earlier ones.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from treedecode.allocation.allocate import Bid, Grant, allocate, grant_at_price
from treedecode.search.search import Search

_ABOVE = 1.0 + 1e-9  # `allocate` returns the price of the first step that was too expensive, which is not to be taken
MIN_PRICE = 1e-4  # a price that nobody had to pay for long comes back soon from here; a chain gains 1 at most


@dataclass(frozen=True)
class Policy:
    """Settings by which a budget is divided.

    Attributes:
        budget: mean cost of a problem, in units of the cost of a single chain of its own.
        max_chains: of one problem.
        wave: chains sampled at a time, after which the gate makes a new bid.
        floor: chains that every problem gets.
    """

    budget: float
    max_chains: int
    wave: int
    floor: int

    def divide(self, bids: Sequence[Bid], single_chain_cost: float, spent: float) -> list[Grant]:
        """Divides the rest of the budget, and returns the next wave of every bid.

        Args:
            single_chain_cost, spent: sums over all problems of the run, those that have ended too.
        """
        remaining = self.budget * single_chain_cost - spent
        grants, _ = allocate(bids, remaining, max_chains=self.max_chains, floor=self.floor, wave=self.wave)
        return [self.next_wave(grant) for grant in grants]

    def next_wave(self, grant: Grant) -> Grant:
        """Returns the part of a grant that is sampled before the next bid."""
        return Grant(min(grant.num_chains, self.wave), grant.tree)


@dataclass
class ProblemState:
    """A problem of the run, as an allocator sees it.

    Attributes:
        recorded_bids: bids still to be made by a problem that an earlier process has solved.
        first_bid: its first bid; None = it has made none.
        bid: the bid that waits for a grant; None = the problem is at work.
        single_chain_cost: cost of a single chain, by the first bid.
        spent: cost in all, up to the latest bid or the end.
        has_ended: it makes no more bids.
        grant: resolves with the grant that the bid waits for.
    """

    recorded_bids: list[Bid] = field(default_factory=list)
    first_bid: Bid | None = None
    bid: Bid | None = None
    single_chain_cost: float = 0.0
    spent: float = 0.0
    has_ended: bool = False
    grant: asyncio.Future[Grant] | None = None

    @property
    def has_bid_or_ended(self) -> bool:
        """True once the first bid is known, or that there will be none."""
        return self.has_ended or self.first_bid is not None

    def take(self, bid: Bid) -> None:
        """Takes the next bid."""
        self.bid, self.spent = bid, bid.spent
        self.first_bid = self.first_bid or bid
        self.single_chain_cost = self.first_bid.single_chain_cost


@dataclass
class BidHistory:
    """The bids of a problem that an earlier process has solved, and its cost in all, from the notes of its solution."""

    bids: list[Bid]
    spent: float

    @classmethod
    def by_problem(cls, notes: Mapping[str, Mapping[str, Any]]) -> "dict[str, BidHistory]":
        """Reads the histories from the notes of solutions, by id of the problem."""
        return {
            problem: cls([Bid.from_json(bid) for bid in note.get("bids", ())], note["spent"])
            for problem, note in notes.items()
        }


class OfflineAllocator:
    """Divides the rest of the budget anew whenever all problems of a run have had their wave.

    A problem that gets nothing stays, because others may come to cost less than was thought. When nobody gets anything,
    all end. A grant depends on all bids and on nothing else. Problems that an earlier process solved take part with the
    bids of their history, so a run that goes on from a journal divides its budget as one that was never interrupted.
    """

    def __init__(self, policy: Policy, problems: Sequence[str], histories: Mapping[str, BidHistory]) -> None:
        self.policy = policy
        self._states = {problem: ProblemState() for problem in problems}
        self._final_costs: dict[str, float] = {}  # of problems with a history
        self._at_work = {problem for problem in problems if problem not in histories}
        for problem, history in histories.items():
            self._states[problem].recorded_bids = list(history.bids)
            self._final_costs[problem] = history.spent
            self._replay(problem)

    async def decide(self, search: Search, bid: Bid) -> Grant:
        """Returns the next grant of a problem, which must have released its branches."""
        state = self._states[search.problem.id]
        search.release_quota()
        state.take(bid)
        state.grant = asyncio.get_running_loop().create_future()
        self._at_work.discard(search.problem.id)
        self._proceed()
        grant = await state.grant
        if not grant.ends:
            await search.acquire_quota()
        return grant

    def leave(self, problem: str, spent: float) -> None:
        """Notes that a problem has ended, for whatever reason."""
        state = self._states[problem]
        state.has_ended, state.spent, state.grant = True, spent, None
        self._at_work.discard(problem)
        self._proceed()

    def _replay(self, problem: str) -> None:
        """Makes the next bid of a problem with a history, or ends it."""
        state = self._states[problem]
        if state.recorded_bids:
            state.take(state.recorded_bids.pop(0))
        else:
            state.has_ended, state.spent = True, self._final_costs[problem]

    def _proceed(self) -> None:
        """Divides the budget as long as nobody is at work."""
        while not self._at_work:
            active = {name: state for name, state in self._states.items() if not state.has_ended}
            if not active:
                return
            bids = [state.bid for state in active.values() if state.bid is not None]
            states = self._states.values()
            unit, spent = sum(state.single_chain_cost for state in states), sum(state.spent for state in states)
            grants = self.policy.divide(bids, unit, spent)
            everyone_ends = all(grant.ends for grant in grants)
            for (name, state), grant in zip(active.items(), grants, strict=True):
                if grant.ends and not everyone_ends:
                    continue
                state.bid = None
                if everyone_ends:
                    state.has_ended = True
                if name in self._final_costs:
                    self._replay(name)
                    continue
                if not everyone_ends:
                    self._at_work.add(name)
                if state.grant is not None and not state.grant.done():
                    state.grant.set_result(grant)


@dataclass(frozen=True)
class Price:
    """The least gain for which a chain is sampled.

    Attributes:
        value: expected right answers per chain of mean cost.
        chain_cost: that mean cost; 0 = no problem has told its cost yet.
    """

    value: float
    chain_cost: float


class PriceSeries:
    """Prices that become known one after another.

    Attributes:
        known: the prices that are known so far, in order.
    """

    def __init__(self) -> None:
        self.known: list[Price] = []
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}  # by index of the price

    def add(self, price: Price) -> None:
        """Appends the next price and wakes up those that wait for it."""
        self.known.append(price)
        for future in self._waiting.pop(len(self.known) - 1, ()):
            if not future.done():
                future.set_result(None)

    async def get(self, index: int) -> Price:
        """Waits until a price is known, and returns it."""
        if index >= len(self.known):
            future = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(index, []).append(future)
            await future
        return self.known[index]


class OnlineAllocator:
    """Grants compute to a stream of problems at a price that keeps their mean cost at the budget.

    The price follows dual mirror descent with the entropy (Balseiro, Lu and Mirrokni, 2020): after every problem its
    logarithm rises by `step` times the cost above the budget, as a share of the budget. The mean of these excesses is
    then the logarithm of how far the price has moved, divided by step times problems, and goes to 0 wherever the price
    stays within its bounds. (The plain subgradient needs a step as small as the price, which is not known; and where it
    cuts the price off at 0 it spends less than the budget for good.) Costs are counted in chains of mean cost and the
    price in expected right answers per such chain, so that neither depends on the length of chains.

    The price of a problem follows the costs of the problems that came at least `lag` before it, whichever of the others
    have ended by then. So its solution does not depend on the machine, and `lag` problems can be under way at once.

    The first `lag` problems have no such costs to go by. Each takes the price that divides the budget among the first
    bids up to its own. Being one of these problems and like them, it spends the budget in the mean as far as the gate
    is right. Their plans are made for one chain at a time: a plan shorter than a wave ends it, and is made anew.

    Args:
        price: at which the descent begins; a gate knows one for a budget (`Gate.price`), for a policy without a floor.
            With a floor the descent begins no lower than the last price of the first `lag` problems.
        step, lag: as above.
    """

    def __init__(
        self,
        policy: Policy,
        problems: Sequence[str],
        histories: Mapping[str, BidHistory],
        *,
        price: float,
        step: float,
        lag: int,
    ) -> None:
        self.policy = policy
        self._start, self._step, self._lag = price, step, lag
        self._index = {problem: i for i, problem in enumerate(problems)}
        self._states = [ProblemState() for _ in problems]
        self._opening = PriceSeries()  # of the first `lag` problems
        self._prices = PriceSeries()  # after the first 0, 1, 2, ... problems
        self._single_chain_costs = 0.0  # sum over the problems that `_prices` has counted
        for problem, history in histories.items():
            if history.bids:
                self._states[self._index[problem]].take(history.bids[0])
            self.leave(problem, history.spent)

    @property
    def price(self) -> float:
        """The latest price that is known, in expected right answers per chain."""
        return self._prices.known[-1].value if self._prices.known else self._start

    async def decide(self, search: Search, bid: Bid) -> Grant:
        """Returns the next grant of a problem, at the price of its position in the stream."""
        index = self._index[search.problem.id]
        self._states[index].take(bid)
        self._proceed()
        price = await (self._opening.get(index) if index < self._lag else self._prices.get(index - self._lag + 1))
        cost = price.chain_cost or bid.single_chain_cost
        grant = grant_at_price(bid, price.value / cost, self.policy.max_chains, self.policy.wave)
        num_owed = self.policy.floor - bid.num_chains
        if grant.tree < 0 and num_owed > grant.num_chains:
            grant = Grant(num_owed)
        return self.policy.next_wave(grant)

    def leave(self, problem: str, spent: float) -> None:
        """Notes that a problem has ended, for whatever reason."""
        state = self._states[self._index[problem]]
        state.has_ended, state.spent = True, spent
        self._proceed()

    def _proceed(self) -> None:
        """Computes the prices that follow from what is known by now."""
        states, opening, prices = self._states, self._opening.known, self._prices.known
        num_first = min(self._lag, len(states))
        while len(opening) < num_first and states[len(opening)].has_bid_or_ended:
            self._opening.add(self._price_of_bids(len(opening) + 1))
        if len(opening) == num_first and not prices:
            last, start = opening[-1], self._start
            self._prices.add(Price(max(start, last.value) if self.policy.floor else start, last.chain_cost))
        while 0 < len(prices) <= len(states) and states[len(prices) - 1].has_ended:
            self._prices.add(self._price_after(states[len(prices) - 1]))

    def _price_of_bids(self, count: int) -> Price:
        """Returns the price that divides the budget among the first bids of the first `count` problems."""
        policy, bids = self.policy, [state.first_bid for state in self._states[:count] if state.first_bid is not None]
        if not bids:  # all have ended without one
            return Price(self._start, 0.0)
        unit = sum(bid.single_chain_cost for bid in bids)
        remaining = policy.budget * unit - sum(bid.spent for bid in bids)
        _, price = allocate(bids, remaining, max_chains=policy.max_chains, floor=policy.floor)
        return Price(max(price * unit / len(bids) * _ABOVE, MIN_PRICE), unit / len(bids))

    def _price_after(self, state: ProblemState) -> Price:
        """Returns the price that follows the latest one when a problem has ended."""
        latest, count = self._prices.known[-1], len(self._prices.known)
        self._single_chain_costs += state.single_chain_cost
        mean = self._single_chain_costs / count
        if mean == 0:
            return latest
        excess = (state.spent - self.policy.budget * state.single_chain_cost) / mean
        rise = min(self._step * excess / self.policy.budget, -math.log(MIN_PRICE))  # from the least price to 1
        return Price(min(max(latest.value * math.exp(rise), MIN_PRICE), 1.0), mean)

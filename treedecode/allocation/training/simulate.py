"""Replays allocation policies on rollouts, to see what a budget would have bought."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from treedecode.allocation.allocate import Bid, grant_at_price
from treedecode.allocation.allocators import Policy
from treedecode.allocation.chain_costs import chain_costs
from treedecode.allocation.chains import Chain, selected
from treedecode.allocation.features import feature_vector
from treedecode.allocation.gate import Gate
from treedecode.allocation.training.rollouts import Rollouts

# (indices of problems, [n] chains of all problems) -> a bid for each of the former; `spent` is filled in afterwards
Bidder = Callable[[Sequence[int], np.ndarray], list[Bid]]

KNOWN_RATE = 1e9  # alpha + beta of a Beta distribution that is sure of its mean


@dataclass(frozen=True)
class ReplayResult:
    """The compute that each of `n` problems got, and its outcome.

    Attributes:
        chains: `[n]` numbers of chains.
        trees: `[n]` indices in the menu; -1 = no tree search.
        cost: `[n]` tokens.
        single_chain_cost: `[n]` tokens, the mean over the problem's chains.
        right: `[n]` bool.
    """

    chains: np.ndarray
    trees: np.ndarray
    cost: np.ndarray
    single_chain_cost: np.ndarray
    right: np.ndarray

    @property
    def multiple(self) -> float:
        """Mean cost in units of the cost of a single chain."""
        return float(self.cost.sum() / self.single_chain_cost.sum())


class Replay:
    """Problems whose chains come in given orders.

    Args:
        orders: `[n, c]`, a permutation for each problem.
    """

    def __init__(self, data: Rollouts, orders: np.ndarray) -> None:
        self.data, self.orders = data, orders
        self._chains = [data.chains(i) for i in range(len(data))]
        self._cost = np.take_along_axis(data.tokens, orders, axis=1).cumsum(axis=1)  # of the first chains
        self.single_chain_cost = data.tokens.mean(axis=1)

    def after(self, problem: int, num_chains: int) -> tuple[list[Chain], np.ndarray, int]:
        """Returns a problem's first chains, their classes, and the index among all chains of the selected one."""
        seen = self.orders[problem, :num_chains]
        chains, classes = [self._chains[problem][i] for i in seen], self.data.classes[problem, seen]
        return chains, classes, int(seen[selected(chains, classes)])

    def result(self, chains: np.ndarray, trees: np.ndarray) -> ReplayResult:
        """Returns the result of given numbers of chains, and tree searches after them."""
        data, rows = self.data, np.arange(len(self.data))
        chosen = np.array([self.after(i, int(chains[i]))[2] for i in range(len(data))])
        right = data.right[rows, chosen].copy()
        cost = self._cost[rows, chains - 1].astype(np.float64)
        for i in np.flatnonzero(trees >= 0):
            cost[i] += data.tree_tokens[i, trees[i]] * self.single_chain_cost[i]
            search = data.num_chains + trees[i]
            scores, classes = data.scores[i], data.classes[i]
            # as the strategy compares them: an answer first, then the score; of equals the chain
            if (classes[search] >= 0, scores[search]) > (classes[chosen[i]] >= 0, scores[chosen[i]]):
                right[i] = data.right[i, search]
        return ReplayResult(chains, trees, cost, self.single_chain_cost, right)

    def uniform(self, num_chains: int) -> ReplayResult:
        """Gives the same number of chains to all problems."""
        return self.result(np.full(len(self.data), num_chains), np.full(len(self.data), -1))

    def offline(self, bidder: Bidder, policy: Policy, probes: int) -> ReplayResult:
        """Divides a budget as `DynamicAllocation` does offline.

        Args:
            probes: chains of every problem before the first bid.
        """
        count = len(self.data)
        chains, trees, is_active = np.full(count, probes), np.full(count, -1), np.ones(count, bool)
        bids: dict[int, Bid] = {}
        to_bid = list(range(count))
        unit, spent = np.zeros(count), np.zeros(count)
        while is_active.any():
            spent[to_bid] = self._cost[to_bid, chains[to_bid] - 1]
            new_bids = zip(to_bid, bidder(to_bid, chains), strict=True) if to_bid else ()
            bids.update((i, replace(bid, spent=float(spent[i]))) for i, bid in new_bids)
            for i in to_bid:
                unit[i] = unit[i] or bids[i].single_chain_cost
            active = np.flatnonzero(is_active).tolist()
            grants = policy.divide([bids[i] for i in active], float(unit.sum()), float(spent.sum()))
            to_bid = []
            for i, grant in zip(active, grants, strict=True):
                if grant.tree >= 0:
                    trees[i], is_active[i] = grant.tree, False
                    spent[i] += self.data.tree_tokens[i, grant.tree] * self.single_chain_cost[i]
                elif grant.num_chains:
                    chains[i] += grant.num_chains
                    if chains[i] == policy.max_chains:
                        is_active[i], spent[i] = False, self._cost[i, chains[i] - 1]
                    else:
                        to_bid.append(i)
            if all(grant.ends for grant in grants):
                break
        return self.result(chains, trees)

    def at_price(self, bidder: Bidder, policy: Policy, price: float, probes: int) -> ReplayResult:
        """Grants compute at one price for all problems.

        Args:
            price: in expected right answers per chain of mean cost.
            probes: chains of every problem before the first bid.
        """
        count, price_per_token = len(self.data), price / float(self.single_chain_cost.mean())
        chains, trees = np.full(count, probes), np.full(count, -1)
        active = list(range(count))
        while active:
            asked, active = active, []
            for i, bid in zip(asked, bidder(asked, chains), strict=True):
                grant = policy.next_wave(grant_at_price(bid, price_per_token, policy.max_chains, policy.wave))
                trees[i] = grant.tree
                chains[i] += grant.num_chains
                if grant.num_chains and chains[i] < policy.max_chains:
                    active.append(i)
        return self.result(chains, trees)

    def gate_bidder(self, gate: Gate, wave: int) -> Bidder:
        """Returns a bidder with the beliefs of a gate."""

        def bidder(problems: Sequence[int], chains: np.ndarray) -> list[Bid]:
            seen = [self.after(i, int(chains[i]))[:2] for i in problems]
            features = [feature_vector(self.data.prompt(i), *each) for i, each in zip(problems, seen, strict=True)]
            beliefs = gate.believe(np.array(features))
            bids = []
            for row, (first_chains, _) in enumerate(seen):
                single, further = chain_costs("tokens", 0, first_chains, wave=wave)
                bids.append(
                    Bid(
                        **beliefs.of_problem(row),
                        chain_cost=further,
                        tree_costs=tuple(item.tokens * single for item in gate.config.menu),
                        single_chain_cost=single,
                        spent=0.0,
                        num_chains=len(first_chains),
                    )
                )
            return bids

        return bidder

    def oracle_bidder(self) -> Bidder:
        """Returns a bidder that knows whether the answer is right, and the share of all chains that correct it.

        It bids for no tree searches, of which each problem has but one sample.
        """

        def bidder(problems: Sequence[int], chains: np.ndarray) -> list[Bid]:
            bids = []
            for i in problems:
                chosen = self.after(i, int(chains[i]))[2]
                rate = self.data.corrects(i, chosen)[: self.data.num_chains].mean()
                cost = self.single_chain_cost[i]
                bids.append(
                    Bid(
                        unsolved=0.0 if self.data.right[i, chosen] else 1.0,
                        alpha=float(np.clip(rate, 1e-9, 1)) * KNOWN_RATE,
                        beta=float(1 - rate) * KNOWN_RATE,
                        chain_cost=cost,
                        trees=(),
                        tree_costs=(),
                        single_chain_cost=cost,
                        spent=0.0,
                        num_chains=int(chains[i]),
                    )
                )
            return bids

        return bidder


def random_orders(data: Rollouts, rng: np.random.Generator) -> np.ndarray:
    """Returns a random order of every problem's chains, `[n, c]`."""
    return rng.permuted(np.tile(np.arange(data.num_chains), (len(data), 1)), axis=1)

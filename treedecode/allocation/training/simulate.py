"""Policies replayed on rollouts: what a budget would have bought."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from treedecode.allocation.allocate import Bid, at_price
from treedecode.allocation.allocators import Terms
from treedecode.allocation.chain_costs import chain_costs
from treedecode.allocation.chains import Chain, selected
from treedecode.allocation.features import vector
from treedecode.allocation.gate import Gate
from treedecode.allocation.training.rollouts import Rollouts


@dataclass(frozen=True)
class Spent:
    """What each of `n` problems got, and what it came to.

    Attributes:
        chains: `[n]`; trees: `[n]`, index in the menu, -1 = none.
        cost: `[n]` tokens; alone: `[n]`, what one chain costs, the mean of the problem's.
        right: `[n]` bool.
    """

    chains: np.ndarray
    trees: np.ndarray
    cost: np.ndarray
    alone: np.ndarray
    right: np.ndarray

    @property
    def multiple(self) -> float:
        """Mean cost in units of what one chain costs."""
        return float(self.cost.sum() / self.alone.sum())


class Replay:
    """Problems whose chains come in a given order.

    Args:
        orders: `[n, c]`, a permutation for each problem.
    """

    def __init__(self, data: Rollouts, orders: np.ndarray) -> None:
        self.data, self.orders = data, orders
        self._chains = [data.chains(i) for i in range(len(data))]
        self._cost = np.take_along_axis(data.tokens, orders, axis=1).cumsum(axis=1)
        self.alone = data.tokens.mean(axis=1)

    def after(self, problem: int, num_chains: int) -> tuple[list[Chain], np.ndarray, int]:
        """A problem's first chains, their classes, and which of all its chains is selected of them."""
        seen = self.orders[problem, :num_chains]
        chains, classes = [self._chains[problem][i] for i in seen], self.data.classes[problem, seen]
        return chains, classes, int(seen[selected(chains, classes)])

    def outcome(self, chains: np.ndarray, trees: np.ndarray) -> Spent:
        """What given numbers of chains, and tree searches after them, come to."""
        data, rows = self.data, np.arange(len(self.data))
        chosen = np.array([self.after(i, int(chains[i]))[2] for i in range(len(data))])
        right = data.right[rows, chosen].copy()
        cost = self._cost[rows, chains - 1].astype(np.float64)
        for i in np.flatnonzero(trees >= 0):
            cost[i] += data.tree_tokens[i, trees[i]] * self.alone[i]
            at = data.num_chains + trees[i]
            scores, classes = data.scores[i], data.classes[i]
            # as the strategy compares them: an answer first, then the score; of equals the chain
            if (classes[at] >= 0, scores[at]) > (classes[chosen[i]] >= 0, scores[chosen[i]]):
                right[i] = data.right[i, at]
        return Spent(chains, trees, cost, self.alone, right)

    def uniform(self, num_chains: int) -> Spent:
        """The same number of chains for all."""
        return self.outcome(np.full(len(self.data), num_chains), np.full(len(self.data), -1))

    def dynamic(self, bids: Callable[[Sequence[int], np.ndarray], list[Bid]], terms: Terms, probes: int) -> Spent:
        """`DynamicAllocation` offline, with bids of whoever makes them.

        Args:
            bids: from indices of problems and the chains `[n]` of all: their bids; what they have spent is filled in.
        """
        count = len(self.data)
        chains, trees, waiting = np.full(count, probes), np.full(count, -1), np.ones(count, bool)
        found: dict[int, Bid] = {}
        fresh = list(range(count))
        alone = np.zeros(count)
        spent = np.zeros(count)
        while waiting.any():
            spent[fresh] = self._cost[fresh, chains[fresh] - 1]
            made = zip(fresh, bids(fresh, chains), strict=True) if fresh else ()
            found.update((i, replace(bid, spent=float(spent[i]))) for i, bid in made)
            for i in fresh:
                alone[i] = alone[i] or found[i].alone
            here = np.flatnonzero(waiting).tolist()
            grants = terms.divide([found[i] for i in here], float(alone.sum()), float(spent.sum()))
            fresh = []
            for i, grant in zip(here, grants, strict=True):
                if grant.tree >= 0:
                    trees[i], waiting[i] = grant.tree, False
                    spent[i] += self.data.tree_tokens[i, grant.tree] * self.alone[i]
                elif grant.num_chains:
                    chains[i] += grant.num_chains
                    if chains[i] == terms.max_chains:
                        waiting[i], spent[i] = False, self._cost[i, chains[i] - 1]
                    else:
                        fresh.append(i)
            if all(grant.ends for grant in grants):
                break
        return self.outcome(chains, trees)

    def at_price(
        self, bids: Callable[[Sequence[int], np.ndarray], list[Bid]], terms: Terms, price: float, probes: int
    ) -> Spent:
        """What problems take at one price for all, in expected right answers per chain of mean cost."""
        count, per_token = len(self.data), price / float(self.alone.mean())
        chains, trees = np.full(count, probes), np.full(count, -1)
        going = list(range(count))
        while going:
            asked, going = going, []
            for i, bid in zip(asked, bids(asked, chains), strict=True):
                grant = terms.limited(at_price(bid, per_token, terms.max_chains, terms.wave))
                trees[i] = grant.tree
                chains[i] += grant.num_chains
                if grant.num_chains and chains[i] < terms.max_chains:
                    going.append(i)
        return self.outcome(chains, trees)

    def by_gate(self, gate: Gate, wave: int) -> Callable[[Sequence[int], np.ndarray], list[Bid]]:
        """Bids of a gate."""

        def bids(problems: Sequence[int], chains: np.ndarray) -> list[Bid]:
            seen = [self.after(i, int(chains[i]))[:2] for i in problems]
            features = [vector(self.data.prompt(i), *some) for i, some in zip(problems, seen, strict=True)]
            beliefs = gate.believe(np.array(features))
            made = []
            for at, (some, _) in enumerate(seen):
                alone, further = chain_costs("tokens", 0, some, wave=wave)
                costs = tuple(item.tokens * alone for item in gate.config.menu)
                terms = beliefs.terms(at)
                made.append(
                    Bid(**terms, chain_cost=further, tree_costs=costs, alone=alone, spent=0.0, num_chains=len(some))
                )
            return made

        return bids

    def by_oracle(self) -> Callable[[Sequence[int], np.ndarray], list[Bid]]:
        """Bids of who knows whether the answer is right, and the rate at which chains mend it: their share of all.

        It knows nothing of tree searches, of which there is but one each.
        """

        def bids(problems: Sequence[int], chains: np.ndarray) -> list[Bid]:
            made = []
            for i in problems:
                chosen = self.after(i, int(chains[i]))[2]
                rate = self.data.mends(i, chosen)[: self.data.num_chains].mean()
                unsolved = 0.0 if self.data.right[i, chosen] else 1.0
                known = 1e9  # alpha + beta of a rate that is known
                pair = (float(np.clip(rate, 1e-9, 1)) * known, float(1 - rate) * known)
                made.append(Bid(unsolved, *pair, self.alone[i], (), (), self.alone[i], 0.0, int(chains[i])))
            return made

        return bids


def orders(data: Rollouts, rng: np.random.Generator) -> np.ndarray:
    """`[n, c]`, a random order of every problem's chains."""
    return rng.permuted(np.tile(np.arange(data.num_chains), (len(data), 1)), axis=1)

"""Divides one budget among many problems, at one price for all (2410.04707, section 3).

A problem's menu lists what it may be granted: further chains, sampled as long as it needs them, or one tree search.
Each item has an expected gain, the probability that it turns a wrong answer into a right one, and an expected cost. The
steps with the most gain per cost, of all problems, are taken until the budget is spent. The ratio at which that happens
is the price lambda, the multiplier of the budget constraint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Bid:
    """The gate's beliefs about a problem, and the costs of compute there. All costs have the same unit.

    Attributes:
        unsolved: P(the answer it would give now is wrong).
        alpha, beta: of the Beta distribution of P(a further chain corrects the answer), given that it is wrong.
        chain_cost: of a further chain, which shares the prompt with others of its wave.
        trees: P(the tree search corrects the answer), given that it is wrong, for each search of the gate's menu.
        tree_costs: of each search of the menu.
        single_chain_cost: of one chain that shares nothing, the unit of a budget.
        spent: cost of the problem so far.
        num_chains: sampled so far.
    """

    unsolved: float
    alpha: float
    beta: float
    chain_cost: float
    trees: tuple[float, ...]
    tree_costs: tuple[float, ...]
    single_chain_cost: float
    spent: float
    num_chains: int

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes, as the notes of a journal have them."""
        return {_JSON_KEYS.get(name, name): _to_list(value) for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Bid":
        """Makes the bid that `to_json` described."""
        bid = cls(**{field.name: data[_JSON_KEYS.get(field.name, field.name)] for field in fields(cls)})
        return replace(bid, trees=tuple(bid.trees), tree_costs=tuple(bid.tree_costs))


_JSON_KEYS = {"single_chain_cost": "alone"}  # attributes that journals know by another name


def _to_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Grant:
    """The compute that a problem is given.

    Attributes:
        num_chains: further chains.
        tree: index of a tree search in the menu; -1 = none.
    """

    num_chains: int = 0
    tree: int = -1

    @property
    def ends(self) -> bool:
        """True if the problem gets nothing more."""
        return self.num_chains == 0 and self.tree < 0


def chain_gains(alpha: float, beta: float, unsolved: float, num_chains: int) -> np.ndarray:
    """Computes the gains of the first further chain, the second, ...: `unsolved * E[p (1 - p)^(n - 1)]`.

    With p ~ Beta(alpha, beta) the expectation is B(alpha + 1, beta + n - 1) / B(alpha, beta), a product of ratios that
    falls with n.

    Returns:
        `[num_chains]` gains.
    """
    j = np.arange(num_chains)
    falls = (beta + j) / (alpha + beta + 1 + j)
    return unsolved * alpha / (alpha + beta) * np.concatenate([[1.0], np.cumprod(falls[:-1])])[:num_chains]


def chain_needs(alpha: float, beta: float, unsolved: float, num_chains: int, wave: int = 1) -> np.ndarray:
    """Computes the probabilities that the first further chain is sampled, the second, ...

    A chain is sampled if none of the m chains in earlier waves has corrected the answer, which has probability
    `1 - unsolved + unsolved * E[(1 - p)^m]`. After a correction the gate asks for no more chains, so a plan is expected
    to cost less than all of its chains. An answer that is right from the start is never corrected: all planned chains
    are sampled, as far as the gate does not know that it is right. The ratio of a chain's gain to this probability is
    its gain where it is sampled, P(wrong | nothing corrected so far) times its success rate. So a chain has the same
    price in a plan as in a bid that is made after the chains before it.

    Returns:
        `[num_chains]` probabilities.
    """
    j = np.arange(max(0, num_chains - 1))
    after = np.concatenate([[1.0], np.cumprod((beta + j) / (alpha + beta + j))])
    return 1 - unsolved + unsolved * after[np.arange(num_chains) // wave * wave]


@dataclass(frozen=True)
class Steps:
    """The steps by which a problem's grant grows, each with a lower gain per cost than the one before.

    Attributes:
        gains, costs: `[n]` of each step.
        grants: the whole grant after each step.
    """

    gains: np.ndarray
    costs: np.ndarray
    grants: tuple[Grant, ...]

    @property
    def slopes(self) -> np.ndarray:
        """`[n]` gain per cost."""
        return self.gains / self.costs


@lru_cache(maxsize=1 << 12)  # most bids last for many rounds
def steps_of(bid: Bid, max_chains: int, wave: int = 1) -> Steps:
    """Computes the upper concave hull of a menu over (expected cost, gain), which holds all that a price can choose.

    Args:
        max_chains: the most chains of a problem, with those it has.
        wave: chains sampled at a time.
    """
    num_further = max(0, max_chains - bid.num_chains)
    of_chains = np.cumsum(chain_gains(bid.alpha, bid.beta, bid.unsolved, num_further))
    gains = np.r_[0.0, of_chains, np.multiply(bid.unsolved, bid.trees)]
    needs = chain_needs(bid.alpha, bid.beta, bid.unsolved, num_further, wave)
    costs = np.r_[0.0, bid.chain_cost * np.cumsum(needs), bid.tree_costs]
    grants = [Grant(n) for n in range(num_further + 1)] + [Grant(tree=i) for i in range(len(bid.trees))]
    hull: list[int] = []
    for i in np.lexsort((-gains, costs)):
        if hull and gains[i] <= gains[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(gains, costs, hull[-2], hull[-1]) <= _slope(gains, costs, hull[-1], i):
            hull.pop()
        hull.append(int(i))
    return Steps(np.diff(gains[hull]), np.diff(costs[hull]), tuple(grants[i] for i in hull[1:]))


def _slope(gains: np.ndarray, costs: np.ndarray, begin: int, end: int) -> float:
    return (gains[end] - gains[begin]) / (costs[end] - costs[begin])


def grant_at_price(bid: Bid, price: float, max_chains: int, wave: int = 1) -> Grant:
    """Returns the grant of a problem at a price: all steps whose gain per cost is at least that."""
    steps = steps_of(bid, max_chains, wave)
    count = int((steps.slopes >= price).sum())
    return steps.grants[count - 1] if count else Grant()


def allocate(
    bids: Sequence[Bid], budget: float, *, max_chains: int, floor: int = 0, wave: int = 1
) -> tuple[list[Grant], float]:
    """Divides a budget among problems so that the expected number of right answers is the highest.

    The result is exact up to the last step that does not fit: no allocation of the budget gains more than this one and
    that step.

    Args:
        budget: the expected cost that all problems may still have together.
        max_chains: the most chains of one problem, with those it has.
        floor: chains that every problem gets in any case, with those it has, before the rest is divided.
        wave: chains sampled at a time.

    Returns:
        a grant for each problem, and the price: the gain per cost of the first step that was too expensive; 0 where the
        budget is enough for all that gain.
    """
    num_owed = [max(0, min(floor, max_chains) - bid.num_chains) for bid in bids]
    remaining = budget - sum(bid.chain_cost * owed for bid, owed in zip(bids, num_owed, strict=True))
    menus = [steps_of(bid, max_chains, wave) for bid in bids]
    grants = [Grant(owed) for owed in num_owed]
    problem_of_step = np.repeat(np.arange(len(bids)), [len(steps.grants) for steps in menus])
    index_of_step = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(steps.grants)) for steps in menus)])
    slopes = np.concatenate([np.zeros(0), *(steps.slopes for steps in menus)])
    paid = np.zeros(len(bids))  # of the cost of a problem's steps
    for i, (bid, owed) in enumerate(zip(bids, num_owed, strict=True)):
        if owed:
            paid[i] = bid.chain_cost * chain_needs(bid.alpha, bid.beta, bid.unsolved, owed, wave).sum()
    reached = np.zeros(len(bids))  # cost of a problem's steps so far
    is_open = np.ones(len(bids), bool)
    price = 0.0
    for i in np.lexsort((index_of_step, problem_of_step, -slopes)):
        problem, step = int(problem_of_step[i]), int(index_of_step[i])
        if not is_open[problem]:
            continue
        grant = menus[problem].grants[step]
        reached[problem] += menus[problem].costs[step]
        cost = max(0.0, reached[problem] - paid[problem])  # the floor may have paid for it
        if cost > remaining:
            is_open[problem] = False
            price = max(price, float(slopes[i]))
        elif grant.tree >= 0 or grant.num_chains > grants[problem].num_chains:
            remaining -= cost
            paid[problem] += cost
            grants[problem] = grant
    return grants, price

"""Allocation: one budget over many problems, at one price.

A problem's menu is what it may be given: up to so many chains more, as long as it needs them, or one tree search. Each
item has an expected gain, the probability that it turns a wrong answer into a right one, and an expected cost. Of all
problems, the steps with the most gain per cost are taken until the budget is spent; the ratio where that happens is the
price lambda, the multiplier of the budget constraint (2410.04707, section 3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Bid:
    """What the gate believes of a problem, and what compute costs there. Costs have one unit, whichever it is.

    Attributes:
        unsolved: P(the answer it would give now is wrong).
        alpha, beta: of the Beta distribution of the probability that a further chain mends it, given that it is wrong.
        chain_cost: of a further chain, given what is shared.
        trees, tree_costs: by tree search of the gate's menu: P(it mends the answer), given that it is wrong; its cost.
        alone: what one chain alone costs, the unit of a budget.
        spent: what the problem has cost so far.
        num_chains: sampled so far.
    """

    unsolved: float
    alpha: float
    beta: float
    chain_cost: float
    trees: tuple[float, ...]
    tree_costs: tuple[float, ...]
    alone: float
    spent: float
    num_chains: int

    def to_json(self) -> dict[str, Any]:
        """Its attributes."""
        return {**vars(self), "trees": list(self.trees), "tree_costs": list(self.tree_costs)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Bid":
        """The bid that `to_json` described."""
        bid = cls(**data)
        return replace(bid, trees=tuple(bid.trees), tree_costs=tuple(bid.tree_costs))


@dataclass(frozen=True)
class Grant:
    """What a problem is given: `num_chains` further chains, or the `tree`-th search of the menu; neither = it ends."""

    num_chains: int = 0
    tree: int = -1

    @property
    def ends(self) -> bool:
        """Whether the problem gets nothing more."""
        return self.num_chains == 0 and self.tree < 0


def chain_gains(alpha: float, beta: float, unsolved: float, num_chains: int) -> np.ndarray:
    """`[num_chains]` gains of the first further chain, the second, ...: `unsolved * E[p (1 - p)^(n - 1)]`.

    With p ~ Beta(alpha, beta) the expectation is B(alpha + 1, beta + n - 1) / B(alpha, beta), a product of ratios. It
    falls with n.
    """
    j = np.arange(num_chains)
    falls = (beta + j) / (alpha + beta + 1 + j)
    return unsolved * alpha / (alpha + beta) * np.concatenate([[1.0], np.cumprod(falls[:-1])])[:num_chains]


def chain_needs(alpha: float, beta: float, unsolved: float, num_chains: int, wave: int = 1) -> np.ndarray:
    """`[num_chains]` P(the first further chain is sampled), the second, ...: P(the m in earlier waves mend nothing).

    That is `1 - unsolved + unsolved * E[(1 - p)^m]`. Once a chain has mended the answer, the gate sees it and asks for
    no more, so what is planned costs less than it may. An answer that is right already no chain mends: there all that
    is planned is sampled, as far as the gate does not know it. Gain over need of a chain is then what it gains where
    it is sampled, P(wrong | nothing mended so far) times its chance: a plan and a new look ask the same price of it.
    """
    j = np.arange(max(0, num_chains - 1))
    after = np.concatenate([[1.0], np.cumprod((beta + j) / (alpha + beta + j))])
    return 1 - unsolved + unsolved * after[np.arange(num_chains) // wave * wave]


@dataclass(frozen=True)
class Steps:
    """Ways up a problem's menu, each better than staying where it begins; their gain per cost falls.

    Attributes:
        gains, costs: `[n]` of each step.
        grants: what has been given after each.
    """

    gains: np.ndarray
    costs: np.ndarray
    grants: tuple[Grant, ...]

    @property
    def slopes(self) -> np.ndarray:
        """`[n]` gain per cost."""
        return self.gains / self.costs


@lru_cache(maxsize=1 << 12)  # most bids stand for many rounds
def steps_of(bid: Bid, max_chains: int, wave: int = 1) -> Steps:
    """The upper concave hull of a menu over (expected cost, gain), from nothing: all that any price can choose.

    Args:
        max_chains: a problem gets at most so many, with those it has.
        wave: chains sampled at a time.
    """
    more = max(0, max_chains - bid.num_chains)
    gains = np.r_[
        0.0, np.cumsum(chain_gains(bid.alpha, bid.beta, bid.unsolved, more)), np.multiply(bid.unsolved, bid.trees)
    ]
    needs = chain_needs(bid.alpha, bid.beta, bid.unsolved, more, wave)
    costs = np.r_[0.0, bid.chain_cost * np.cumsum(needs), bid.tree_costs]
    grants = [Grant(n) for n in range(more + 1)] + [Grant(tree=i) for i in range(len(bid.trees))]
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


def at_price(bid: Bid, price: float, max_chains: int, wave: int = 1) -> Grant:
    """What a problem takes at a price: all steps whose gain per cost is at least that."""
    steps = steps_of(bid, max_chains, wave)
    count = int((steps.slopes >= price).sum())
    return steps.grants[count - 1] if count else Grant()


def allocate(
    bids: Sequence[Bid], budget: float, *, max_chains: int, floor: int = 0, wave: int = 1
) -> tuple[list[Grant], float]:
    """Divides a budget among problems so that the expected number of right answers is the highest.

    Exact up to the last step that does not fit: no allocation of the budget gains more than this one and that step.

    Args:
        budget: what all may still cost together, as expected.
        max_chains: of one problem, with those it has.
        floor: chains that every problem gets in any case, with those it has, before the rest is divided.
        wave: chains sampled at a time.

    Returns:
        a grant for each problem, and the price: the gain per cost of the first step that was too expensive; 0 where the
        budget is enough for all that gain.
    """
    owed = [max(0, min(floor, max_chains) - bid.num_chains) for bid in bids]
    left = budget - sum(bid.chain_cost * more for bid, more in zip(bids, owed, strict=True))
    menus = [steps_of(bid, max_chains, wave) for bid in bids]
    grants = [Grant(more) for more in owed]
    which = np.repeat(np.arange(len(bids)), [len(steps.grants) for steps in menus])
    within = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(steps.grants)) for steps in menus)])
    slopes = np.concatenate([np.zeros(0), *(steps.slopes for steps in menus)])
    paid = np.zeros(len(bids))  # of what steps cost
    for i, (bid, more) in enumerate(zip(bids, owed, strict=True)):
        if more:
            paid[i] = bid.chain_cost * chain_needs(bid.alpha, bid.beta, bid.unsolved, more, wave).sum()
    reached, open_ = np.zeros(len(bids)), np.ones(len(bids), bool)
    price = 0.0
    for i in np.lexsort((within, which, -slopes)):
        problem, step = int(which[i]), int(within[i])
        if not open_[problem]:
            continue
        grant = menus[problem].grants[step]
        reached[problem] += menus[problem].costs[step]
        cost = max(0.0, reached[problem] - paid[problem])  # the floor may have paid for it
        if cost > left:
            open_[problem] = False
            price = max(price, float(slopes[i]))
        elif grant.tree >= 0 or grant.num_chains > grants[problem].num_chains:
            left -= cost
            paid[problem] += cost
            grants[problem] = grant
    return grants, price

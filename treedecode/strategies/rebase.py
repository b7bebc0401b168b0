"""REBASE, reward balanced search (2408.00724: inference scaling laws)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from treedecode.common.arrays import IntArray
from treedecode.common.validation import int_in, number_in, one_of
from treedecode.decoding.frontier import Frontier
from treedecode.engine.sampling import Sampling
from treedecode.search.search import Outcome, Search
from treedecode.search.strategy import ANSWERS, Strategy, choose


@dataclass(frozen=True)
class REBASE(Strategy):
    """`width` solutions; at every depth, those not yet complete are shared out by the softmax of the branches' scores.

    Args:
        width: solutions in all (N of the paper).
        temperature: T_b of the paper, which balances exploration and exploitation (0.2 in its code).
        answer: chooses among the solutions: "best", "weighted" or "majority".
        sampling: in place of the run's.
    """

    name: ClassVar[str] = "rebase"
    needs_verifier: ClassVar[bool] = True

    width: int = 16
    temperature: float = 0.2
    answer: str = "weighted"
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        int_in("width", self.width, 1)
        number_in("temperature", self.temperature, 1e-6)
        one_of("answer", self.answer, ANSWERS)

    @property
    def num_branches(self) -> int:
        return self.width

    async def solve(self, search: Search) -> Outcome:
        branches = (await search.root()).spread(self.width)
        growing = search.unfinished(branches)
        while growing.any():
            await search.step(branches, self.sampling)
            await search.score(branches, growing)
            growing = search.unfinished(branches)
            if growing.any():
                # each complete solution takes one of the width; the others share the rest
                counts = np.ones(len(branches), np.int64)
                with branches.select(growing) as live:
                    counts[growing] = self._widths(search, live, int(growing.sum()))
                branches, growing = branches.spread(counts), np.repeat(growing, counts)
        return choose(search, search.outcomes(branches), self.answer)

    def _widths(self, search: Search, live: Frontier, budget: int) -> IntArray:
        """Divides a budget of children among the live branches."""
        return share_out(softmax(live.scores / self.temperature), budget)


def softmax(x: np.ndarray) -> np.ndarray:
    """Returns exp(x) / sum(exp(x))."""
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def share_out(weights: np.ndarray, budget: int) -> IntArray:
    """Divides a budget into whole shares nearest to `budget * weights`.

    Shares are rounded down, and the rest of the budget goes to the largest remainders, of equals to the first. The
    paper rounds each share to the nearest; where that keeps the sum, the shares are the same.

    Args:
        weights: `[n]`, normalised.

    Returns:
        `[n]` int64 that sum to the budget.
    """
    shares = weights * budget
    counts = np.floor(shares).astype(np.int64)
    order = np.argsort(counts - shares, kind="stable")
    counts[order[: budget - counts.sum()]] += 1
    return counts

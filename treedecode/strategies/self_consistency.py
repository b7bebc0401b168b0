"""Self-consistency (2203.11171): samples chains, and takes the answer of most."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from treedecode.common.validation import int_in, number_in
from treedecode.engine.sampling import Sampling
from treedecode.search.search import Outcome, Search
from treedecode.search.strategy import CostSamples, Strategy


@dataclass(frozen=True)
class SelfConsistency(Strategy):
    """The majority of `num_samples` chains over classes of equal answers; with `stop`, as few as are enough.

    Args:
        num_samples: chains at most (40 in the paper).
        stop: ends sampling early: "never"; "beta" (adaptive-consistency, 2305.11860: the first of the two leading
            answers is the more frequent one with probability `confidence` or more, under a uniform prior);
            "window" (early-stopping self-consistency, 2401.10480: `window` chains in a row agree).
        window: chains sampled at a time where it may stop early.
        confidence: of "beta".
        sampling: in place of the run's.
    """

    name: ClassVar[str] = "self_consistency"

    num_samples: int = 40
    stop: str = "never"
    window: int = 5
    confidence: float = 0.95
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        int_in("num_samples", self.num_samples, 1)
        int_in("window", self.window, 1)
        number_in("confidence", self.confidence, 0, 1)
        if self.stop not in ("never", "beta", "window"):
            raise ValueError(f"stop: expected 'never', 'beta' or 'window', got {self.stop!r}")

    @property
    def num_branches(self) -> int:
        return 1 + self._portion

    @property
    def _portion(self) -> int:
        return self.num_samples if self.stop == "never" else min(self.window, self.num_samples)

    def extendable_samples(self, scorer: Any) -> int | None:
        return self.num_samples

    def cost(self, samples: CostSamples) -> np.ndarray:
        return samples.chains(self.num_samples)

    async def solve(self, search: Search) -> Outcome:
        root = await search.root()
        root.skip_children(len(search.earlier))
        counts = np.zeros(1, np.int64)
        chains: list[Outcome] = []
        while len(chains) < self.num_samples:
            end = min(len(chains) + self._portion, self.num_samples)
            chains += search.earlier[len(chains) : end]
            if len(chains) < end:
                with root.fork(end - len(chains)) as more:
                    await search.complete(more, self.sampling)
                    chains += search.outcomes(more)
            classes = search.classes([chain.answer for chain in chains])
            counts = np.bincount(classes[classes >= 0], minlength=2)
            if self.stop == "beta" and leads(counts) >= self.confidence:
                break
            if self.stop == "window" and len(set(classes[-self._portion :])) == 1 and classes[-1] >= 0:
                break
        return search.vote(chains, np.ones(len(chains)))


def leads(counts: np.ndarray) -> float:
    """Returns P(the leading answer is more frequent than the second), given their votes and a uniform prior.

    The posterior of the leader's share among the two is Beta(a + 1, b + 1) (2305.11860), and for whole numbers
    P(share > 1/2) = P(Binomial(a + b + 1, 1/2) <= a), a finite sum.
    """
    second, first = np.sort(counts)[-2:].tolist()
    n = first + second + 1
    return sum(math.comb(n, k) for k in range(first + 1)) / 2**n

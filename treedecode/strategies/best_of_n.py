"""Best of n (2110.14168): samples solutions, and lets the verifier choose."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from treedecode.common.validation import int_in, one_of
from treedecode.engine.sampling import Sampling
from treedecode.search.search import Outcome, Search
from treedecode.search.strategy import CostSamples, Strategy, choose, scores_branches_alone


@dataclass(frozen=True)
class BestOfN(Strategy):
    """The best scored of `num_samples` solutions, or the answer whose solutions score most together.

    Args:
        num_samples: solutions (100 in the paper).
        answer: "best", or "weighted": scores of equal answers add up (2206.02336).
        sampling: in place of the run's.
    """

    name: ClassVar[str] = "best_of_n"
    needs_verifier: ClassVar[bool] = True

    num_samples: int = 100
    answer: str = "best"
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        int_in("num_samples", self.num_samples, 1)
        one_of("answer", self.answer, ("best", "weighted"))

    @property
    def num_branches(self) -> int:
        return self.num_samples

    def extendable_samples(self, scorer: Any) -> int | None:
        return self.num_samples if scores_branches_alone(scorer) else None

    def cost(self, samples: CostSamples) -> np.ndarray:
        return samples.chains(self.num_samples)

    async def solve(self, search: Search) -> Outcome:
        root, earlier = await search.root(), search.earlier
        if earlier:  # the first of them was the root itself
            root.skip_children(len(earlier) - 1)
            solutions = root.fork(self.num_samples - len(earlier))
        else:
            solutions = root.spread(self.num_samples)
        await search.complete(solutions, self.sampling)
        await search.score(solutions)
        return choose(search, earlier + search.outcomes(solutions), self.answer)

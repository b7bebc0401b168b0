"""Beam search over steps, and lookahead search (2408.03314: scaling test-time compute optimally)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from treedecode.sampling import Sampling
from treedecode.search import Outcome, Search
from treedecode.strategies.base import ANSWERS, Strategy, choose, require, require_one_of
from treedecode.tree import Frontier


@dataclass(frozen=True)
class StepBeamSearch(Strategy):
    """Of `num_beams` steps the best `num_beams / width` go on, with `width` next steps each, until all are complete.

    A complete solution stays a beam of its own while its score lets it.

    Args:
        num_beams: N of the paper, a multiple of `width`.
        width: M of the paper.
        max_steps: steps chosen by search; what is left of a solution after them is generated in one go.
        lookahead: a step is rated by the verifier this many steps further on, reached greedily (k of the paper).
        answer: how one of the last beams is chosen: "best", "weighted" or "majority".
        sampling: in place of the run's.
    """

    name: ClassVar[str] = "step_beam_search"
    needs_verifier: ClassVar[bool] = True

    num_beams: int = 16
    width: int = 4
    max_steps: int = 40
    lookahead: int = 0
    answer: str = "weighted"
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        for name in ("num_beams", "width", "max_steps"):
            require(name, getattr(self, name), int, 1)
        require("lookahead", self.lookahead, int, 0)
        require_one_of("answer", self.answer, ANSWERS)
        if self.num_beams % self.width:
            raise ValueError(f"num_beams: expected a multiple of the width {self.width}, got {self.num_beams}")

    @property
    def num_branches(self) -> int:
        return self.num_beams * (2 if self.lookahead else 1)

    @property
    def num_trees(self) -> int:
        """In how many sets of beams, each of which goes on with its own best, the search is divided."""
        return 1

    async def solve(self, search: Search) -> Outcome:
        beams = (await search.root()).spread(self.num_beams)
        tree = np.repeat(np.arange(self.num_trees), self.num_beams // self.num_trees)
        for _ in range(self.max_steps):
            growing = search.unfinished(beams)
            await search.step(beams, self.sampling)
            await self._rate(search, beams, growing)
            growing = search.unfinished(beams)
            if not growing.any():
                break
            keep = self.num_beams // self.width // self.num_trees
            counts = np.where(growing, self.width, 1) * best_of_each(tree, beams.scores, keep)
            beams, tree = beams.spread(counts), np.repeat(tree, counts)
        growing = search.unfinished(beams)
        await search.complete(beams, self.sampling)
        await search.score(beams, growing)
        return choose(search, beams, self.answer)

    async def _rate(self, search: Search, beams: Frontier, which: np.ndarray) -> None:
        """Scores beams, `lookahead` steps on."""
        if not self.lookahead:
            await search.score(beams, which)
            return
        scores, greedy = beams.scores.copy(), replace(self.sampling or search.sampling, temperature=0.0, seed=None)
        with beams.select(which) as growing, growing.fork(1) as ahead:
            for _ in range(self.lookahead):
                await search.step(ahead, greedy)
            scores[which] = await search.score(ahead)
        beams.scores = scores


def best_of_each(tree: np.ndarray, scores: np.ndarray, keep: int) -> np.ndarray:
    """`[n]` bool: the beam is one of the `keep` best scored ones of its tree; of equals the first are."""
    kept = np.zeros(len(tree), bool)
    for one in np.unique(tree):
        members = np.flatnonzero(tree == one)
        kept[members[np.argsort(-scores[members], kind="stable")[:keep]]] = True
    return kept

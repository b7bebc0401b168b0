"""Beam search over steps, and lookahead search (2408.03314: scaling test-time compute optimally)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from treedecode.common.arrays import IntArray
from treedecode.common.validation import int_in, one_of
from treedecode.decoding.frontier import Frontier
from treedecode.engine.sampling import Sampling
from treedecode.search.search import Outcome, Search
from treedecode.search.strategy import ANSWERS, Strategy, choose


@dataclass(frozen=True)
class StepBeamSearch(Strategy):
    """Of `num_beams` steps the best `num_beams / width` go on, with `width` next steps each, until all are complete.

    As in the reference implementation (Beeching, Tunstall and Rush 2024: Scaling test-time compute with open models),
    complete solutions are set aside as candidates for the answer, and all `num_beams` go on from those still growing:
    where they are fewer than `num_beams / width`, with more next steps each.

    Args:
        num_beams: N of the paper, a multiple of `width`.
        width: M of the paper.
        max_steps: steps chosen by search; the rest of a solution is generated in one go.
        lookahead: a step is rated by the verifier this many steps further on, reached greedily (k of the paper).
        answer: chooses among the solutions: "best", "weighted" or "majority".
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
            int_in(name, getattr(self, name), 1)
        int_in("lookahead", self.lookahead, 0)
        one_of("answer", self.answer, ANSWERS)
        if self.num_beams % self.width:
            raise ValueError(f"num_beams: expected a multiple of the width {self.width}, got {self.num_beams}")

    @property
    def num_branches(self) -> int:
        return self.num_beams * (2 if self.lookahead else 1)

    @property
    def num_trees(self) -> int:
        """The number of groups of beams, each of which keeps its own best."""
        return 1

    async def solve(self, search: Search) -> Outcome:
        beams = (await search.root()).spread(self.num_beams)
        beams_per_tree = self.num_beams // self.num_trees
        tree = np.repeat(np.arange(self.num_trees), beams_per_tree)
        complete: list[Outcome] = []
        for _ in range(self.max_steps):
            await search.step(beams, self.sampling)
            await self._rate(search, beams)
            growing = search.unfinished(beams)
            with beams, beams.select(~growing) as done:
                complete += search.outcomes(done)
                beams, tree = beams.select(growing), tree[growing]
            if not len(beams):
                return choose(search, complete, self.answer)
            counts = next_steps(tree, beams.scores, beams_per_tree // self.width, beams_per_tree)
            beams, tree = beams.spread(counts), np.repeat(tree, counts)
        await search.complete(beams, self.sampling)
        await search.score(beams)
        return choose(search, complete + search.outcomes(beams), self.answer)

    async def _rate(self, search: Search, beams: Frontier) -> None:
        """Scores beams by where greedy decoding takes them in `lookahead` steps."""
        if not self.lookahead:
            await search.score(beams)
            return
        greedy = replace(self.sampling or search.sampling, temperature=0.0, seed=None)
        with beams.fork(1) as ahead:
            for _ in range(self.lookahead):
                await search.step(ahead, greedy)
            beams.scores = await search.score(ahead)


def next_steps(tree: IntArray, scores: np.ndarray, keep: int, num_steps: int) -> IntArray:
    """Divides next steps among beams: the `keep` best beams of a tree share its `num_steps` evenly.

    Of equal scores the first is kept. Steps that are left over go to the best.

    Args:
        tree: `[n]`, the tree that each beam belongs to.
        scores: `[n]`.
        keep: beams kept at most, from 1 to `num_steps`.

    Returns:
        `[n]` int64, how many next steps each beam gets; 0 = it is dropped.
    """
    counts = np.zeros(len(tree), np.int64)
    for tree_id in np.unique(tree):
        members = np.flatnonzero(tree == tree_id)
        kept = members[np.argsort(-scores[members], kind="stable")[:keep]]
        counts[kept] = num_steps // len(kept) + (np.arange(len(kept)) < num_steps % len(kept))
    return counts

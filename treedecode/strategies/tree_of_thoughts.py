"""Tree of Thoughts (2305.10601): searches over steps of reasoning, breadth first or depth first."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from treedecode.common.validation import int_in, number_in, one_of
from treedecode.decoding.frontier import Frontier
from treedecode.engine.sampling import Sampling
from treedecode.search.search import Outcome, Search
from treedecode.search.strategy import CostSamples, Strategy, rank
from treedecode.strategies.propose import propose


@dataclass(frozen=True)
class TreeOfThoughts(Strategy):
    """Every thought is a step; those that the verifier rates best are followed.

    Args:
        depth: steps chosen by search; the rest of a solution is generated in one go.
        width: steps tried from each branch (5 in the paper).
        generate: "sample": steps are sampled one by one, for long ones that differ. "propose": the model lists the next
            steps in one answer, for short ones that would come out alike (the paper's Game of 24).
        propose_prompt: asks for that list.
        propose_tokens: limits it.
        keep: branches kept after each step (`b` of the paper's BFS, 5 for the Game of 24).
        order: "bfs", or "dfs": the best child first, back to its siblings when it is dead or its solution falls short.
        dead: a branch scored below this is given up; None = none is ("dfs": the paper's threshold).
        good: "dfs" ends with the first solution that has an answer and is scored at least this; None = goes on as long
            as it has visits.
        max_visits: "dfs": steps of search at most.
        sampling: in place of the run's.
    """

    name: ClassVar[str] = "tree_of_thoughts"
    needs_verifier: ClassVar[bool] = True

    depth: int = 3
    width: int = 5
    keep: int = 5
    generate: str = "sample"
    propose_prompt: str = "\nPossible next steps:\n"
    propose_tokens: int = 256
    order: str = "bfs"
    dead: float | None = None
    good: float | None = None
    max_visits: int = 100
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        for name in ("depth", "width", "keep", "max_visits", "propose_tokens"):
            int_in(name, getattr(self, name), 1)
        one_of("order", self.order, ("bfs", "dfs"))
        one_of("generate", self.generate, ("sample", "propose"))
        if not self.propose_prompt:
            raise ValueError("propose_prompt: is empty; the model has to be asked")
        for name in ("dead", "good"):
            if getattr(self, name) is not None:
                number_in(name, getattr(self, name), -float("inf"))

    @property
    def num_branches(self) -> int:
        if self.order == "bfs":
            return self.keep * (1 + self.width)
        return 1 + self.width * self.depth

    def cost(self, samples: CostSamples) -> np.ndarray:
        if self.order != "bfs" or self.dead is not None or self.generate != "sample":
            return super().cost(samples)
        return samples.tree(self.depth, self.width, self.keep)

    async def solve(self, search: Search) -> Outcome:
        return await (self._bfs(search) if self.order == "bfs" else self._dfs(search))

    async def _bfs(self, search: Search) -> Outcome:
        states = await search.root()
        for _ in range(self.depth):
            states = await self._thoughts(search, states)
            states = self._alive(states).prune(self.keep)
            if search.final(states).all():
                break
        await search.complete(states, self.sampling)
        await search.score(states)
        return search.best(states)

    async def _thoughts(self, search: Search, states: Frontier) -> Frontier:
        """Makes the children of every state, scored; equal ones are one. A complete solution is its own only child."""
        if self.generate == "propose":
            limits = {"width": self.width, "max_new_tokens": self.propose_tokens}
            children = await propose(search, states, self.propose_prompt, **limits, sampling=self.sampling)
            states.release()
        else:
            children = states.fork(np.where(search.final(states), 1, self.width))
            states.release()
            await search.step(children, self.sampling)
        children = children.merge()
        await search.score(children)
        return children

    def _alive(self, states: Frontier) -> Frontier:
        if self.dead is None or (states.scores < self.dead).all():
            return states  # where no branch is alive, the search goes on with the best of the dead
        return states.prune(int((states.scores >= self.dead).sum()))

    async def _dfs(self, search: Search) -> Outcome:
        solutions: list[Outcome] = []
        visits = self.max_visits

        async def visit(state: Frontier, depth: int) -> bool:
            """Searches below a state, and returns whether a solution was good enough."""
            nonlocal visits
            if depth == self.depth or search.final(state).all():
                await search.complete(state, self.sampling)
                [score] = await search.score(state)
                solutions.append(search.outcome(state, 0, float(score)))
                return self.good is not None and score >= self.good and solutions[-1].answer is not None
            if visits == 0:
                return False
            visits -= 1
            children = await self._thoughts(search, state.select(np.array([0])))
            order = np.argsort(-children.scores, kind="stable")[: self.keep]
            with children:
                for child in order:
                    if self.dead is not None and children.scores[child] < self.dead:
                        break
                    with children.select(np.array([child])) as selected:
                        if await visit(selected, depth + 1):
                            return True
            return False

        await visit(await search.root(), 0)
        if not solutions:
            return search.best_so_far()
        return max(solutions, key=rank)

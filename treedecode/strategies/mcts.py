"""Monte Carlo tree search over steps, with the PUCT rule of AlphaZero (1712.01815) and sampled actions (2104.06303)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from treedecode.common.validation import int_in, number_in, one_of
from treedecode.decoding.frontier import Frontier
from treedecode.engine.sampling import Sampling
from treedecode.search.search import Outcome, Search
from treedecode.search.strategy import Strategy, rank
from treedecode.strategies.puct import PuctNode, exploration


@dataclass(frozen=True)
class MCTS(Strategy):
    """A simulation goes down by PUCT to a leaf, samples `width` steps from it and backs up the value of each.

    Equal steps are one child, whose prior is its share of the samples and whose value is backed up once for each. Q,
    the mean of the values backed up through a node, is scaled to [0, 1] by the least and greatest Q of the tree, as in
    MuZero (1911.08265), so that the constants fit any verifier.

    Args:
        num_simulations: leaves selected; complete solutions that are selected again count too, but cost nothing.
        width: steps sampled at a leaf (5 in 2310.04406: LATS).
        parallel: leaves selected before they are expanded, all in the same forwards. Pending visits count in the
            exploration term alone (1810.11755: WU-UCT).
        evaluate: the value of a step: "verifier": its score; "rollout": the score of a solution completed from it.
        answer: "value": the best scored solution of all; "visits": the one most visited (AlphaZero).
        c_init, c_base: of PUCT.
        sampling: in place of the run's.
    """

    name: ClassVar[str] = "mcts"
    needs_verifier: ClassVar[bool] = True

    num_simulations: int = 16
    width: int = 5
    parallel: int = 4
    evaluate: str = "verifier"
    answer: str = "value"
    c_init: float = 1.25
    c_base: float = 19652.0
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        for name in ("num_simulations", "width", "parallel"):
            int_in(name, getattr(self, name), 1)
        number_in("c_init", self.c_init, 0)
        number_in("c_base", self.c_base, 1)
        one_of("evaluate", self.evaluate, ("verifier", "rollout"))
        one_of("answer", self.answer, ("value", "visits"))

    @property
    def num_branches(self) -> int:
        rollouts = min(self.parallel, self.num_simulations) * self.width if self.evaluate == "rollout" else 0
        return 1 + self.num_simulations * (self.width - 1) + rollouts

    async def solve(self, search: Search) -> Outcome:
        root, solutions = PuctNode(state=await search.root()), list[Outcome]()
        remaining = self.num_simulations
        while remaining:
            leaves: list[PuctNode] = []
            for _ in range(min(self.parallel, remaining)):
                leaf = self._select(root)
                if leaf in leaves:
                    break  # PUCT may choose another once this one is expanded
                remaining -= 1
                if leaf.outcome is not None:
                    leaf.back_up(leaf.value)
                    continue
                leaves.append(leaf)
                leaf.add_pending(1)
            if leaves:
                await self._expand(search, leaves, solutions)
        if self.answer == "value" and solutions:
            return max(solutions, key=rank)
        leaf = root
        while leaf.children:
            leaf = max(leaf.children, key=lambda node: (node.visits, node.value))
        if leaf.outcome is None:
            assert leaf.state is not None
            await search.complete(leaf.state, self.sampling)
            await search.score(leaf.state)
            leaf.outcome = search.best(leaf.state)
        return leaf.outcome

    def _select(self, root: PuctNode) -> PuctNode:
        means = [node.q for node in root.below()] or [0.0]
        low, high = min(means), max(means)
        node = root
        while node.children:
            c = exploration(node.visits + node.pending, self.c_init, self.c_base)
            node = max(node.children, key=lambda child: child.puct(c, low, high))
        return node

    async def _expand(self, search: Search, leaves: list[PuctNode], solutions: list[Outcome]) -> None:
        """Gives leaves their children, and appends the solutions that complete to `solutions`."""
        states = [leaf.state for leaf in leaves if leaf.state is not None]
        steps = states[0].join(*states[1:]).spread(self.width)
        await search.step(steps, self.sampling)
        leaf_of = np.repeat(np.arange(len(leaves)), self.width)
        parts = [steps.select(leaf_of == i).merge() for i in range(len(leaves))]
        steps.release()
        parents = [leaf for leaf, part in zip(leaves, parts, strict=True) for _ in range(len(part))]
        counts = np.concatenate([part.counts for part in parts])
        steps = parts[0].join(*parts[1:])
        await self._evaluate(search, steps, solutions)
        is_open = search.unfinished(steps)
        for i, parent in enumerate(parents):
            value = float(steps.scores[i])
            child = PuctNode(parent=parent, prior=float(counts[i] / self.width), value=value)
            if is_open[i]:
                child.state = steps.select(np.array([i]))
            else:
                child.outcome = search.outcome(steps, i, value)
            parent.children.append(child)
            child.back_up(value, int(counts[i]))
        steps.release()
        for leaf in leaves:
            leaf.state = None
            leaf.add_pending(-1)

    async def _evaluate(self, search: Search, steps: Frontier, solutions: list[Outcome]) -> None:
        if self.evaluate == "verifier":
            await search.score(steps)
            complete = np.flatnonzero(~search.unfinished(steps))
            solutions += [search.outcome(steps, int(i), float(steps.scores[i])) for i in complete]
            return
        with steps.fork(1) as rollouts:
            await search.complete(rollouts, self.sampling)
            steps.scores = await search.score(rollouts)
            solutions += [search.outcome(rollouts, i, float(score)) for i, score in enumerate(rollouts.scores)]

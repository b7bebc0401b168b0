"""Monte Carlo tree search over steps, with the PUCT rule of AlphaZero (1712.01815) and sampled actions (2104.06303)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from treedecode.common.validation import int_in, number_in, one_of
from treedecode.decoding.frontier import Frontier
from treedecode.engine.sampling import Sampling
from treedecode.search.search import Outcome, Search
from treedecode.search.strategy import Strategy, rank
from treedecode.strategies.puct import Node, exploration


@dataclass(frozen=True)
class MCTS(Strategy):
    """A simulation goes down by PUCT to a leaf, samples `width` steps from it and backs up what each is worth.

    Equal steps are one child, whose prior is its share of the samples and whose value is backed up once for each. Q,
    the mean of what was backed up through a node, is scaled to [0, 1] by the least and greatest of the tree, as in
    MuZero (1911.08265), so that the constants fit any verifier.

    Args:
        num_simulations: leaves selected; complete solutions that are selected again count too, but cost nothing.
        width: steps sampled at a leaf (5 in 2310.04406: LATS).
        parallel: leaves selected before they are expanded, all in the same forwards. Visits under way count in the
            exploration term alone (1810.11755: WU-UCT).
        evaluate: what a step is worth: "verifier": its score; "rollout": the score of a solution completed from it.
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
        root, found = Node(state=await search.root()), list[Outcome]()
        left = self.num_simulations
        while left:
            leaves: list[Node] = []
            for _ in range(min(self.parallel, left)):
                leaf = self._select(root)
                if leaf in leaves:
                    break  # to be seen again once it is expanded
                left -= 1
                if leaf.outcome is not None:
                    leaf.back_up(leaf.value)
                    continue
                leaves.append(leaf)
                leaf.add_pending(1)
            if leaves:
                await self._expand(search, leaves, found)
        if self.answer == "value" and found:
            return max(found, key=rank)
        leaf = root
        while leaf.children:
            leaf = max(leaf.children, key=lambda node: (node.visits, node.value))
        if leaf.outcome is None:
            assert leaf.state is not None
            await search.complete(leaf.state, self.sampling)
            await search.score(leaf.state)
            leaf.outcome = search.best(leaf.state)
        return leaf.outcome

    def _select(self, root: Node) -> Node:
        means = [node.q for node in root.below()] or [0.0]
        low, high = min(means), max(means)
        node = root
        while node.children:
            c = exploration(node.visits + node.pending, self.c_init, self.c_base)
            node = max(node.children, key=lambda child: child.puct(c, low, high))
        return node

    async def _expand(self, search: Search, leaves: list[Node], found: list[Outcome]) -> None:
        states = [leaf.state for leaf in leaves if leaf.state is not None]
        steps = states[0].join(*states[1:]).spread(self.width)
        await search.step(steps, self.sampling)
        of_leaf = np.repeat(np.arange(len(leaves)), self.width)
        parts = [steps.select(of_leaf == i).merge() for i in range(len(leaves))]
        steps.release()
        parents = [leaf for leaf, part in zip(leaves, parts, strict=True) for _ in range(len(part))]
        counts = np.concatenate([part.counts for part in parts])
        steps = parts[0].join(*parts[1:])
        await self._evaluate(search, steps, found)
        is_open = search.unfinished(steps)
        for i, parent in enumerate(parents):
            value = float(steps.scores[i])
            child = Node(parent=parent, prior=float(counts[i] / self.width), value=value)
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

    async def _evaluate(self, search: Search, steps: Frontier, found: list[Outcome]) -> None:
        if self.evaluate == "verifier":
            await search.score(steps)
            done = np.flatnonzero(~search.unfinished(steps))
            found += [search.outcome(steps, int(i), float(steps.scores[i])) for i in done]
            return
        with steps.fork(1) as rollouts:
            await search.complete(rollouts, self.sampling)
            steps.scores = await search.score(rollouts)
            found += [search.outcome(rollouts, i, float(score)) for i, score in enumerate(rollouts.scores)]

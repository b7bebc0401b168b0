"""The tree of Monte Carlo tree search, and the PUCT rule of AlphaZero (1712.01815) on it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from treedecode.decoding.frontier import Frontier
from treedecode.search.search import Outcome


def exploration(num_visits: int, c_init: float, c_base: float) -> float:
    """C(s) of a node, which grows slowly with its visits."""
    return math.log((1 + num_visits + c_base) / c_base) + c_init


@dataclass(eq=False)
class Node:
    """A step in the search.

    Attributes:
        prior: probability among its siblings.
        value: what it was worth when it was sampled.
        state: a branch to go on from; None once that has happened, or where the solution is complete.
        outcome: the complete solution.
        visits, total: values backed up through it, and their sum; q: their mean.
        pending: visits whose value is still to come.
    """

    parent: "Node | None" = None
    prior: float = 1.0
    value: float = 0.0
    state: Frontier | None = None
    outcome: Outcome | None = None
    children: list["Node"] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0
    pending: int = 0

    @property
    def q(self) -> float:
        return self.total / self.visits

    def puct(self, c: float, low: float, high: float) -> float:
        """Q + U among its siblings, Q being scaled from [low, high] to [0, 1]; pending visits count in U alone."""
        assert self.parent is not None
        q = (self.q - low) / (high - low) if high > low else 0.0
        num_visits = self.parent.visits + self.parent.pending
        return q + c * self.prior * math.sqrt(num_visits) / (1 + self.visits + self.pending)

    def path(self) -> Iterator["Node"]:
        """This node and all above it."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def below(self) -> Iterator["Node"]:
        """All nodes below it."""
        for child in self.children:
            yield child
            yield from child.below()

    def back_up(self, value: float, count: int = 1) -> None:
        """So many more visits with a value."""
        for node in self.path():
            node.visits += count
            node.total += count * value

    def add_pending(self, count: int) -> None:
        """So many more visits are under way."""
        for node in self.path():
            node.pending += count

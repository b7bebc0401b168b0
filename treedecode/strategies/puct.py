"""PuctNode: the tree of Monte Carlo tree search, with the PUCT rule of AlphaZero (1712.01815)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from treedecode.decoding.frontier import Frontier
from treedecode.search.search import Outcome


def exploration(num_visits: int, c_init: float, c_base: float) -> float:
    """Returns C(s) of a node, which grows slowly with its visits."""
    return math.log((1 + num_visits + c_base) / c_base) + c_init


@dataclass(eq=False)
class PuctNode:
    """A step of the search.

    Attributes:
        prior: probability among its siblings.
        value: its value when it was sampled.
        state: the branch that its children go on from; None once it has children, or where the solution is complete.
        outcome: the complete solution; None = the solution is not complete.
        visits, total: number and sum of the values backed up through it.
        pending: visits whose value is still to come.
    """

    parent: "PuctNode | None" = None
    prior: float = 1.0
    value: float = 0.0
    state: Frontier | None = None
    outcome: Outcome | None = None
    children: list["PuctNode"] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0
    pending: int = 0

    @property
    def q(self) -> float:
        """The mean of the values backed up through the node."""
        return self.total / self.visits

    def puct(self, c: float, low: float, high: float) -> float:
        """Returns Q + U, where Q is scaled from [low, high] to [0, 1] and pending visits count in U alone."""
        assert self.parent is not None
        q = (self.q - low) / (high - low) if high > low else 0.0
        num_visits = self.parent.visits + self.parent.pending
        return q + c * self.prior * math.sqrt(num_visits) / (1 + self.visits + self.pending)

    def path(self) -> Iterator["PuctNode"]:
        """Iterates over this node and all above it."""
        node: PuctNode | None = self
        while node is not None:
            yield node
            node = node.parent

    def below(self) -> Iterator["PuctNode"]:
        """Iterates over all nodes below this one."""
        for child in self.children:
            yield child
            yield from child.below()

    def back_up(self, value: float, count: int = 1) -> None:
        """Counts `count` visits that came to a value, here and in all nodes above."""
        for node in self.path():
            node.visits += count
            node.total += count * value

    def add_pending(self, count: int) -> None:
        """Counts `count` visits as begun, here and in all nodes above; a negative number ends them."""
        for node in self.path():
            node.pending += count

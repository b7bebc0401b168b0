"""ETS, efficient tree search (2502.13575): REBASE that weighs branches against the KV cache that they hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from treedecode.common.arrays import IntArray
from treedecode.common.validation import number_in
from treedecode.decoding.frontier import Frontier
from treedecode.search.search import Search
from treedecode.strategies.rebase import REBASE, share_out, softmax


@dataclass(frozen=True)
class ETS(REBASE):
    """At every depth the branches S go on that maximise sum(W_S) / sum(W) - kv_weight * |KV of S| / |KV|.

    W are REBASE's widths, and S has them shared out again. This is ETS without its term for diversity, which rewards
    branches that say different things and needs a model of sentence embeddings. The paper has an integer program choose
    S; without that term the best S is found exactly in one pass up the tree. The cost of a step is its tokens, where
    the paper's code counts steps.

    Args:
        kv_weight: lambda_b of the paper. With a weight of 1 keeping every branch is worth nothing, and it is the
            diversity term (whose weight is 1.5 in the paper's code) that speaks for keeping branches; without it the
            search narrows too soon. The default was chosen on validation problems (`docs/decisions/search.md`).
        width, temperature, answer, sampling: as `REBASE`.
    """

    name: ClassVar[str] = "ets"

    kv_weight: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        number_in("kv_weight", self.kv_weight, 0)

    def _widths(self, search: Search, live: Frontier, budget: int) -> IntArray:
        rewards = live.scores / self.temperature
        values = share_out(softmax(rewards), budget) / budget
        parents = [node.parent for node in search.tree.nodes]
        num_tokens = np.array([node.num_tokens * (node.kind != "prompt") for node in search.tree.nodes], float)
        held = {node for leaf in live.nodes.tolist() for node in search.tree.path(leaf)}
        costs = self.kv_weight * num_tokens / max(num_tokens[sorted(held)].sum(), 1)
        kept = best_subtree(parents, costs, live.nodes, values)
        counts = np.zeros(len(live), np.int64)
        counts[kept] = share_out(softmax(rewards[kept]), budget)
        return counts


def best_subtree(parents: Sequence[int], costs: np.ndarray, leaves: IntArray, values: np.ndarray) -> np.ndarray:
    """Chooses the branches with the greatest sum of values less costs of nodes; a shared node costs once.

    The gain of a node is the sum of the positive gains of its children and of the values of the branches that end at
    it, less its own cost. Where none of these is positive it is the greatest of them less the cost, since one branch
    has to be kept.

    Args:
        parents: `[nodes]` parent of every node, which stands before its children; -1 = none.
        costs: `[nodes]` >= 0.
        leaves: `[n]` nodes that the branches end at.
        values: `[n]` >= 0.

    Returns:
        `[n]` bool, True for branches to keep; not all False.
    """
    parts: dict[int, list[tuple[float, list[int]]]] = {}  # node -> (gain, branches) of every part kept below it
    for i, leaf in enumerate(leaves.tolist()):
        parts.setdefault(leaf, []).append((float(values[i]), [i]))
    for node in range(len(parents) - 1, -1, -1):
        if node in parts:
            gain, kept = _union(parts.pop(node))
            parts.setdefault(parents[node], []).append((gain - float(costs[node]), kept))
    _, kept = _union(parts[-1])
    mask = np.zeros(len(leaves), bool)
    mask[kept] = True
    return mask


def _union(parts: list[tuple[float, list[int]]]) -> tuple[float, list[int]]:
    """Joins the parts that gain; if none does, takes the part that loses least."""
    gaining = [part for part in parts if part[0] > 0] or [max(parts, key=lambda part: part[0])]
    return sum(gain for gain, _ in gaining), [i for _, kept in gaining for i in kept]

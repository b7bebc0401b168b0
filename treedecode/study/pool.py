"""One pool of chains for every budget: what fewer chains of it would have answered, without running them again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from treedecode.common.arrays import FloatArray
from treedecode.common.validation import int_in
from treedecode.decoding.search_tree import SearchTree
from treedecode.engine.sampling import Sampling
from treedecode.search.search import Outcome, Search
from treedecode.search.strategy import Strategy
from treedecode.tasks.base import Problem, Task, answer_classes


@dataclass(frozen=True)
class ChainPool(Strategy):
    """Samples the chains that self-consistency of the same size would, and leaves in the record what became of each.

    A chain whose solution is complete has the status "final" (or "answer") there, and with a verifier its score.
    """

    name: ClassVar[str] = "chain_pool"

    num_samples: int = 32
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        int_in("num_samples", self.num_samples, 1)

    @property
    def num_branches(self) -> int:
        return self.num_samples + 1

    async def solve(self, search: Search) -> Outcome:
        root = await search.root()
        chains = root.fork(self.num_samples)
        await search.complete(chains, self.sampling)
        for node in chains.nodes[search.final(chains)]:  # an end of sequence is not in the text
            search.tree.nodes[node].status = "final"
        outcome = search.majority(chains)
        if search.has_scorer:
            await search.score(chains)
        return outcome


@dataclass(frozen=True)
class Chains:
    """The chains of one problem.

    Attributes:
        classes: `[n]` int64, equal for equal answers; -1 = none.
        right: `[n]` bool; none without an answer is.
        scores: `[n]`, nan where the verifier gave none.
        tokens: `[n]` int64, generated.
    """

    classes: np.ndarray
    right: np.ndarray
    scores: FloatArray
    tokens: np.ndarray


def chains_of(tree: SearchTree, task: Task, problem: Problem) -> Chains:
    """The chains that `ChainPool` has left in a record."""
    leaves = [i for i in tree.leaves() if tree.nodes[i].kind == "generated"]
    texts = [tree.text(i) for i in leaves]
    done = [tree.nodes[i].status in ("final", "answer") for i in leaves]
    answers = [task.extract(text) if is_done else None for text, is_done in zip(texts, done, strict=True)]
    scores = [tree.nodes[i].score for i in leaves]
    right = [answer is not None and task.verify(problem, text) for text, answer in zip(texts, answers, strict=True)]
    return Chains(
        classes=answer_classes(task, answers),
        right=np.array(right, bool),
        scores=np.array([np.nan if score is None else score for score in scores], np.float64),
        tokens=np.array([sum(tree.nodes[j].num_tokens for j in tree.path(i)[1:]) for i in leaves], np.int64),
    )


def majority_accuracy(chains: Chains, k: int, *, num_subsets: int = 200, seed: int = 0) -> float:
    """The chance that the majority of `k` of the chains is right, each subset as likely: unbiased for k chains.

    Of one chain and of all it is exact; between, the mean over random subsets. Ties go to the answer given first, as in
    `Search.majority`.
    """
    n = len(chains.right)
    _check(k, n)
    if k == 1:
        return float(chains.right.mean())
    if k == n:
        members = np.ones((1, n), bool)
    else:
        rng = np.random.default_rng([seed, k])
        members = rng.random((num_subsets, n)).argsort(axis=1).argsort(axis=1) < k
    kinds = np.arange(chains.classes.max(initial=-1) + 1)
    if len(kinds) == 0:
        return 0.0
    voted = members[:, :, None] & (chains.classes[:, None] == kinds)  # [subsets, n, kinds]
    first = voted.argmax(axis=1)
    votes = voted.sum(axis=1) - first / n  # of as many votes, those that began earlier: a lead below one vote
    votes[~voted.any(axis=1)] = -1.0
    winner = votes.argmax(axis=1)
    shown = np.take_along_axis(first, winner[:, None], axis=1)[:, 0]
    return float((chains.right[shown] & voted.any(axis=(1, 2))).mean())


def best_accuracy(chains: Chains, k: int) -> float:
    """The chance that the best scored of `k` of the chains is right, each subset as likely; exact.

    A chain without an answer is taken only where none has one, as `best_of_n` does; of equal scores the first.
    """
    n = len(chains.right)
    _check(k, n)
    if np.isnan(chains.scores).any():
        raise ValueError("chains: not all of them have a score")
    order = np.lexsort((np.arange(n), -chains.scores, chains.classes < 0))
    # the best of a subset is the i-th best of all if it is drawn and none of the i better ones are
    left = n - np.arange(n)  # those not better than the i-th
    at_least = np.cumprod(np.r_[1.0, ((left[:-1] - k) / left[:-1]).clip(min=0)])
    return float((at_least * (k / left).clip(max=1) * chains.right[order]).sum())


def curve(pools: Sequence[Chains], counts: Sequence[int], accuracy: str, *, seed: int = 0) -> FloatArray:
    """`[problems, len(counts)]` accuracies of so many chains.

    Args:
        accuracy: "majority" or "best".
    """
    if accuracy == "best":
        return np.array([[best_accuracy(chains, k) for k in counts] for chains in pools])
    # a subset of one problem says nothing of another's: each has a seed of its own
    return np.array([[majority_accuracy(chains, k, seed=seed + i) for k in counts] for i, chains in enumerate(pools)])


def _check(k: int, num_chains: int) -> None:
    if not 1 <= k <= num_chains:
        raise ValueError(f"k: expected from 1 to {num_chains}, the chains there are, got {k}")

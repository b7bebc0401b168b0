"""One pool of chains for every budget: computes the accuracy of fewer chains without running them again."""

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
    """Samples the chains that self-consistency of the same size would, and keeps their outcomes in the search tree.

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
class PooledChains:
    """The chains of one problem.

    Attributes:
        classes: `[n]` int64, equal for equal answers; -1 = no answer.
        right: `[n]` bool; false without an answer.
        scores: `[n]` of the verifier; nan where it gave none.
        tokens: `[n]` int64, generated.
    """

    classes: np.ndarray
    right: np.ndarray
    scores: FloatArray
    tokens: np.ndarray


def pooled_chains(tree: SearchTree, task: Task, problem: Problem) -> PooledChains:
    """Reads the chains of `ChainPool` from a search tree."""
    leaves = [i for i in tree.leaves() if tree.nodes[i].kind == "generated"]
    texts = [tree.text(i) for i in leaves]
    done = [tree.nodes[i].status in ("final", "answer") for i in leaves]
    answers = [task.extract(text) if is_done else None for text, is_done in zip(texts, done, strict=True)]
    scores = [tree.nodes[i].score for i in leaves]
    right = [answer is not None and task.verify(problem, text) for text, answer in zip(texts, answers, strict=True)]
    return PooledChains(
        classes=answer_classes(task, answers),
        right=np.array(right, bool),
        scores=np.array([np.nan if score is None else score for score in scores], np.float64),
        tokens=np.array([sum(tree.nodes[j].num_tokens for j in tree.path(i)[1:]) for i in leaves], np.int64),
    )


def majority_accuracy(chains: PooledChains, k: int, *, num_subsets: int = 200, seed: int = 0) -> float:
    """Estimates, without bias, the chance that the majority of `k` of the chains is right, over all subsets.

    It is exact for one chain and for all, and the mean over random subsets between. Ties go to the answer given first,
    as in `Search.majority`.
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
    answers = np.arange(chains.classes.max(initial=-1) + 1)
    if len(answers) == 0:
        return 0.0
    voted = members[:, :, None] & (chains.classes[:, None] == answers)  # [subsets, n, answers]
    first = voted.argmax(axis=1)  # the first chain with each answer
    votes = voted.sum(axis=1) - first / n  # of equal votes the answer that came first leads, by less than one vote
    votes[~voted.any(axis=1)] = -1.0
    winner = np.take_along_axis(first, votes.argmax(axis=1)[:, None], axis=1)[:, 0]
    return float((chains.right[winner] & voted.any(axis=(1, 2))).mean())


def best_accuracy(chains: PooledChains, k: int) -> float:
    """Computes the chance that the best scored of `k` of the chains is right, over all subsets.

    As in `best_of_n`, a chain without an answer is taken only where none has one, and of equal scores the first.

    Raises:
        ValueError: a chain has no score, or k is out of range.
    """
    n = len(chains.right)
    _check(k, n)
    if np.isnan(chains.scores).any():
        raise ValueError("chains: not all of them have a score")
    order = np.lexsort((np.arange(n), -chains.scores, chains.classes < 0))
    # the best of a subset is the i-th best of all if it is in the subset and none of the i better ones are
    num_others = n - np.arange(n)  # chains that are no better than the i-th, with itself
    none_better = np.cumprod(np.r_[1.0, ((num_others[:-1] - k) / num_others[:-1]).clip(min=0)])
    return float((none_better * (k / num_others).clip(max=1) * chains.right[order]).sum())


def curve(pools: Sequence[PooledChains], counts: Sequence[int], accuracy: str, *, seed: int = 0) -> FloatArray:
    """Computes the accuracies of several numbers of chains.

    Args:
        accuracy: "majority" or "best".

    Returns:
        `[problems, len(counts)]`.
    """
    if accuracy == "best":
        return np.array([[best_accuracy(chains, k) for k in counts] for chains in pools])
    # each problem has a seed of its own, so that their subsets are independent
    return np.array([[majority_accuracy(chains, k, seed=seed + i) for k in counts] for i, chains in enumerate(pools)])


def _check(k: int, num_chains: int) -> None:
    if not 1 <= k <= num_chains:
        raise ValueError(f"k: expected from 1 to {num_chains}, the chains there are, got {k}")

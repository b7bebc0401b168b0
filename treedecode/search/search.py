"""Search: the interface through which a strategy works on one problem."""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from treedecode.accounting.meter import Spending
from treedecode.common.arrays import IntArray
from treedecode.decoding.search_tree import SearchTree
from treedecode.engine.branch_table import child_seeds
from treedecode.engine.sampling import Sampling
from treedecode.tasks.base import Problem, Task, answer_classes

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder, Prompt
    from treedecode.decoding.frontier import Frontier
    from treedecode.search.branch_quota import BranchQuota

ScoreFunction = Callable[["Frontier", Problem], Awaitable[np.ndarray]]


@dataclass(frozen=True)
class Outcome:
    """A solution that a strategy has come to.

    Attributes:
        answer: as the task extracts it; None = none.
        text: the solution that the answer is from.
        score: how good the strategy thinks it is, on the strategy's own scale; None where it does not say.
        node: the solution's last step in the search tree; -1 = none.
    """

    answer: str | None
    text: str
    score: float | None = None
    node: int = -1


class Search:
    """Grows, scores and compares the branches of one problem.

    `step` lets every branch generate one step, and `complete` the rest of its solution. Both leave branches alone whose
    solution is complete.

    Attributes:
        decoder, task, problem: the model, the task and the problem of the search.
        prompt: `[n]` token ids of all that the model reads before the solution.
        sampling: how branches sample, where a strategy does not say otherwise. The seed is this problem's own.
        tree: the record of the search.
        shared: the object that `Strategy.share` made for all problems of the run.
        notes: values that the strategy keeps with the solution, as JSON.
        earlier: the chains that an earlier run sampled for this problem with fewer of them, in order.

    Args:
        account: pays for the branches.
        quota: the run's, of which the search holds `num_branches` when it begins; None = there is no limit.
        earlier: the record of that earlier run, which `tree` goes on from.
    """

    def __init__(
        self,
        decoder: "Decoder",
        task: Task,
        problem: Problem,
        *,
        prompt: IntArray,
        sampling: Sampling,
        seed: int,
        account: int,
        quota: "BranchQuota | None" = None,
        num_branches: int = 0,
        score: ScoreFunction | None = None,
        shared: Any = None,
        earlier: SearchTree | None = None,
    ) -> None:
        self.decoder, self.task, self.problem = decoder, task, problem
        self.prompt = prompt
        self.sampling = replace(sampling, seed=problem_seed(seed, problem.id))
        self.tree = SearchTree() if earlier is None else earlier.resumed()
        self._account = account
        self._quota, self._num_branches, self._holds_quota = quota, num_branches, quota is not None
        self._score = score
        self._num_roots = 0
        self._texts: dict[bytes, str] = {}
        self._final: dict[str, bool] = {}
        self._answers: dict[str, str | None] = {}
        self.shared = shared
        self.notes: dict[str, Any] = {}
        self.earlier = [self._recorded(leaf) for leaf in self.tree.leaves()]

    @property
    def spending(self) -> Spending:
        """The cost of this problem so far."""
        return self.decoder.meter.spending(self._account)

    @property
    def has_scorer(self) -> bool:
        """True if the run has a verifier, which `score` needs."""
        return self._score is not None

    async def root(self, prompt: "Prompt | None" = None) -> "Frontier":
        """Starts a branch on a prompt, by default the problem's; the branches of each call sample differently."""
        assert self.sampling.seed is not None
        seed = child_seeds(np.array(self.sampling.seed), np.array(-1), np.array(self._num_roots))[0]
        self._num_roots += 1
        sampling = replace(self.sampling, seed=int(seed))
        return await self.decoder.roots(
            [self.prompt if prompt is None else prompt],
            sampling=sampling,
            account=self._account,
        )

    # -- growing --

    def final(self, frontier: "Frontier") -> np.ndarray:
        """`[n]` bool, True where the branch's solution is complete."""
        return frontier.finished | np.array([self.is_final(text) for text in self.texts(frontier)], bool)

    def is_final(self, text: str) -> bool:
        """Returns whether the text alone shows that its solution is complete; it does not show an end of sequence."""
        if text not in self._final:
            self._final[text] = text.endswith(self.task.end) or self.task.is_final(text)
        return self._final[text]

    def texts(self, frontier: "Frontier") -> list[str]:
        """Returns the text of each branch after its prompt; a text is decoded once."""
        texts = []
        for tokens in frontier.new_tokens():
            key = tokens.tobytes()
            if key not in self._texts:
                self._texts[key] = self.decoder.decode(tokens)
            texts.append(self._texts[key])
        return texts

    def is_complete(self, node: int) -> bool:
        """Returns whether the solution that ends with a node of `tree` is complete."""
        return self.tree.nodes[node].ended or self.is_final(self.tree.text(node))

    def is_out_of_tokens(self, node: int) -> bool:
        """Returns whether the solution that ends with a node of `tree` was cut because it became too long."""
        nodes = self.tree.nodes
        num_tokens = sum(nodes[i].num_tokens for i in self.tree.path(node) if nodes[i].kind != "prompt")
        limit = min(self.task.max_new_tokens, self.decoder.max_tokens - len(self.prompt))
        return num_tokens >= limit and not self.is_complete(node)

    def unfinished(self, frontier: "Frontier") -> np.ndarray:
        """`[n]` bool, True where the solution is neither complete nor too long: `step` and `complete` grow it."""
        return ~self.final(frontier) & (self.remaining_tokens(frontier) > 0)

    def remaining_tokens(self, frontier: "Frontier") -> IntArray:
        """`[n]` tokens that each solution may still have."""
        num_new_tokens = frontier.num_tokens - frontier.num_prompt_tokens
        return np.minimum(self.task.max_new_tokens - num_new_tokens, self.room(frontier))

    def room(self, frontier: "Frontier") -> IntArray:
        """`[n]` tokens that model and pages have room for, after those of each branch."""
        return self.decoder.max_tokens - frontier.num_tokens

    async def step(self, frontier: "Frontier", sampling: Sampling | None = None) -> None:
        """Lets every branch generate one step, which ends with the task's stop."""
        await self._extend(frontier, (self.task.stop, *self.task.end), self.task.max_step_tokens, sampling)

    async def complete(self, frontier: "Frontier", sampling: Sampling | None = None) -> None:
        """Lets every branch generate the rest of its solution, as far as the task's length limit."""
        await self._extend(frontier, self.task.end, self.task.max_new_tokens, sampling)

    async def _extend(self, frontier: "Frontier", stop: tuple[str, ...], limit: int, sampling: Sampling | None) -> None:
        unfinished = np.flatnonzero(self.unfinished(frontier))
        if len(unfinished):
            limits = np.minimum(limit, self.remaining_tokens(frontier)[unfinished])
            with frontier.select(unfinished) as live:
                await live.extend(stop=list(stop) or None, max_new_tokens=limits, sampling=sampling)

    # -- judging --

    async def score(self, frontier: "Frontier", which: np.ndarray | None = None) -> np.ndarray:
        """Scores branches by the run's verifier.

        Args:
            which: `[n]` bool, the branches to score; the others keep the scores they have. None = all.

        Returns:
            `[n]` scores, which are `frontier.scores` from here on.

        Raises:
            ValueError: the run has no verifier, or it gives nan or an infinite score.
        """
        if self._score is None:
            raise ValueError("verifier: this strategy scores branches and needs one")
        if which is not None and not which.all():
            values = frontier.scores.copy()
            if which.any():
                with frontier.select(which) as some:
                    values[which] = await self.score(some)
        else:
            values = np.asarray(await self._score(frontier, self.problem), np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"verifier: expected a finite number for every branch, got {values}")
        frontier.scores = values
        return frontier.scores

    def answers(self, frontier: "Frontier") -> list[str | None]:
        """Returns the answer of every branch; None where the solution is not complete, or has none."""
        solutions = zip(self.texts(frontier), self.final(frontier), strict=True)
        return [self._extract(text) if is_final else None for text, is_final in solutions]

    def _extract(self, text: str) -> str | None:
        if text not in self._answers:
            self._answers[text] = self.task.extract(text)
        return self._answers[text]

    def classes(self, answers: list[str | None]) -> IntArray:
        """`[n]` int64, equal where the task takes two answers for the same one; -1 = no answer."""
        return answer_classes(self.task, answers)

    def _recorded(self, node: int) -> Outcome:
        """Reads the solution that ends with a node of `tree`, as `outcomes` would give it."""
        text = self.tree.text(node)
        answer = self._extract(text) if self.is_complete(node) else None
        return Outcome(answer, text, self.tree.nodes[node].score, node)

    def outcome(self, frontier: "Frontier", which: int, score: float | None = None) -> Outcome:
        """Returns the solution of the branch with index `which`."""
        with frontier.select(np.array([which])) as branch:
            return Outcome(self.answers(branch)[0], self.texts(branch)[0], score, int(branch.nodes[0]))

    def best(self, frontier: "Frontier") -> Outcome:
        """Returns the best scored complete solution that comes to an answer; failing that, the best scored branch."""
        is_answered = np.array([answer is not None for answer in self.answers(frontier)])
        best = np.lexsort((np.arange(len(frontier)), -frontier.scores, ~is_answered))[0]
        return self.outcome(frontier, int(best), float(frontier.scores[best]))

    def outcomes(self, frontier: "Frontier") -> list[Outcome]:
        """Returns the solution of every branch, with its score where it has one."""
        scores = [None if np.isnan(score) else float(score) for score in frontier.scores]
        rows = zip(self.answers(frontier), self.texts(frontier), scores, frontier.nodes.tolist(), strict=True)
        return [Outcome(*row) for row in rows]

    def majority(self, frontier: "Frontier", weights: np.ndarray | None = None) -> Outcome:
        """Lets branches vote; without weights each counts as often as it was drawn (`Frontier.counts`)."""
        return self.vote(self.outcomes(frontier), frontier.counts if weights is None else weights)

    def vote(self, solutions: Sequence[Outcome], weights: np.ndarray) -> Outcome:
        """Finds the answer with the greatest sum of weights; of equals the one given first.

        Solutions without an answer abstain.

        Args:
            weights: `[len(solutions)]` >= 0.

        Returns:
            the heaviest solution with that answer, whose score is the answer's share of all votes. Where no solution
            comes to an answer: the best scored one, or the first where there are no scores, with a score of 0.
        """
        classes = self.classes([solution.answer for solution in solutions])
        votes = np.bincount(classes[classes >= 0], weights[classes >= 0])
        if len(votes) == 0:
            best = max(solutions, key=lambda solution: -np.inf if solution.score is None else solution.score)
            return replace(best, score=0.0)
        winner = int(votes.argmax())
        members = np.flatnonzero(classes == winner)
        shown = solutions[members[np.argmax(weights[members])]]
        return replace(shown, score=float(votes[winner] / votes.sum()) if votes.sum() else 0.0)

    def best_so_far(self) -> Outcome:
        """Returns the best solution in the record, for a search that was cut short.

        Of complete solutions it is the best scored one, or without scores the one with the most votes. Where there is
        none it is the likeliest text.
        """
        nodes = self.tree.nodes
        leaves = [i for i in self.tree.leaves() if nodes[i].kind != "prompt"]
        # a scored solution need not be a leaf: a search that refines it goes on from it
        scored = (i for i, node in enumerate(nodes) if node.kind != "prompt" and node.score is not None)
        texts = {i: self.tree.text(i) for i in sorted({*leaves, *scored})}
        solutions = [
            Outcome(answer, text, nodes[i].score, i)
            for i, text in texts.items()
            if self.is_complete(i) and (answer := self.task.extract(text)) is not None
        ]
        if not solutions:
            likeliest = max(leaves, key=lambda i: sum(nodes[j].logprob for j in self.tree.path(i)), default=-1)
            return Outcome(None, texts.get(likeliest, ""), node=likeliest)
        if any(solution.score is not None for solution in solutions):
            return max(solutions, key=lambda solution: -np.inf if solution.score is None else solution.score)
        classes = self.classes([solution.answer for solution in solutions])
        return solutions[int(np.flatnonzero(classes == np.bincount(classes).argmax())[0])]

    # -- sharing the decoder's branches with other problems --

    async def acquire_quota(self) -> None:
        """Waits until the run has branches for this problem again."""
        if self._quota is not None and not self._holds_quota:
            await self._quota.acquire(self._num_branches)
            self._holds_quota = True

    def release_quota(self) -> None:
        """Lets other problems of the run have the branches of this one, which has released its frontiers."""
        if self._quota is not None and self._holds_quota:
            self._quota.release(self._num_branches)
            self._holds_quota = False


def problem_seed(seed: int, problem_id: str) -> int:
    """Derives the seed of a problem's branches from the run's seed and the problem's id alone."""
    digest = hashlib.blake2b(f"{seed}/{problem_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)

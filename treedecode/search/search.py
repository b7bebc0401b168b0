"""Search: one problem under way. What a strategy knows of it, and how its branches go a step or to their end."""

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
    from treedecode.search.branch_quota import Places

ScoreFunction = Callable[["Frontier", Problem], Awaitable[np.ndarray]]


@dataclass(frozen=True)
class Outcome:
    """What a strategy has found.

    Attributes:
        answer: as the task extracts it; None = none.
        text: the solution it is from.
        score: how good the strategy thinks it is, on the strategy's own scale; None where it does not say.
        node: the solution's last step in the search tree; -1 = none.
    """

    answer: str | None
    text: str
    score: float | None = None
    node: int = -1


class Search:
    """One problem under way.

    Branches end in two ways: `step` lets each go on by one step, `complete` to the end of its solution. Branches whose
    solution is complete stay as they are in both.

    Attributes:
        decoder, task, problem: what is searched, with what.
        prompt: `[n]` token ids of all that the model reads before the solution.
        sampling: how branches sample, where a strategy does not say otherwise. The seed is this problem's own.
        tree: the record of the search.
        shared: what the strategy has for all problems of the run together (`Strategy.share`).
        notes: what the strategy wants kept with the solution, as JSON.

    Args:
        places: the run's, of which `num_places` have been taken for this search.
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
        places: "Places | None" = None,
        num_places: int = 0,
        score: ScoreFunction | None = None,
        shared: Any = None,
    ) -> None:
        self.decoder, self.task, self.problem = decoder, task, problem
        self.prompt = prompt
        self.sampling = replace(sampling, seed=problem_seed(seed, problem.id))
        self.tree = SearchTree()
        self._account = account
        self._places, self._num_places, self._holds_places = places, num_places, places is not None
        self._score = score
        self._num_roots = 0
        self._texts: dict[bytes, str] = {}
        self._final: dict[str, bool] = {}
        self._answers: dict[str, str | None] = {}
        self.shared = shared
        self.notes: dict[str, Any] = {}

    @property
    def spending(self) -> Spending:
        """What this problem has cost so far."""
        return self.decoder.meter.spending(self._account)

    @property
    def has_scorer(self) -> bool:
        """Whether `score` can say anything."""
        return self._score is not None

    async def root(self, prompt: "Prompt | None" = None) -> "Frontier":
        """A branch on the problem's prompt, or on another one for it; each call's branches sample anew."""
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
        """`[n]` bool: the branch's solution is complete."""
        return frontier.finished | np.array([self.is_final(text) for text in self.texts(frontier)], bool)

    def is_final(self, text: str) -> bool:
        """Whether the text alone shows that its solution is complete; an end of sequence is not in the text."""
        if text not in self._final:
            self._final[text] = text.endswith(self.task.end) or self.task.is_final(text)
        return self._final[text]

    def texts(self, frontier: "Frontier") -> list[str]:
        """Text of each branch after its prompt; what was read once is remembered."""
        known = self._texts
        found = []
        for tokens in frontier.new_tokens():
            key = tokens.tobytes()
            if key not in known:
                known[key] = self.decoder.decode(tokens)  # type: ignore[arg-type]
            found.append(known[key])
        return found

    def is_complete(self, node: int) -> bool:
        """Whether the solution that ends with a node of `tree` is complete."""
        return self.tree.nodes[node].ended or self.is_final(self.tree.text(node))

    def unfinished(self, frontier: "Frontier") -> np.ndarray:
        """`[n]` bool: `step` and `complete` go on with the branch, its solution being neither complete nor too long."""
        return ~self.final(frontier) & (self.left(frontier) > 0)

    def left(self, frontier: "Frontier") -> IntArray:
        """`[n]` tokens that each solution may still have."""
        left = self.task.max_new_tokens - (frontier.num_tokens - frontier.num_prompt_tokens)
        return np.minimum(left, self.room(frontier))

    def room(self, frontier: "Frontier") -> IntArray:
        """`[n]` tokens that model and pages have room for after those of each branch."""
        return self.decoder.max_tokens - frontier.num_tokens

    async def step(self, frontier: "Frontier", sampling: Sampling | None = None) -> None:
        """Lets every branch generate one step, up to and with the task's stop."""
        await self._extend(frontier, (self.task.stop, *self.task.end), self.task.max_step_tokens, sampling)

    async def complete(self, frontier: "Frontier", sampling: Sampling | None = None) -> None:
        """Lets every branch generate to the end of its solution, or to the most tokens one may have."""
        await self._extend(frontier, self.task.end, self.task.max_new_tokens, sampling)

    async def _extend(self, frontier: "Frontier", stop: tuple[str, ...], limit: int, sampling: Sampling | None) -> None:
        going = np.flatnonzero(self.unfinished(frontier))
        if len(going):
            limits = np.minimum(limit, self.left(frontier)[going])
            with frontier.select(going) as live:
                await live.extend(stop=list(stop) or None, max_new_tokens=limits, sampling=sampling)

    # -- judging --

    async def score(self, frontier: "Frontier", which: np.ndarray | None = None) -> np.ndarray:
        """Scores of the branches by the run's verifier, `[n]`; they are the frontier's scores from here on.

        Args:
            which: `[n]` bool, those to score (None: all); the others keep the scores they have.

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
        """The answer of every branch whose solution is complete."""
        texts = self.texts(frontier)
        return [self._extract(t) if done else None for t, done in zip(texts, self.final(frontier), strict=True)]

    def _extract(self, text: str) -> str | None:
        if text not in self._answers:
            self._answers[text] = self.task.extract(text)
        return self._answers[text]

    def classes(self, answers: list[str | None]) -> IntArray:
        """`[n]` int64, equal where the task takes two answers for the same one; -1 = no answer."""
        return answer_classes(self.task, answers)

    def outcome(self, frontier: "Frontier", which: int, score: float | None = None) -> Outcome:
        """The solution of one branch."""
        with frontier.select(np.array([which])) as one:
            return Outcome(self.answers(one)[0], self.texts(one)[0], score, int(one.nodes[0]))

    def best(self, frontier: "Frontier") -> Outcome:
        """The best scored complete solution that comes to an answer; failing that, the best scored branch."""
        answered = np.array([answer is not None for answer in self.answers(frontier)])
        first = np.lexsort((np.arange(len(frontier)), -frontier.scores, ~answered))[0]
        return self.outcome(frontier, int(first), float(frontier.scores[first]))

    def outcomes(self, frontier: "Frontier") -> list[Outcome]:
        """The solution of every branch, with its score where it has one. They stay when the branches are released."""
        scores = [None if np.isnan(score) else float(score) for score in frontier.scores]
        rows = zip(self.answers(frontier), self.texts(frontier), scores, frontier.nodes.tolist(), strict=True)
        return [Outcome(*row) for row in rows]

    def majority(self, frontier: "Frontier", weights: np.ndarray | None = None) -> Outcome:
        """`vote` of branches; without weights each counts as often as it was drawn (`Frontier.counts`)."""
        return self.vote(self.outcomes(frontier), frontier.counts if weights is None else weights)

    def vote(self, solutions: Sequence[Outcome], weights: np.ndarray) -> Outcome:
        """The answer with the greatest sum of weights; of equals the one given first. Solutions without one abstain.

        Shown is the heaviest solution that comes to it. Where none comes to an answer it is the best scored one,
        without scores the first.

        Args:
            weights: `[len(solutions)]` >= 0.

        Returns:
            the solution; its score is the answer's share of all votes, 0 where there are none.
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
        """What the record of a search that was cut short has to offer.

        Of complete solutions the best scored one, without scores the one with the most votes; else the likeliest text.
        """
        nodes = self.tree.nodes
        leaves = [i for i in self.tree.leaves() if nodes[i].kind != "prompt"]
        # a scored solution need not be a leaf: a search that refines it goes on from it
        scored = (i for i, node in enumerate(nodes) if node.kind != "prompt" and node.score is not None)
        shown = sorted({*leaves, *scored})
        texts = {i: self.tree.text(i) for i in shown}
        found = [
            (i, answer) for i in shown if self.is_complete(i) and (answer := self.task.extract(texts[i])) is not None
        ]
        if not found:
            best = max(leaves, key=lambda i: sum(nodes[j].logprob for j in self.tree.path(i)), default=-1)
            return Outcome(None, texts.get(best, ""), node=best)
        scores = [nodes[i].score for i, _ in found]
        if any(score is not None for score in scores):
            at = int(np.argmax([-np.inf if score is None else score for score in scores]))
            return Outcome(found[at][1], texts[found[at][0]], scores[at], found[at][0])
        classes = self.classes([answer for _, answer in found])
        at = int(np.flatnonzero(classes == np.bincount(classes).argmax())[0])
        return Outcome(found[at][1], texts[found[at][0]], node=found[at][0])

    async def take_places(self) -> None:
        """Waits until the run has branches for this problem again."""
        if self._places is not None and not self._holds_places:
            await self._places.take(self._num_places)
            self._holds_places = True

    def give_places(self) -> None:
        """Lets other problems of the run have this one's branches."""
        if self._places is not None and self._holds_places:
            self._places.give(self._num_places)
            self._holds_places = False


def problem_seed(seed: int, problem_id: str) -> int:
    """The seed of a problem's tree: of the run's seed and the problem alone, not of its place among others."""
    digest = hashlib.blake2b(f"{seed}/{problem_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)

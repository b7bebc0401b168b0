"""Self-Refine (2303.17651): solves, criticises and revises, and keeps the solution with the best score."""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from treedecode.common.validation import int_in, number_in
from treedecode.decoding.frontier import Frontier
from treedecode.engine.sampling import Sampling
from treedecode.search.search import Outcome, Search
from treedecode.search.strategy import Strategy, rank


@dataclass(frozen=True)
class IterativeRefinement(Strategy):
    """Passes of critique and revision until a solution is good enough or comes to an answer for the second time.

    All passes go on in one branch, so that its cache is reused and the model sees its earlier solutions. The verifier
    sees a revision like any solution, right after the problem.

    A model that does not follow instructions cannot criticise. With `critique_prompt=""` the verifier rates every step
    as it is written, and a pass rewrites the best solution so far from its worst step on: the first step rated below
    `doubt`; where there is none, the lowest rated step, of equals the first.

    Args:
        max_passes: revisions at most (4 in the paper).
        critique_prompt: asks for a critique; "" as above. `{problem}` and `{solution}` stand for their texts.
        revise_prompt: asks for a new solution, in the same way.
        critique_tokens: limits a critique.
        critique_stop: strings that end it, beside the model's end of sequence.
        good: a solution that comes to an answer and is scored at least this is taken; None = makes all passes.
        max_repeats: ends when so many solutions came to an answer that an earlier one had.
        doubt: see above.
        sampling: in place of the run's.
    """

    name: ClassVar[str] = "iterative_refinement"
    needs_verifier: ClassVar[bool] = True

    max_passes: int = 4
    critique_prompt: str = "\n\nCheck the solution above step by step. Say what is wrong with it, if anything.\n"
    revise_prompt: str = "\n\nSolve the problem again, without the mistakes.\n\nProblem:\n{problem}\n\nSolution:\n"
    critique_tokens: int = 256
    critique_stop: tuple[str, ...] = ()
    good: float | None = 1.0
    max_repeats: int = 1
    doubt: float | None = None
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        int_in("max_passes", self.max_passes, 0)
        int_in("critique_tokens", self.critique_tokens, 1)
        int_in("max_repeats", self.max_repeats, 1)
        for name in ("good", "doubt"):
            if getattr(self, name) is not None:
                number_in(name, getattr(self, name), -float("inf"))
        if isinstance(self.critique_stop, str):
            raise TypeError(f"critique_stop: expected a tuple of strings, got {self.critique_stop!r}")
        if self.critique_prompt and not self.revise_prompt:
            raise ValueError("revise_prompt: is empty; the critique has to be followed by a new solution")

    @property
    def num_branches(self) -> int:
        return 3 if self.critique_prompt else 2

    async def solve(self, search: Search) -> Outcome:
        solutions: list[Outcome] = []
        await (self._revise(search, solutions) if self.critique_prompt else self._rewrite(search, solutions))
        return max(solutions, key=rank)

    async def _revise(self, search: Search, solutions: list[Outcome]) -> None:
        """Appends a solution, and revisions that the model writes after a critique of its own."""
        root, task = await search.root(), search.task
        chain = root.fork(1)
        await search.complete(chain, self.sampling)
        [score] = await search.score(chain)
        solutions.append(search.outcome(chain, 0, float(score)))
        while self._goes_on(search, solutions):
            critique = self._filled(search, self.critique_prompt, solutions[-1])
            request = self._filled(search, self.revise_prompt, solutions[-1])
            needed = len(critique) + self.critique_tokens + len(request) + task.max_new_tokens
            if search.room(chain)[0] < needed:
                break
            stop = list(self.critique_stop) or None
            await chain.append(critique).extend(stop=stop, max_new_tokens=self.critique_tokens, sampling=self.sampling)
            begin = len(chain.append(request).token_ids()[0])
            await chain.extend(stop=list(task.end) or None, max_new_tokens=task.max_new_tokens, sampling=self.sampling)
            with root.fork(1).append([chain.token_ids()[0][begin:]]) as revision:
                [score] = await search.score(revision)
                [text] = revision.texts()
                is_complete = chain.finished[0] or search.is_final(text)
                answer = task.extract(text) if is_complete else None
                solutions.append(Outcome(answer, text, float(score), int(revision.nodes[0])))

    async def _rewrite(self, search: Search, solutions: list[Outcome]) -> None:
        """Appends a solution, and rewrites of the best one so far from its worst step on."""
        chain, steps = await search.root(), list[tuple[int, float]]()  # where each step begins, and its score
        best: tuple[Outcome, Frontier, list[tuple[int, float]]] | None = None
        while True:
            while search.unfinished(chain).any():
                begin = int(chain.num_tokens[0])
                await search.step(chain, self.sampling)
                [score] = await search.score(chain)
                steps.append((begin, float(score)))
            solutions.append(search.outcome(chain, 0, steps[-1][1]))
            if best is None or rank(solutions[-1]) > rank(best[0]):
                best, worse = (solutions[-1], chain, steps), best and best[1]
            else:
                worse = chain
            if worse is not None:
                worse.release()
            if not self._goes_on(search, solutions):
                return
            _, chain, steps = best
            worst = self._worst([score for _, score in steps])
            chain, steps = chain.fork_at(steps[worst][0]), steps[:worst]

    def _worst(self, scores: list[float]) -> int:
        doubtful = (i for i, score in enumerate(scores) if self.doubt is not None and score < self.doubt)
        return next(doubtful, int(np.argmin(scores)))

    def _goes_on(self, search: Search, solutions: list[Outcome]) -> bool:
        is_good = self.good is not None and rank(solutions[-1]) >= (True, self.good)
        if len(solutions) > self.max_passes or is_good:
            return False
        classes = search.classes([solution.answer for solution in solutions])
        answered = classes[classes >= 0]
        return len(answered) - len(np.unique(answered)) < self.max_repeats

    def _filled(self, search: Search, prompt: str, solution: Outcome) -> list[int]:
        """Returns the token ids of a prompt with its fields filled in."""
        fields = {"{problem}": search.problem.prompt, "{solution}": solution.text}
        text = re.sub(r"{problem}|{solution}", lambda match: fields[match[0]], prompt)
        return search.decoder.encode(text, special=False)

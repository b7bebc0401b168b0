"""Judges: scorers that ask the model itself about branches, on side branches that share their pages."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from treedecode.common.validation import positive_int
from treedecode.engine.sampling import Sampling
from treedecode.engine.stops import StopLike

if TYPE_CHECKING:
    from treedecode.decoding.frontier import Frontier
    from treedecode.tasks.base import Problem

# The words that the value prompt of Tree of Thoughts (2305.10601) for the game of 24 asks for, and their weights.
VALUES = {"sure": 20.0, "likely": 1.0, "impossible": 0.001}
VALUE_PROMPT = "\n\nCan this still lead to the right answer? Say sure, likely or impossible, in one word.\nEvaluation:"
VOTE_PROMPT = (
    "\n\nHere are several ways to go on:\n\n{choices}\n\n"
    "Decide which choice is the most promising and name its number.\nThe best choice is"
)
CHOICE = "Choice {number}:\n{text}"


@dataclass(frozen=True)
class Judge:
    """Asks the model about each branch, several times, and takes the mean of its answers.

    Args:
        prompt: the text of the question, or a function of the problem that gives it.
        parse: reads a number out of an answer.
        num_samples: answers per branch.
        max_new_tokens: limits an answer.
        stop: ends an answer.
        sampling: of answers; None takes the search's own.
        probability: True if `parse` returns probabilities.

    Raises:
        TypeError: `prompt` or `parse` is something else.
    """

    prompt: "str | Callable[[Problem], str]"
    parse: Callable[[str], float]
    num_samples: int = 3
    max_new_tokens: int = 16
    stop: StopLike = "\n"
    sampling: Sampling | None = None
    probability: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) and not callable(self.prompt):
            raise TypeError(f"prompt: expected a text or a function of the problem, got {self.prompt!r}")
        if not callable(self.parse):
            raise TypeError(f"parse: expected a function of an answer, got {self.parse!r}")

    async def __call__(self, frontier: "Frontier", problem: "Problem") -> np.ndarray:
        """Scores the branches: `[n]` float64.

        Raises:
            OutOfBranches: no room for `num_samples` side branches of every branch.
        """
        return await frontier.score(
            lambda answers: [self.parse(answer) for answer in answers],
            judge=self.prompt if isinstance(self.prompt, str) else self.prompt(problem),
            num_samples=self.num_samples,
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            sampling=self.sampling,
        )


def parse_value(answer: str) -> float:
    """Returns the weight of the last "sure" (20), "likely" (1) or "impossible" (0.001) of an answer; 0 without one."""
    words = re.findall(rf"\b({'|'.join(VALUES)})\b", answer.lower())
    return VALUES[words[-1]] if words else 0.0


def value_judge(
    prompt: "str | Callable[[Problem], str]" = VALUE_PROMPT,
    *,
    num_samples: int = 3,
    max_new_tokens: int = 16,
    stop: StopLike = "\n",
    sampling: Sampling | None = None,
) -> Judge:
    """Makes the judge of Tree of Thoughts (2305.10601): answers are sure, likely or impossible, worth 20, 1 or 0.001.

    The paper adds the answers up; this judge takes their mean, which ranks alike.
    """
    return Judge(prompt, parse_value, num_samples, max_new_tokens, stop, sampling)


def parse_vote(answer: str) -> int | None:
    """Returns the number after the last "best choice is" of an answer, else its first number; None without any."""
    numbers = (
        re.findall(r"best choice is[^0-9]*([0-9]{1,9})", answer, re.IGNORECASE) or re.findall(r"[0-9]{1,9}", answer)[:1]
    )
    return int(numbers[-1]) if numbers else None


@dataclass(frozen=True)
class Vote:
    """The vote of Tree of Thoughts (2305.10601): the model reads all candidates of a tree and names the best.

    A vote is one side branch, from the end of the tree's prompt. A branch's score is its share of the votes. Votes that
    name no candidate count for none, so the scores of a tree may add up to less than 1.

    Args:
        prompt: with `{choices}` for the list of candidates; a longer one may let the model reason first and conclude
            "The best choice is ...".
        num_samples: votes per tree; the paper's five.
        max_new_tokens, stop, sampling: as for `Judge`.

    Raises:
        ValueError: `prompt` has no `{choices}`, or `num_samples` is no int >= 1.
    """

    prompt: str = VOTE_PROMPT
    num_samples: int = 5
    max_new_tokens: int = 16
    stop: StopLike = "\n"
    sampling: Sampling | None = None
    probability = True  # shares of the votes are in [0, 1]

    def __post_init__(self) -> None:
        if "{choices}" not in self.prompt:
            raise ValueError(f"prompt: expected a text with {{choices}} in it, got {self.prompt!r}")
        positive_int("num_samples", self.num_samples)

    async def __call__(self, frontier: "Frontier", problem: "Problem") -> np.ndarray:
        """Scores the branches: `[n]` float64 in [0, 1]."""
        _, first, tree_of = np.unique(frontier.tree, return_index=True, return_inverse=True)
        members = [np.flatnonzero(tree_of == tree) for tree in range(len(first))]
        texts = frontier.texts()
        questions = []
        for branches in members:
            choices = [CHOICE.format(number=k, text=texts[i].strip()) for k, i in enumerate(branches, 1)]
            questions.append(self.prompt.replace("{choices}", "\n\n".join(choices)))
        with frontier.select(first) as selected, selected.fork_at(selected.num_prompt_tokens) as roots:
            roots.leave_record()
            voters = roots.append(questions).fork(self.num_samples)
        with voters:
            await voters.extend(stop=self.stop, max_new_tokens=self.max_new_tokens, sampling=self.sampling)
            votes = [parse_vote(answer) for answer in voters.step_texts()]
        counts = np.zeros(len(frontier))
        for i, vote in enumerate(votes):
            branches = members[i // self.num_samples]
            if vote is not None and 1 <= vote <= len(branches):
                counts[branches[vote - 1]] += 1
        frontier.scores = counts / self.num_samples
        return frontier.scores

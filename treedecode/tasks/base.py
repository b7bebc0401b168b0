"""Problem and Task: a question for the model, and the interface through which its answers are read and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: unique within a run; random numbers and the journal go by it.
        prompt: the text that the model reads, without worked examples and chat template.
        answer: the reference answer; None where there are many solutions or no known one, and only `Task.verify` tells.
        group: of the user's choosing, for audits.
        data: values by which the task checks an answer.
        task: the `Task` that the problem is of, for runs that are given none; None = not known.
    """

    id: str
    prompt: str
    answer: str | None = None
    group: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    task: Any = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the task out, so that another process gets this problem without all the others of its task."""
        return {**self.__dict__, "task": None}


class Task(Protocol):
    """Gives problems, and reads the texts that solve them.

    Attributes:
        name: as on the command line.
        stop: the string that ends a step of reasoning; a solution is a sequence of steps.
        end: strings that end a whole solution, beside the model's end of sequence.
        max_step_tokens: a step that has not ended after so many tokens is cut.
        max_new_tokens: the same for a whole solution.
    """

    name: str
    stop: str
    end: tuple[str, ...]
    max_step_tokens: int
    max_new_tokens: int

    def problems(self, num_problems: int, *, split: str = "test", seed: int = 0) -> list[Problem]:
        """Returns problems of a split ("train", "validation" or "test"); the same ones for the same seed."""
        ...

    def examples(self, count: int) -> Sequence[tuple[str, str]]:
        """Returns worked examples for a few-shot prompt: (prompt, solution)."""
        ...

    def extract(self, text: str) -> str | None:
        """Returns the answer of a solution, in a form that can be compared; None where it has none (yet)."""
        ...

    def equivalent(self, first: str, second: str) -> bool:
        """Returns whether two extracted answers are the same answer."""
        ...

    def is_final(self, text: str) -> bool:
        """Returns whether the solution has come to its answer, so that no further step is wanted."""
        ...

    def verify(self, problem: Problem, text: str) -> bool | None:
        """Returns whether a solution is right; None where that cannot be told, without a reference answer for instance.

        No strategy sees this grade unless it is given as its verifier.
        """
        ...


def unicode(text: str, name: str) -> str:
    """Returns `text` after a check that it can be encoded.

    Raises:
        ValueError: it has half a character (a lone surrogate), which no file or tokenizer takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: is no Unicode text: {error.reason} at {error.start}") from None
    return text


def require_gradable(task: Task, problems: Sequence[Problem], argument: str = "problems") -> None:
    """Checks that a task can tell of every problem whether a solution is right.

    Args:
        argument: the one that an error names.

    Raises:
        ValueError: it cannot; names the first such problem.
    """
    ungraded = [problem.id for problem in problems if problem.answer is None and _is_ungradable(task, problem)]
    if ungraded:
        count = f"{len(ungraded)} of {len(problems)} problems"
        raise ValueError(f"{argument}: {count} have no reference answer, the first is {ungraded[0]!r}")


def _is_ungradable(task: Task, problem: Problem) -> bool:
    try:
        return task.verify(problem, "") is None
    except Exception:  # of a check that fails: a solution will tell
        return False


def answer_classes(task: Task, answers: Sequence[str | None]) -> np.ndarray:
    """Groups answers that a task takes for the same one.

    Returns:
        `[n]` int64 class ids, numbered by first appearance; -1 = no answer.
    """
    representatives: list[str] = []
    classes = np.full(len(answers), -1, np.int64)
    for i, answer in enumerate(answers):
        if answer is None:
            continue
        matches = (j for j, other in enumerate(representatives) if other == answer or task.equivalent(other, answer))
        classes[i] = next(matches, len(representatives))
        if classes[i] == len(representatives):
            representatives.append(answer)
    return classes

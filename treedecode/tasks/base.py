"""What a task is: problems, how to read an answer out of a text, and when an answer is right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: unique within a run; random numbers and the journal go by it.
        prompt: what the model reads, worked examples and chat template not included.
        answer: the reference answer; None where only checking can tell (many solutions, or none known).
        group: of the user's choosing, for audits.
        data: what the task needs to check an answer.
        task: the `Task` it is of, for runs that are not told another; None = it does not say.
    """

    id: str
    prompt: str
    answer: str | None = None
    group: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    task: Any = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which get a problem without all the others of its task."""
        return {**self.__dict__, "task": None}


class Task(Protocol):
    """Where problems come from, and how texts about them are read.

    Attributes:
        name: as on the command line.
        stop: the string that ends a step of reasoning; a solution is a sequence of steps.
        end: strings that end a whole solution, beside the model's end of sequence.
        max_step_tokens: a step that has not ended by then is cut.
        max_new_tokens: the same for a whole solution.
    """

    name: str
    stop: str
    end: tuple[str, ...]
    max_step_tokens: int
    max_new_tokens: int

    def problems(self, num_problems: int, *, split: str = "test", seed: int = 0) -> list[Problem]:
        """So many problems of a split ("train", "validation" or "test"); the same ones for the same seed."""
        ...

    def examples(self, count: int) -> Sequence[tuple[str, str]]:
        """Worked examples for a few-shot prompt: (prompt, solution)."""
        ...

    def extract(self, text: str) -> str | None:
        """The answer a solution comes to, in a form that can be compared; None where it has none (yet)."""
        ...

    def equivalent(self, first: str, second: str) -> bool:
        """Whether two extracted answers are the same answer."""
        ...

    def is_final(self, text: str) -> bool:
        """Whether the solution has come to its answer, so that no further step is wanted."""
        ...

    def verify(self, problem: Problem, text: str) -> bool:
        """Whether a solution is right: the grade, which no strategy sees unless its verifier is this."""
        ...


def unicode(text: str, name: str) -> str:
    """`text`; raises ValueError if it has half a character (a lone surrogate), which no file or tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: is no Unicode text: {error.reason} at {error.start}") from None
    return text


def answer_classes(task: Task, answers: Sequence[str | None]) -> np.ndarray:
    """`[n]` int64, equal where a task takes two answers for the same one, counted in order; -1 = no answer."""
    found: list[str] = []
    classes = np.full(len(answers), -1, np.int64)
    for i, answer in enumerate(answers):
        if answer is None:
            continue
        known = (j for j, other in enumerate(found) if other == answer or task.equivalent(other, answer))
        classes[i] = next(known, len(found))
        if classes[i] == len(found):
            found.append(answer)
    return classes

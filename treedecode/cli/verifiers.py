"""Makes the verifier that `--verifier` names."""

import os
from typing import Any

from treedecode.cli.errors import errors_of_argument
from treedecode.cli.models import leads_nowhere, require_hub
from treedecode.cli.user_files import is_reference, load_object
from treedecode.tasks.base import Problem, Task

VERIFIERS = {
    "none": "no scores; strategies that need some refuse to run",
    "task": "the task's own check, which knows the answers: an oracle, for upper bounds",
    "likelihood": "log-likelihood per token under the model itself",
    "value_head[:FILE]": "a value head on the model's hidden states; without a file the one beside the model",
    "judge": "the model itself, asked whether a branch is sure, likely or impossible to succeed",
    "FILE.py:NAME": "a function of (problem, text) in a Python file, or a scorer of your own",
    "PATH or HUB NAME": "a Transformers reward model (sequence or token classification)",
}


def verifier_named(name: str, task: Task, model: str, device: str = "cpu") -> Any:
    """Makes the scorer that `--verifier NAME` names; None for "none".

    Args:
        model: the folder or hub name of the model that decodes.
        device: of a reward model.

    Raises:
        FileNotFoundError: there is no such value head.
        ValueError: there is no such verifier, or it cannot be loaded.
    """
    if name == "none":
        return None
    if name == "task":
        return Oracle(task)
    if name == "likelihood":
        from treedecode.verify.scorers import Likelihood

        return Likelihood()
    if name == "judge":
        from treedecode.verify.judges import value_judge

        return value_judge()
    if is_reference(name):
        verifier, settings = load_object(name, "verifier")
        if settings:
            raise ValueError(f"verifier: expected FILE.py:NAME, and {name!r} goes on after the name")
        if not callable(verifier):
            raise ValueError(f"verifier: expected a function of (problem, text) or a scorer, got {verifier!r}")
        return verifier() if isinstance(verifier, type) else verifier
    kind, _, path = name.partition(":")
    if kind == "value_head":
        path = path or os.path.join(model, "value_head.safetensors")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"verifier: no value head at {path}")
        from treedecode.verify.value import Value

        with errors_of_argument("verifier", "path"):
            return Value(path)
    if name == "help" or ":" in name or leads_nowhere(name):
        raise ValueError(f"verifier: expected one of {', '.join(VERIFIERS)}; got {name!r}")
    from treedecode.verify.reward_model import RewardModel

    require_hub(name, "verifier")
    with errors_of_argument("verifier", "path_or_model"):
        return RewardModel(name, device=device)


class Oracle:
    """Scores by the task's own check: 1 for a right solution, 0 for any other text.

    It knows the answers, so the accuracy of a strategy with it is a bound, not a result.
    """

    def __init__(self, task: Task) -> None:
        self._task = task

    def __repr__(self) -> str:
        return f"Oracle({self._task.name!r})"

    def __call__(self, problem: Problem, text: str) -> float:
        is_right = self._task.verify(problem, text)
        if is_right is None:
            raise ValueError(f"verifier: the task cannot check the problem {problem.id!r}, which has no answer")
        return float(is_right)

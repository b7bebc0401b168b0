"""Tasks: problems to solve, and checks of their answers."""

import importlib
import os
from typing import Any

from treedecode.tasks.base import Problem, Task
from treedecode.tasks.jsonl import Jsonl
from treedecode.tasks.prompts import few_shot, format_prompts, prefix

__all__ = ["Problem", "Task", "few_shot", "format_prompts", "load", "prefix"]

_EXPECTED = (
    "expected 'countdown', 'reasoning_gym:<dataset>' (as reasoning_gym:leg_counting), or the path of a .jsonl file"
)


def load(name_or_path: str | os.PathLike[str], **options: Any) -> Task:
    """Loads a task by its name, or from a JSONL file of problems.

    Args:
        options: arguments of the task's class.

    Raises:
        ValueError: there is no such task.
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: a package that the task needs is not installed.
    """
    name = os.fspath(name_or_path)
    if name.endswith(".jsonl"):
        return Jsonl(name, **options)
    if name == "countdown":
        return importlib.import_module("treedecode.tasks.countdown").Countdown(**options)
    kind, _, dataset = name.partition(":")
    if kind == "reasoning_gym" and dataset:
        from treedecode.tasks.reasoning_gym import ReasoningGym

        return ReasoningGym(dataset, **options)
    raise ValueError(f"name_or_path: {_EXPECTED}; got {name!r}")

"""Checks the problems, the task and the prompts of a run, before anything is spent."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from treedecode.common.arrays import IntArray
from treedecode.common.validation import token_ids
from treedecode.decoding.decoder import Decoder, Prompt
from treedecode.tasks.base import Problem, Task, unicode

_OF_TASK = ("name", "stop", "end", "max_step_tokens", "max_new_tokens", "extract", "equivalent", "is_final", "verify")
_MAX_LISTED = 5  # problems that an error lists


def checked_problems(problems: Iterable[Problem]) -> list[Problem]:
    """Returns the problems of a run as a list.

    Raises:
        TypeError: something else than problems, or an id that is no string.
        ValueError: two have the same id, or an id is no Unicode text.
    """
    if isinstance(problems, str) or not isinstance(problems, Iterable):
        raise TypeError(f"problems: expected a list of treedecode.Problem, got {problems!r}")
    checked = list(problems)
    for i, problem in enumerate(checked):
        if not isinstance(problem, Problem):
            raise TypeError(f"problems: expected a list of treedecode.Problem, got {problem!r} at {i}")
        if not isinstance(problem.id, str):
            raise TypeError(f"problems: the id at {i}: expected a string, got {problem.id!r}")
        unicode(problem.id, f"problems: the id at {i}")
    if len({problem.id for problem in checked}) < len(checked):
        raise ValueError("problems: two have the same id")
    return checked


def checked_task(task: Any, problems: Sequence[Problem]) -> Task:
    """Returns the task of a run: `task`, or where it is None the one object that all problems have as their task.

    Raises:
        TypeError: it is the name of a task, or lacks members of `Task`.
        ValueError: there is none, and the problems are not of one task.
    """
    if task is None:
        task = problems[0].task if problems else None
        if task is None or any(problem.task is not task for problem in problems):
            raise ValueError("task: the problems are not of one task, or do not say of which; give it")
    if isinstance(task, (str, type)):
        raise TypeError(f"task: expected a task, such as treedecode.tasks.load('countdown') gives, got {task!r}")
    missing = [name for name in _OF_TASK if not hasattr(task, name)]
    if missing:
        raise TypeError(f"task: expected a treedecode.tasks.Task, got {task!r} without {', '.join(missing)}")
    return task


def checked_prompts(
    decoder: Decoder, prompts: Mapping[str, Prompt], *, special_tokens: bool = False
) -> dict[str, IntArray]:
    """Converts the prompts of problems to token ids.

    Args:
        prompts: by the problem's id.
        special_tokens: whether special tokens that a text spells out count as such.

    Raises:
        TypeError: a prompt is neither a text nor token ids.
        ValueError: a prompt is empty, has an id outside of the vocabulary, or leaves no room for a solution (the
            problems are named).
    """
    limit, too_long = decoder.max_tokens, []
    ids_of = {}
    for problem_id, prompt in prompts.items():
        argument = f"problems: the prompt of {problem_id!r}"
        ids = prompt
        if isinstance(prompt, str):
            ids = decoder.encode(unicode(prompt, argument), special_tokens=special_tokens)
        ids_of[problem_id] = token_ids(argument, ids, decoder.model.vocab_size)
        length = len(ids_of[problem_id])
        if length == 0:
            raise ValueError(f"{argument} is empty")
        if length >= limit:
            too_long.append(f"{problem_id!r} ({length:,} tokens)")
    if too_long:
        more = f" and {len(too_long) - _MAX_LISTED} more" if len(too_long) > _MAX_LISTED else ""
        raise ValueError(
            f"problems: prompts leave no room for a solution in the {limit:,} tokens there are: "
            f"{', '.join(too_long[:_MAX_LISTED])}{more}"
        )
    return ids_of


def warn_of_little_room(decoder: Decoder, max_new_tokens: float, prompts: Mapping[str, IntArray]) -> None:
    """Warns if a prompt leaves a solution fewer than the `max_new_tokens` that it may have."""
    limit = decoder.max_tokens
    short = sum(len(ids) + max_new_tokens > limit for ids in prompts.values())
    if short:
        warnings.warn(
            f"{short} of {len(prompts)} prompts leave a solution fewer than the {max_new_tokens:,.0f} tokens it may "
            f"have: there are {limit:,} in all, by the model's context and kv_memory",
            stacklevel=2,
        )

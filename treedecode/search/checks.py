"""What a run is given, checked before anything is spent: problems, their task, and what the model is to read."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from treedecode.common.arrays import IntArray
from treedecode.decoding.arguments import token_ids
from treedecode.decoding.decoder import Decoder, Prompt
from treedecode.tasks.base import Problem, Task, unicode

_OF_TASK = ("name", "stop", "end", "max_step_tokens", "max_new_tokens", "extract", "equivalent", "is_final", "verify")
_NAMED = 5  # problems that an error lists


def checked_problems(problems: Iterable[Problem]) -> list[Problem]:
    """The problems of a run.

    Raises:
        TypeError: something else than problems, or an id that is no string. ValueError: two have the same id, or one is
            no Unicode.
    """
    if isinstance(problems, str) or not isinstance(problems, Iterable):
        raise TypeError(f"problems: expected a list of treedecode.Problem, got {problems!r}")
    found = list(problems)
    for i, problem in enumerate(found):
        if not isinstance(problem, Problem):
            raise TypeError(f"problems: expected a list of treedecode.Problem, got {problem!r} at {i}")
        if not isinstance(problem.id, str):
            raise TypeError(f"problems: the id at {i}: expected a string, got {problem.id!r}")
        unicode(problem.id, f"problems: the id at {i}")
    if len({problem.id for problem in found}) < len(found):
        raise ValueError("problems: two have the same id")
    return found


def checked_task(task: Any, problems: Sequence[Problem]) -> Task:
    """The task of a run: the one given, without one that which all problems are of (the same object).

    Raises:
        TypeError: it is the name of one, or lacks what tasks have. ValueError: the problems do not say which.
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


def checked_prompts(decoder: Decoder, prompts: Mapping[str, Prompt]) -> dict[str, IntArray]:
    """The token ids that a model is to read for each problem.

    Args:
        prompts: by the problem's id.

    Raises:
        TypeError: neither a text nor token ids. ValueError: empty, an id outside the vocabulary, or no room for a
            solution (the problems are named).
    """
    limit, too_long = decoder.max_tokens, []
    found = {}
    for name, prompt in prompts.items():
        argument = f"problems: the prompt of {name!r}"
        ids = decoder.encode(unicode(prompt, argument)) if isinstance(prompt, str) else prompt
        found[name] = token_ids(ids, argument, decoder.model.vocab_size)
        length = len(found[name])
        if length == 0:
            raise ValueError(f"{argument} is empty")
        if length >= limit:
            too_long.append(f"{name!r} ({length:,} tokens)")
    if too_long:
        more = f" and {len(too_long) - _NAMED} more" if len(too_long) > _NAMED else ""
        raise ValueError(
            f"problems: prompts leave no room for a solution in the {limit:,} tokens there are: "
            f"{', '.join(too_long[:_NAMED])}{more}"
        )
    return found


def warn_of_little_room(decoder: Decoder, most: float, prompts: Mapping[str, IntArray]) -> None:
    """Warns if solutions cannot get as long as they may, `most` tokens."""
    limit = decoder.max_tokens
    short = sum(len(ids) + most > limit for ids in prompts.values())
    if short:
        warnings.warn(
            f"{short} of {len(prompts)} prompts leave a solution fewer than the {most:,.0f} tokens it may "
            f"have: there are {limit:,} in all, by the model's context and kv_memory",
            stacklevel=2,
        )

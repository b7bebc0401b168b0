"""What users give, checked: each error names the argument, what was expected and what came."""

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from treedecode.engine.sampling import Sampling

Scores = Sequence[float] | np.ndarray


def token_ids(ids: Any, name: str, vocab_size: int) -> np.ndarray:
    """`[n]` int64 token ids from a list, array or tensor; maybe none.

    Raises:
        TypeError: not a row of integers. ValueError: an id outside the vocabulary.
    """
    try:
        array = np.asarray(ids)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    truths = isinstance(ids, (list, tuple)) and any(isinstance(item, bool) for item in ids)
    if array.ndim != 1 or truths or (array.dtype.kind not in "iu" and array.size):
        raise TypeError(f"{name}: expected a string or token ids, got {_shown(ids)}")
    tokens = array.astype(np.int64)
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(wrong):
        raise ValueError(f"{name}: expected token ids from 0 to {vocab_size - 1}, got {wrong[0]}")
    return tokens


def whole_numbers(value: Any, count: int, name: str) -> np.ndarray:
    """`[count]` int64 from an int for all branches or a list with one for each.

    Raises:
        TypeError: not integers. ValueError: another number of them.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name}: expected an int, or one for each branch, got {value!r}")
    if array.shape not in ((), (count,)):
        raise ValueError(f"{name}: expected an int, or {count}, one for each branch, got {value!r}")
    return np.broadcast_to(array.astype(np.int64), count).copy()


def sampling_or(sampling: Sampling | None, default: Sampling) -> Sampling:
    """`sampling`, where it is given.

    Raises:
        TypeError: it is something else.
    """
    if sampling is not None and not isinstance(sampling, Sampling):
        raise TypeError(f"sampling: expected a treedecode.Sampling, got {_shown(sampling)}")
    return default if sampling is None else sampling


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80]


async def numbers_of(fn: Callable[[list[str]], Scores | Awaitable[Scores]], texts: list[str], count: int) -> np.ndarray:
    """`[count]` float64: what a function, or coroutine function, makes of texts.

    Raises:
        ValueError: another number of them.
    """
    result = fn(texts)
    values = np.asarray(await result if inspect.isawaitable(result) else result, np.float64)
    if values.shape != (count,):
        raise ValueError(f"fn: expected {count} numbers, one per text, got shape {list(values.shape)}")
    return values

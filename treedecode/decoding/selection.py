"""Choosing branches: masks, scores, and equal tokens."""

import inspect
from collections.abc import Awaitable, Callable, Hashable, Sequence

import numpy as np

from treedecode.common.arrays import IntArray
from treedecode.common.validation import ints_per_branch

Scores = Sequence[float] | np.ndarray


def indices_of(mask: Sequence[bool] | IntArray, count: int) -> IntArray:
    """Converts a mask of `count` branches, or indices of some of them, to indices.

    Raises:
        TypeError: it holds neither booleans nor integers.
        ValueError: it has not one entry per branch; an index is none of `0 .. count - 1`, or appears twice.
    """
    indices = np.asarray(mask)
    if indices.ndim != 1 or (indices.dtype.kind not in "biu" and indices.size):
        raise TypeError(f"mask: expected [n] booleans or indices, got {mask!r}")
    if indices.dtype == bool:
        if len(indices) != count:
            raise ValueError(f"mask: expected {count} entries, got {len(indices)}")
        indices = np.flatnonzero(indices)
    indices = indices.astype(np.int64)
    if ((indices < 0) | (indices >= count)).any():
        raise ValueError(f"mask: expected indices from 0 to {count - 1}, got {mask!r}")
    if len({*indices.tolist()}) < len(indices):
        raise ValueError("mask: an index appears twice; use fork for copies")
    return indices


def copies_per_branch(name: str, value: int | Sequence[int] | IntArray, count: int) -> IntArray:
    """Converts a number of copies for all branches, or one for each, to `[count]` int64.

    Raises:
        TypeError: it holds something else than integers.
        ValueError: a number is negative, or all are 0.
    """
    copies = ints_per_branch(name, value, count)
    if (copies < 0).any() or copies.sum() == 0:
        raise ValueError(f"{name}: expected numbers >= 0, not all of them 0, got {value}")
    return copies


async def numbers_of(fn: Callable[[list[str]], Scores | Awaitable[Scores]], texts: list[str], count: int) -> np.ndarray:
    """Calls a function, or coroutine function, on texts.

    Returns:
        `[count]` float64.

    Raises:
        ValueError: the function returns another number of them.
    """
    result = fn(texts)
    values = np.asarray(await result if inspect.isawaitable(result) else result, np.float64)
    if values.shape != (count,):
        raise ValueError(f"fn: expected {count} numbers, one per text, got shape {list(values.shape)}")
    return values


def best_of_each(scores: np.ndarray, group: IntArray, keep: int) -> IntArray:
    """Returns the indices of the `keep` best scores of every group, ascending.

    Equal scores: the earlier one is kept. A missing score (NaN) is below all others.
    """
    badness = np.where(np.isnan(scores), np.inf, -scores)
    order = np.lexsort((badness, group))  # stable
    rank = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    return np.sort(order[rank < keep])


def first_equal(keys: Sequence[Hashable]) -> IntArray:
    """Returns for every key the index of the first one equal to it, `[len(keys)]` int64."""
    first: dict[Hashable, int] = {}
    return np.array([first.setdefault(key, i) for i, key in enumerate(keys)], np.int64)

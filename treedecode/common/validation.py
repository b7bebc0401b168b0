"""Checks arguments. Every error names the argument, what was expected and what was given."""

from collections.abc import Collection
from typing import Any

import numpy as np


def integer(name: str, value: Any) -> int:
    """Checks that `value` is an int; NumPy's integers count, booleans do not.

    Raises:
        TypeError: it is not an int.
    """
    if not _is_int(value):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    return int(value)


def number(name: str, value: Any) -> float:
    """Checks that `value` is an int or a float; booleans are neither.

    Raises:
        TypeError: it is no number.
    """
    if not _is_number(value):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return value


def positive_int(name: str, value: Any) -> int:
    """Checks that `value` is an int of 1 or more.

    Raises:
        ValueError: it is not.
    """
    return int_at_least(name, value, 1)


def int_at_least(name: str, value: Any, low: int) -> int:
    """Checks that `value` is an int of `low` or more.

    Raises:
        ValueError: it is not.
    """
    if not _is_int(value) or value < low:
        raise ValueError(f"{name}: expected an int >= {low}, got {value!r}")
    return int(value)


def int_from_to(name: str, value: Any, low: int, high: int) -> int:
    """Checks that `value` is an int from `low` to `high`.

    Raises:
        ValueError: it is not.
    """
    if not _is_int(value) or not low <= value <= high:
        raise ValueError(f"{name}: expected an int from {low} to {high}, got {value!r}")
    return int(value)


def int_in(name: str, value: Any, low: float, high: float = float("inf")) -> int:
    """Checks that `value` is an int in [low, high].

    Raises:
        TypeError: it is no int.
        ValueError: it is out of range.
    """
    integer(name, value)
    _require_range(name, value, low, high)
    return int(value)


def number_in(name: str, value: Any, low: float, high: float = float("inf")) -> float:
    """Checks that `value` is a number in [low, high].

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range, or NaN.
    """
    number(name, value)
    _require_range(name, value, low, high)
    return value


def one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Checks that `value` is one of the allowed values.

    Raises:
        ValueError: it is none of them.
    """
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def token_ids(name: str, ids: Any, vocab_size: int) -> np.ndarray:
    """Converts a list, array or tensor of token ids to `[n]` int64; n may be 0.

    Raises:
        TypeError: it is no row of integers.
        ValueError: an id is outside of the vocabulary.
    """
    try:
        array = np.asarray(ids)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    has_booleans = isinstance(ids, (list, tuple)) and any(isinstance(item, bool) for item in ids)
    if array.ndim != 1 or has_booleans or (array.dtype.kind not in "iu" and array.size):
        raise TypeError(f"{name}: expected a string or token ids, got {shown(ids)}")
    tokens = array.astype(np.int64)
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(outside):
        raise ValueError(f"{name}: expected token ids from 0 to {vocab_size - 1}, got {outside[0]}")
    return tokens


def ints_per_branch(name: str, value: Any, count: int) -> np.ndarray:
    """Converts an int for all branches, or a list with one for each, to `[count]` int64.

    Raises:
        TypeError: it has something else than integers.
        ValueError: it has another number of them.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name}: expected an int, or one for each branch, got {value!r}")
    if array.shape not in ((), (count,)):
        raise ValueError(f"{name}: expected an int, or {count}, one for each branch, got {value!r}")
    return np.broadcast_to(array.astype(np.int64), count).copy()


def shown(value: Any) -> str:
    """Describes a value by its type and repr, cut to 80 characters."""
    return f"{type(value).__name__} {value!r}"[:80]


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, (bool, np.bool_))


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        bounds = f" >= {low:g}" if high == float("inf") else f" from {low:g} to {high:g}"
        raise ValueError(f"{name}: expected a number{'' if low == -float('inf') else bounds}, got {value}")

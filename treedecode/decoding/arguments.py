"""What users give, checked: each error names the argument, what was expected and what came."""

import contextlib
import inspect
import math
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from treedecode.engine.sampling import Sampling

Scores = Sequence[float] | np.ndarray

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


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


def memory_bytes(kv_memory: int | str | None, device: torch.device, useful: int) -> int:
    """Bytes to take for keys and values; by default up to `useful`."""
    if kv_memory is None:
        if device.type == "cuda":
            return min(useful, int(torch.cuda.mem_get_info(device)[0] * 0.8))
        return min(useful, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8)
    if isinstance(kv_memory, str):
        digits = kv_memory.rstrip("abgikmABGIKM ")
        unit = kv_memory[len(digits) :].strip().lower()
        try:
            return int(float(digits) * _UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            raise ValueError(f'kv_memory: expected bytes or a string like "2GiB", got {kv_memory!r}') from None
    if isinstance(kv_memory, bool) or not isinstance(kv_memory, (int, float)) or not math.isfinite(kv_memory):
        raise TypeError(f'kv_memory: expected bytes or a string like "2GiB", got {kv_memory!r}')
    return int(kv_memory)


@contextlib.contextmanager
def allocated(kv_memory: int | str | None, max_branches: int) -> Iterator[None]:
    """Around what takes the memory that `kv_memory` and `max_branches` ask for.

    Raises:
        MemoryError: there is not so much.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # torch has no class for it on the CPU
            raise
        raise MemoryError(
            f"kv_memory: {kv_memory}, max_branches: {max_branches} take more memory than there is: {error}"
        ) from error


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

"""The memory that keys and values may take: `kv_memory`, in bytes."""

import contextlib
import math
import mmap
import os
from collections.abc import Iterator

import torch
from torch import Tensor

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def kv_memory_bytes(kv_memory: int | str | None, device: torch.device, useful: int) -> int:
    """Converts `kv_memory`, an int or a string like "2GiB", to bytes.

    Args:
        useful: the most bytes that can ever be used. None as `kv_memory` takes them, but at most an eighth of the
            machine's memory, or 80% of what is free on a GPU.

    Raises:
        TypeError: neither a finite number nor a string.
        ValueError: a string that names no size.
    """
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


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Makes a tensor of zeros; on the CPU the system gives it memory where it is first written.

    `torch.zeros` writes all of it at once.

    Raises:
        MemoryError: the system does not promise so much memory.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0 or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"cannot allocate {num_bytes} bytes: {error}") from None
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@contextlib.contextmanager
def out_of_memory_named(kv_memory: int | str | None, max_branches: int) -> Iterator[None]:
    """Names the two arguments in the error when an allocation inside of this context fails.

    Raises:
        MemoryError: there is less memory than they ask for.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # torch has no class for it on the CPU
            raise
        raise MemoryError(
            f"kv_memory: {kv_memory}, max_branches: {max_branches} take more memory than there is: {error}"
        ) from error

"""Chooses the backend of an op on a GPU by size, from the tables that `treedecode tune` has measured."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treedecode.common import env

FORMAT = 1


def size_class(op_args: tuple[Any, ...]) -> int:
    """Returns the size that a choice depends on: the bits of the first tensor's number of elements."""
    return next(arg for arg in op_args if isinstance(arg, Tensor)).numel().bit_length()


def slug(device_name: str) -> str:
    """Returns a GPU's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def path_of(device_name: str) -> Path:
    """Returns the path of the table of `treedecode tune` for a device."""
    return env.cache_dir() / "tuned" / f"{slug(device_name)}.json"


@functools.cache
def tables() -> dict[str, dict[str, dict[int, str]]]:
    """Reads all tables: device slug -> op -> size class -> "cuda" or "triton".

    Raises:
        ValueError: a table cannot be read.
    """
    result: dict[str, dict[str, dict[int, str]]] = {}
    for path in sorted(path_of("").parent.glob("*.json")):
        try:
            table = json.loads(path.read_text())
            if table["format"] != FORMAT:
                raise ValueError(f"format {table['format']}, expected {FORMAT}")
            result[path.stem] = {
                op: {int(size): backend for size, backend in sizes.items()} for op, sizes in table["choices"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            text = f"{path}: not a table of `treedecode tune` ({error}); delete it or tune again"
            raise ValueError(text) from None
    return result


def takes_triton(op: str) -> bool:
    """Returns whether any table prefers the Triton kernel of `op` at some size."""
    return any("triton" in table.get(op, {}).values() for table in tables().values())


def takes_only_triton(op: str) -> bool:
    """Returns whether all tables prefer the Triton kernel of `op` at all sizes."""
    return bool(tables()) and all({*table.get(op, {}).values()} == {"triton"} for table in tables().values())


def nearest(sizes: dict[int, str], size: int) -> str:
    """Returns the choice at the measured size class nearest to `size`, the smaller one of two."""
    return sizes[min(sizes, key=lambda measured: (abs(measured - size), measured))]


@functools.cache
def _sizes(op: str, device: int) -> dict[int, str]:
    return tables().get(slug(torch.cuda.get_device_name(device)), {}).get(op, {})


def chooser(op: str, cuda: Callable[..., Any], triton: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a kernel of `op` that calls the one measured to be faster, `cuda` where nothing was measured."""

    def choose(*args: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.index
        sizes = _sizes(op, device)
        return (triton if sizes and nearest(sizes, size_class(args)) == "triton" else cuda)(*args)

    return choose

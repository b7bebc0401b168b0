"""Which backend an op takes on a GPU, by size, where `treedecode tune` has measured it."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treedecode.common import env

_SHIPPED = Path(__file__).parent.parent / "tuned"
FORMAT = 1


def size_class(op_args: tuple[Any, ...]) -> int:
    """What a choice depends on: the bits of the first tensor's number of elements."""
    return next(arg for arg in op_args if isinstance(arg, Tensor)).numel().bit_length()


def slug(device_name: str) -> str:
    """A GPU's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def path_of(device_name: str) -> Path:
    """Where `treedecode tune` keeps its table of a device."""
    return env.cache_dir() / "tuned" / f"{slug(device_name)}.json"


@functools.cache
def tables() -> dict[str, dict[str, dict[int, str]]]:
    """device slug -> op -> size class -> "cuda" or "triton". The user's own measurements go before shipped ones.

    Raises:
        ValueError: a table cannot be read.
    """
    found: dict[str, dict[str, dict[int, str]]] = {}
    for folder in (_SHIPPED, path_of("").parent):
        for path in sorted(folder.glob("*.json")):
            try:
                table = json.loads(path.read_text())
                if table["format"] != FORMAT:
                    raise ValueError(f"format {table['format']}, expected {FORMAT}")
                found[path.stem] = {
                    op: {int(size): backend for size, backend in sizes.items()}
                    for op, sizes in table["choices"].items()
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                text = f"{path}: not a table of `treedecode tune` ({error}); delete it or tune again"
                raise ValueError(text) from None
    return found


def takes_triton(op: str) -> bool:
    """Whether any table prefers the Triton kernel of `op` at some size."""
    return any("triton" in table.get(op, {}).values() for table in tables().values())


def takes_only_triton(op: str) -> bool:
    """Whether all tables prefer the Triton kernel of `op` at all sizes."""
    return bool(tables()) and all({*table.get(op, {}).values()} == {"triton"} for table in tables().values())


def nearest(sizes: dict[int, str], size: int) -> str:
    """The choice of the measured size class next to `size`; the smaller one in the middle."""
    return sizes[min(sizes, key=lambda known: (abs(known - size), known))]


@functools.cache
def _sizes(op: str, device: int) -> dict[int, str]:
    return tables().get(slug(torch.cuda.get_device_name(device)), {}).get(op, {})


def chooser(op: str, cuda: Callable[..., Any], triton: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of `op` that calls the one which was measured to be faster, `cuda` where nothing was."""

    def choose(*args: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.index
        sizes = _sizes(op, device)
        return (triton if sizes and nearest(sizes, size_class(args)) == "triton" else cuda)(*args)

    return choose

"""Finds the kernels that an op has on a device, by backend, whether or not the dispatcher would take them."""

from collections.abc import Callable
from typing import Any

import torch

from treedecode import ops, triton_kernels


def kernels(op: str, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Returns each backend's function, which takes the arguments of the op's schema; on the CPU the op itself.

    Raises:
        ValueError: there is no such op.
    """
    if op not in ops.names():  # asking also makes sure that the library is loaded
        raise ValueError(f"op: treedecode has no op {op!r}")
    if device.type != "cuda":
        return {device.type: getattr(torch.ops.treedecode, op).default}
    functions: dict[str, Callable[..., Any]] = {}
    if hasattr(torch.ops.treedecode_cuda, op):
        functions["cuda"] = getattr(torch.ops.treedecode_cuda, op).default
    if op in triton_kernels.OPS:
        functions["triton"] = triton_kernels.launcher(op)
    return functions

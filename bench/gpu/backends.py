"""The kernels that an op has on a device, by backend: what the dispatcher would take, and what it would not."""

from collections.abc import Callable
from typing import Any

import torch

from treedecode import ops, triton_kernels


def kernels(op: str, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Backend -> function with the arguments of the op's schema; on the CPU the op itself."""
    if op not in ops.names():  # asking also makes sure that the library is loaded
        raise ValueError(f"op: treedecode has no op {op!r}")
    if device.type != "cuda":
        return {device.type: getattr(torch.ops.treedecode, op).default}
    found: dict[str, Callable[..., Any]] = {}
    if hasattr(torch.ops.treedecode_cuda, op):
        found["cuda"] = getattr(torch.ops.treedecode_cuda, op).default
    if op in triton_kernels.OPS:
        found["triton"] = triton_kernels.launcher(op)
    return found

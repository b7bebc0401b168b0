"""Loads and calls the native op library, and explains which backend an op takes and why."""

import functools
import re
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treedecode import triton_kernels
from treedecode.common import env
from treedecode.ops import _tuned

_LIBRARY = Path(__file__).parent.parent / "_ops.so"
if not _LIBRARY.exists():
    raise ImportError(
        f"treedecode's native library is not built ({_LIBRARY} is missing): run `pip install -e .` or `make build` in "
        "the source checkout"
    )
torch.ops.load_library(str(_LIBRARY))

_CUDA_LIBRARY = _LIBRARY.with_name("_cuda.so")
_HAS_CUDA_LIBRARY = _CUDA_LIBRARY.exists()  # not built where there is no nvcc; it loads without a GPU
if _HAS_CUDA_LIBRARY:
    torch.ops.load_library(str(_CUDA_LIBRARY))

_ARGUMENT_ERROR = re.compile(r"\[(ValueError|TypeError)\] (.*?)(?:\n|$)")
_EXCEPTIONS = {"ValueError": ValueError, "TypeError": TypeError}


def call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """Calls a native op, and raises its argument errors as ValueError or TypeError.

    Raises:
        ValueError: as the op says.
        TypeError: as the op says.
        RuntimeError: an argument requires a gradient, which no op computes. Without this check the result would carry a
            `grad_fn` that only warns, and a residual connection around the op would hide the missing part.
    """
    if torch.is_grad_enabled():
        for value in args:
            if value.requires_grad if isinstance(value, Tensor) else _requires_grad(value):
                raise RuntimeError(_needs_grad(op, args))
    try:
        return op(*args)
    except RuntimeError as error:
        for argument, value in zip(op._schema.arguments, args, strict=False):
            if value is None and str(argument.type) == "Tensor":
                raise TypeError(f"{argument.name}: expected a tensor, got None") from None
        match = _ARGUMENT_ERROR.search(str(error))
        if match is None:
            raise
        raise _EXCEPTIONS[match[1]](match[2]) from None


def _requires_grad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return type(value) in (list, tuple) and any(map(_requires_grad, value))


def _needs_grad(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> str:
    named = zip(op._schema.arguments, args, strict=False)
    names = [argument.name for argument, value in named if _requires_grad(value)]
    return (
        f"treedecode ops are for inference: {', '.join(names)} of {op._schema.name.removeprefix('treedecode::')} "
        "requires grad; use torch.inference_mode() or torch.no_grad(), or detach"
    )


def register_fake(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as the fake kernel of the ops `names`.

    The dispatcher also calls a fake kernel if any of the tensors is on the meta device. Tensors on several devices are
    refused, because the result would look like a computed one.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            torch.library.register_fake(f"treedecode::{name}", functools.partial(_on_one_device, name, kernel))
        return kernel

    return register


def _on_one_device(name: str, kernel: Callable[..., Any], *args: Any) -> Any:
    flat = chain.from_iterable(value if isinstance(value, list | tuple) else [value] for value in args)
    devices = {str(value.device) for value in flat if isinstance(value, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"{name}: expected tensors on one device, got {' and '.join(sorted(devices))}")
    return kernel(*args)


def cpu_isa() -> tuple[str, str]:
    """Returns (active, best): CPU instruction sets of the kernels, by their names in `env.CPU_ISAS`."""
    active, detected, _ = torch.ops.treedecode._cpu_isa(-1)
    return env.CPU_ISAS[active], env.CPU_ISAS[detected]


def cpu_threads() -> int:
    """Returns how many threads the CPU kernels use.

    It is the number of torch (`OMP_NUM_THREADS`, `torch.set_num_threads`). Where nobody has set that, it is at most the
    number of CPUs that the affinity mask and the control group leave to the process.
    """
    threads: int = torch.ops.treedecode._cpu_threads("")[0]
    return threads


def compiled_isas() -> tuple[str, ...]:
    """Returns the CPU instruction sets that this build has kernels for, the simplest first."""
    return env.CPU_ISAS[: torch.ops.treedecode._cpu_isa(-1)[2] + 1]


def set_cpu_isa(name: str) -> None:
    """Sets the instruction set of the CPU kernels, for the whole process.

    Raises:
        ValueError: the name is unknown, or this machine cannot run it.
    """
    if name not in env.CPU_ISAS:
        raise ValueError(f"name: expected one of {', '.join(env.CPU_ISAS)}, got {name!r}")
    call(torch.ops.treedecode._cpu_isa.default, env.CPU_ISAS.index(name))


if (_requested := env.cpu_isa()) is not None:
    set_cpu_isa(_requested)


def names() -> list[str]:
    """Returns the public ops of this build, `torch.ops.treedecode.<name>`."""
    ops = (
        name.removeprefix("treedecode::") for name in torch._C._dispatch_get_all_op_names() if "treedecode::" in name
    )
    return sorted(name for name in ops if not name.startswith("_"))


USE_REFERENCE = env.backend() == "reference"

# Ops with a kernel in the CUDA library.
CUDA_OPS = frozenset(
    op for op in names() if torch._C._dispatch_has_kernel_for_dispatch_key(f"treedecode::{op}", "CUDA")
)

try:
    import triton as _triton  # noqa: F401

    for _op in triton_kernels.OPS:
        _launch = triton_kernels.launcher(_op)
        if _op not in CUDA_OPS:
            torch.library.register_kernel(f"treedecode::{_op}", "cuda", _launch)
        elif _tuned.takes_triton(_op):
            _launch = _tuned.chooser(_op, getattr(torch.ops.treedecode_cuda, _op), _launch)
            with warnings.catch_warnings(action="ignore"):  # torch warns that the CUDA kernel is replaced
                torch.library.register_kernel(f"treedecode::{_op}", "cuda", _launch)
    _NO_TRITON = None
except ImportError as _error:
    _NO_TRITON = f"Triton cannot be imported ({_error}): pip install 'treedecode[gpu]'"


class Choice(NamedTuple):
    """The backend that an op takes on a device, and the reason against each other one."""

    op: str
    device: str
    backend: str
    rejected: dict[str, str]


def explain(op: str, device: str = "cpu") -> Choice:
    """Returns the backend that `op` takes on `device` (`cpu` or `cuda`) in this process, and the reasons.

    Raises:
        ValueError: unknown op or device.
    """
    if not hasattr(torch.ops.treedecode, op):
        raise ValueError(f"op: treedecode has no op {op!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    reasons = {backend: _reason_against(op, device, backend) for backend in ("cuda", "triton", "cpu", "reference")}
    taken = next((backend for backend, reason in reasons.items() if reason is None), "none")
    return Choice(op, device, taken, {backend: reason for backend, reason in reasons.items() if reason is not None})


def _reason_against(op: str, device: str, backend: str) -> str | None:
    """Returns the reason for which `op` does not take `backend` on `device`; None when it does."""
    if backend == "reference":
        return None if USE_REFERENCE else "only on request (TREEDECODE_BACKEND=reference)"
    if backend == "triton":
        if op not in triton_kernels.OPS:
            return "has no Triton kernel yet"
        if _NO_TRITON or device != "cuda":
            return _NO_TRITON or "runs on cuda tensors only"
        if op in CUDA_OPS and not _tuned.takes_triton(op):
            return "the CUDA kernel goes first"
        return None if op not in CUDA_OPS or _tuned.takes_only_triton(op) else "taken at sizes where it measured faster"
    if backend == "cuda":
        if not _HAS_CUDA_LIBRARY:
            return "not in this build: needs the CUDA kernels"
        if op not in CUDA_OPS:
            return "has no CUDA kernel yet"
        if device != "cuda":
            return "runs on cuda tensors only"
        return "measured slower at every size" if _NO_TRITON is None and _tuned.takes_only_triton(op) else None
    key = backend.upper()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"treedecode::{op}", key):
        return f"not in this build: needs the {key} kernels"
    if device != backend:
        return f"runs on {backend} tensors only"
    return "TREEDECODE_BACKEND=reference is set" if USE_REFERENCE else None

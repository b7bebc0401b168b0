"""The native op library: loading it, calling it, and saying which backend an op takes and why."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from treedecode import env

_LIBRARY = Path(__file__).parent.parent / "_ops.so"
if not _LIBRARY.exists():
    raise ImportError(
        f"treedecode's native library is not built ({_LIBRARY} is missing): run `pip install -e .` or `make build` in "
        "the source checkout"
    )
torch.ops.load_library(str(_LIBRARY))

_ARGUMENT_ERROR = re.compile(r"\[(ValueError|TypeError)\] (.*?)(?:\n|$)")
_EXCEPTIONS = {"ValueError": ValueError, "TypeError": TypeError}


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Calls a native op; its argument errors come out as ValueError or TypeError."""
    try:
        return op(*args)
    except RuntimeError as error:
        found = _ARGUMENT_ERROR.search(str(error))
        if found is None:
            raise
        raise _EXCEPTIONS[found[1]](found[2]) from None


def cpu_isa() -> tuple[str, str]:
    """(active, best) CPU instruction set of the kernels, names from `env.CPU_ISAS`."""
    active, detected = torch.ops.treedecode._cpu_isa(-1)
    return env.CPU_ISAS[active], env.CPU_ISAS[detected]


def set_cpu_isa(name: str) -> None:
    """Chooses the CPU kernels' instruction set for the whole process.

    Raises:
        ValueError: the name is unknown, or this machine cannot run it.
    """
    if name not in env.CPU_ISAS:
        raise ValueError(f"name: expected one of {', '.join(env.CPU_ISAS)}, got {name!r}")
    call(torch.ops.treedecode._cpu_isa, env.CPU_ISAS.index(name))


if (_requested := env.cpu_isa()) is not None:
    set_cpu_isa(_requested)

USE_REFERENCE = env.backend() == "reference"


class Choice(NamedTuple):
    """Which backend an op takes on a device, and why each other one was not taken."""

    op: str
    device: str
    backend: str
    rejected: dict[str, str]


def explain(op: str, device: str = "cpu") -> Choice:
    """The backend `op` takes on `device` (`cpu` or `cuda`) in this process.

    Raises:
        ValueError: unknown op or device.
    """
    if not hasattr(torch.ops.treedecode, op):
        raise ValueError(f"op: treedecode has no op {op!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    if USE_REFERENCE:
        return Choice(op, device, "reference", {"native": "TREEDECODE_BACKEND=reference is set"})
    rejected = {"reference": "only on request (TREEDECODE_BACKEND=reference)"}
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"treedecode::{op}", key):
        return Choice(op, device, device, rejected)
    return Choice(op, device, "none", rejected | {device: "this build has no kernel for it"})

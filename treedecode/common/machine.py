"""Describes the machine's hardware and packages, for reports."""

import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_bf16", "asimd")


def attempt(function: Callable[[], Any]) -> Any:
    """Returns the function's result, or its error as text."""
    try:
        return function()
    except BaseException as error:  # a broken native library can raise anything, SystemExit included
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def version(package: str) -> str:
    """Returns the version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu() -> dict[str, Any]:
    """Returns the CPU's model name and those of its instruction sets that kernels use."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as file:
            for entry in file:
                key, _, value = entry.partition(":")
                fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in ISA_FLAGS if flag in flags],
    }


def memory() -> str:
    """Describes installed and available memory."""
    sizes = {}
    with open("/proc/meminfo") as file:
        for entry in file:
            key, _, value = entry.partition(":")
            sizes[key] = int(value.split()[0]) / 2**20
    return f"{sizes['MemTotal']:.1f} GiB, {sizes['MemAvailable']:.1f} GiB available"


def gpus() -> str:
    """Describes the GPUs that torch can use; imports torch."""
    import torch

    if not torch.cuda.is_available():
        return f"none usable (torch built for {torch.version.cuda or torch.version.hip or 'CPU only'})"
    return "; ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))

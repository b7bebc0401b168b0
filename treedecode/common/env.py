"""Reads the environment variables of treedecode; no other module reads any."""

import os
import re
from pathlib import Path

CPU_ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def cpu_isa() -> str | None:
    """Reads `TREEDECODE_CPU_ISA`, one of CPU_ISAS; unset means the best one that the machine has.

    Raises:
        ValueError: it is another value.
    """
    value = os.environ.get("TREEDECODE_CPU_ISA")
    if value is not None and value not in CPU_ISAS:
        raise ValueError(f"TREEDECODE_CPU_ISA: expected one of {', '.join(CPU_ISAS)}, got {value!r}")
    return value


def backend() -> str | None:
    """Reads `TREEDECODE_BACKEND`: `reference` sends every op to the float64 reference; unset means native.

    The reference refuses values that would write to the wrong place, such as a slot out of range, but does not check
    dtypes, shapes and strides as the native ops do.

    Raises:
        ValueError: it is another value.
    """
    value = os.environ.get("TREEDECODE_BACKEND")
    if value not in (None, "reference"):
        raise ValueError(f"TREEDECODE_BACKEND: expected 'reference' or unset, got {value!r}")
    return value


def vllm_plugin() -> bool:
    """Reads `TREEDECODE_VLLM`: 0 leaves vLLM's attention as it is; 1 or unset puts treedecode's in its place.

    Raises:
        ValueError: it is another value.
    """
    value = os.environ.get("TREEDECODE_VLLM")
    if value not in (None, "0", "1"):
        raise ValueError(f"TREEDECODE_VLLM: expected 0, 1 or unset, got {value!r}")
    return value != "0"


def settings() -> dict[str, str]:
    """Returns the variables that are set and matter here, for bug reports."""
    return {name: os.environ[name] for name in sorted(os.environ) if re.match(r"TREEDECODE_|OMP_NUM_THREADS$", name)}


def cache_dir() -> Path:
    """Reads `TREEDECODE_CACHE`, the folder of converted models; default `$XDG_CACHE_HOME/treedecode`."""
    if value := os.environ.get("TREEDECODE_CACHE"):
        return Path(value)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "treedecode"

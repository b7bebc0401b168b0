"""Every environment variable treedecode reads, and nothing else reads any."""

import os
import re
from pathlib import Path

CPU_ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def cpu_isa() -> str | None:
    """`TREEDECODE_CPU_ISA`: one of CPU_ISAS; unset means the best one the machine has."""
    value = os.environ.get("TREEDECODE_CPU_ISA")
    if value is not None and value not in CPU_ISAS:
        raise ValueError(f"TREEDECODE_CPU_ISA: expected one of {', '.join(CPU_ISAS)}, got {value!r}")
    return value


def backend() -> str | None:
    """`TREEDECODE_BACKEND`: `reference` sends every op to the float64 reference, for debugging; unset means native.

    The reference refuses values that would write to the wrong place, such as a slot out of range, but does not check
    dtypes, shapes and strides as the native ops do.
    """
    value = os.environ.get("TREEDECODE_BACKEND")
    if value not in (None, "reference"):
        raise ValueError(f"TREEDECODE_BACKEND: expected 'reference' or unset, got {value!r}")
    return value


def settings() -> dict[str, str]:
    """The variables that are set of those that matter here, for bug reports."""
    return {name: os.environ[name] for name in sorted(os.environ) if re.match(r"TREEDECODE_|OMP_NUM_THREADS$", name)}


def cache_dir() -> Path:
    """`TREEDECODE_CACHE`: where converted models are kept; default `$XDG_CACHE_HOME/treedecode`."""
    if value := os.environ.get("TREEDECODE_CACHE"):
        return Path(value)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "treedecode"

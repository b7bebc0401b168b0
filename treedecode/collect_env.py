"""`python -m treedecode.collect_env`: what a bug report needs. It always prints, also when the build is broken."""

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

PACKAGES = ("treedecode", "torch", "transformers", "triton", "flash-attn", "numpy", "gguf", "vllm", "sglang", "ray")
ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_bf16", "asimd")


def attempt(function: Callable[[], Any]) -> Any:
    """The function's result, or its error as text."""
    try:
        return function()
    except BaseException as error:  # a broken native library can raise anything, SystemExit included
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def tool_version(name: str, line: int) -> str:
    """Line number `line` of `name --version`."""
    path = shutil.which(name)
    if path is None:
        return "not found"
    out = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    return out.strip().splitlines()[line]


def cpu() -> dict[str, Any]:
    """The CPU's model name and those of its instruction sets that matter here."""
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
    """Installed and available memory."""
    sizes = {}
    with open("/proc/meminfo") as file:
        for entry in file:
            key, _, value = entry.partition(":")
            sizes[key] = int(value.split()[0]) / 2**20
    return f"{sizes['MemTotal']:.1f} GiB, {sizes['MemAvailable']:.1f} GiB available"


def isa() -> str:
    """Which CPU instruction set the kernels use."""
    from treedecode import env, ops

    active, detected = ops.cpu_isa()
    compiled = ops.compiled_isas()
    requested = env.cpu_isa() or "unset"
    return f"{active} (machine: {detected}; compiled: {', '.join(compiled)}; TREEDECODE_CPU_ISA {requested})"


def gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"none usable (torch built for {torch.version.cuda or torch.version.hip or 'CPU only'})"
    return "; ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def threads() -> str:
    import torch

    return f"{torch.get_num_threads()} (torch intra-op)"


def backends() -> list[str]:
    """One line per op and device: the backend taken, and why the others were not."""
    import torch

    from treedecode import ops

    lines = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for op in ops.names():
            choice = ops.explain(op, device)
            why = "; ".join(f"not {name}: {reason}" for name, reason in choice.rejected.items())
            lines.append(f"{op} on {device}: {choice.backend} ({why})")
    return lines


def report() -> Iterator[str]:
    """The report, line by line; a part that fails says so in its line."""

    def line(name: str, function: Callable[[], Any]) -> str:
        return f"{name + ':':<14}{attempt(function)}"

    yield line("python", lambda: f"{platform.python_version()} ({platform.python_implementation()})")
    yield line("platform", lambda: f"{platform.system()} {platform.machine()}")
    for package in PACKAGES:
        yield line(package, lambda package=package: version(package))  # type: ignore[misc]
    yield line("c++", lambda: tool_version("c++", 0))
    yield line("nvcc", lambda: tool_version("nvcc", -1))
    yield line("cpu", lambda: cpu()["cpu"])
    yield line("cpu flags", lambda: " ".join(cpu()["cpu_flags"]))
    yield line("memory", memory)
    yield line("threads", threads)
    yield line("gpu", gpus)
    yield line("kernels", isa)
    lines = attempt(backends)
    yield "ops:"
    for entry in [lines] if isinstance(lines, str) else lines:
        yield f"  {entry}"


def main() -> None:
    for line in report():
        print(line, flush=True)


if __name__ == "__main__":
    main()

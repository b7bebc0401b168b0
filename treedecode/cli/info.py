"""`treedecode info`: prints the facts that a bug report needs, also when the build is broken."""

import importlib
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from treedecode.common.machine import attempt, cpu, gpus, memory, version

PACKAGES = ("treedecode", "torch", "transformers", "triton", "flash-attn", "numpy", "gguf", "vllm", "sglang", "ray")


def tool_version(name: str, line: int) -> str:
    """Returns line number `line` of `name --version`."""
    path = shutil.which(name)
    if path is None:
        return "not found"
    output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    return output.strip().splitlines()[line]


def isa() -> str:
    """Names the CPU instruction set that the kernels use, and those that they could use."""
    from treedecode import ops

    active, detected = ops.cpu_isa()
    compiled = ops.compiled_isas()
    return f"{active} (machine: {detected}; compiled: {', '.join(compiled)})"


def threads() -> str:
    """Counts the threads of torch and of the CPU kernels."""
    import torch

    from treedecode import ops

    return f"{torch.get_num_threads()} (torch intra-op), {attempt(ops.cpu_threads)} (CPU kernels)"


def variables() -> str:
    """Lists the environment variables of treedecode that are set."""
    from treedecode.common import env

    return " ".join(f"{name}={value!r}" for name, value in env.settings().items()) or "none set"


def host() -> str:
    """Says whether the host-side structures (`treedecode._host`) are in this package; fails if they do not load."""
    # looked for as a file, since the import hook of an editable install would find the checkout's
    if not any(Path(__file__).parents[1].joinpath(f"_host{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return "missing"
    importlib.import_module("treedecode._host")
    return "present"


def backends() -> list[str]:
    """Lists the backend of each op on each device, and why it is no other; ops with equal lines share them."""
    import torch

    from treedecode import ops

    groups: dict[tuple[str, ...], list[str]] = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for op in ops.names():
            choice = ops.explain(op, device)
            reasons = (f"  not {name}: {reason}" for name, reason in choice.rejected.items())
            groups.setdefault((f"{choice.backend} on {device}", *reasons), []).append(op)
    lines = []
    for (backend, *rejections), names in groups.items():
        lines += [f"{backend}: {', '.join(names)}", *rejections]
    return lines


def answers() -> str:
    """Names the method that compares answers."""
    from treedecode.tasks.answers import equivalence_backend

    return equivalence_backend()


def vllm_plugin() -> str:
    """Says whether vLLM takes treedecode's attention, and why not."""
    from treedecode.integrations.vllm.plugin import reason_against

    reason = reason_against()
    return "active" if reason is None else f"not active: {reason}"


def report() -> Iterator[str]:
    """Iterates over the lines of the report; a part that fails says so in its line."""

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
    yield line("variables", variables)
    yield line("gpu", gpus)
    yield line("_host", host)
    yield line("answers", answers)
    yield line("vllm plugin", vllm_plugin)
    yield line("kernels", isa)
    lines = attempt(backends)
    yield "ops:"
    for entry in [lines] if isinstance(lines, str) else lines:
        yield f"  {entry}"


def main() -> None:
    """Prints the report."""
    for line in report():
        print(line, flush=True)

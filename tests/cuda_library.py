"""What the tests look up in the CUDA library: whether it is built, its ops' errors, its kernels' machine code."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import treedecode
from treedecode.ops import _native

LIBRARY = Path(treedecode.__path__[0]) / "_cuda.so"
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="built without CUDA kernels (no nvcc)")


def call(op, *args):
    """Calls the CUDA implementation of `op` with tensors of any device: all of its checks run, the device's last."""
    return _native.call(getattr(torch.ops.treedecode_cuda, op).default, *args)


@functools.cache
def tool():
    """cuobjdump, of the toolkit or of Triton; None where there is none."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


def _dump(option, path):
    """cuobjdump's output for a library or cubin, and short names of its kernels, such as `_append_kv_kernel<16>`."""
    if tool() is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit's nor Triton's")
    text = subprocess.run([tool(), option, str(path)], capture_output=True, text=True, check=True).stdout
    symbols = sorted(set(re.findall(r"\b_Z\w+", text)))
    out = subprocess.run(["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    plain = re.sub(r"^void |treedecode::(cuda::)?|\(anonymous namespace\)::", "", out, flags=re.MULTILINE).split("\n")
    return text, dict(zip(symbols, plain, strict=False))


@functools.cache
def resources():
    """(kernel, "sm_80") -> registers, bytes of stack (spills, arrays outside of registers), of shared memory."""
    text, names = _dump("--dump-resource-usage", LIBRARY)
    found, arch = {}, None
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\w+):", line):
            kernel = names[match[1]]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, match.groups())
            found[kernel, arch] = {"registers": registers, "stack": stack, "shared": shared}
    return found


@functools.cache
def mnemonics(path=LIBRARY):
    """(kernel, "sm_80") -> the opcodes of its machine code, such as "HMMA.16816.F32.BF16"."""
    text, names = _dump("-sass", path)
    found, arch, kernel = {}, None, None
    for line in text.splitlines():
        if match := re.match(r"\s*code for (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\w+)", line):
            kernel = names[match[1]]
            found[kernel, arch] = set()
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", line):
            found[kernel, arch].add(match[1])
    return found

"""Looks things up in the CUDA library: if it is built, the errors of its ops, the machine code of its kernels."""

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

import treedecode
from treedecode.ops import _native

LIBRARY = Path(treedecode.__path__[0]) / "_cuda.so"
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="built without CUDA kernels (no nvcc)")


def call(op, *args):
    """Calls the CUDA implementation of `op` with tensors of any device: all its checks run, that of the device last."""
    return _native.call(getattr(torch.ops.treedecode_cuda, op).default, *args)


@functools.cache
def tool(name):
    """Returns the path of cuobjdump or nvdisasm, of the toolkit or of Triton; None where there is none."""
    path = shutil.which(name)
    if path is None:
        try:
            import triton
        except ImportError:
            return None
        of_triton = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        path = str(of_triton) if of_triton.exists() else None
    return path


def _run(name, *args, **options):
    if tool(name) is None:
        pytest.skip(f"no {name}: neither the CUDA toolkit's nor Triton's")
    return subprocess.run([tool(name), *map(str, args)], capture_output=True, text=True, check=True, **options).stdout


def _short_names(text):
    """Returns short names of the kernels whose symbols a text has, such as `_append_kv_kernel<16>`."""
    symbols = sorted(set(re.findall(r"\b_Z\w+", text)))
    out = subprocess.run(["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    plain = re.sub(r"^void |treedecode::(cuda::)?|\(anonymous namespace\)::", "", out, flags=re.MULTILINE).split("\n")
    return dict(zip(symbols, plain, strict=False))


@functools.cache
def resources():
    """Returns (kernel, "sm_80") -> registers, bytes of stack (spills, arrays not in registers) and of shared memory."""
    text = _run("cuobjdump", "--dump-resource-usage", LIBRARY)
    names = _short_names(text)
    result, arch = {}, None
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\w+):", line):
            kernel = names[match[1]]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, match.groups())
            result[kernel, arch] = {"registers": registers, "stack": stack, "shared": shared}
    return result


def mnemonics(cubin):
    """Returns (kernel, "sm_80") -> the opcodes of its machine code, such as "HMMA.16816.F32.BF16".

    `cubin` is a file NAME.ARCH.cubin, or a part of the names of those in the library.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(cubin, Path):
            files = [cubin]
        else:
            _run("cuobjdump", "-xelf", cubin, LIBRARY, cwd=folder)
            files = list(Path(folder).iterdir())
        result = {}
        for file in files:
            text, arch = _run("nvdisasm", "-c", file), file.name.split(".")[-2]
            names = _short_names(text)
            for line in text.splitlines():
                if match := re.match(r"\.text\.(\w+):", line):
                    opcodes = result[names[match[1]], arch] = set()
                elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", line):
                    opcodes.add(match[1])
    return result

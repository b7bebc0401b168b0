"""What the tests look up in the CUDA library: whether it is built, its ops' errors, its kernels' machine code."""

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
    """Calls the CUDA implementation of `op` with tensors of any device: all of its checks run, the device's last."""
    return _native.call(getattr(torch.ops.treedecode_cuda, op).default, *args)


@functools.cache
def tool(name):
    """cuobjdump or nvdisasm, of the toolkit or of Triton; None where there is none."""
    found = shutil.which(name)
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        found = str(path) if path.exists() else None
    return found


def _run(name, *args, **options):
    if tool(name) is None:
        pytest.skip(f"no {name}: neither the CUDA toolkit's nor Triton's")
    return subprocess.run([tool(name), *map(str, args)], capture_output=True, text=True, check=True, **options).stdout


def _short_names(text):
    """Short names of the kernels that a text has symbols of, such as `_append_kv_kernel<16>`."""
    symbols = sorted(set(re.findall(r"\b_Z\w+", text)))
    out = subprocess.run(["c++filt", "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    plain = re.sub(r"^void |treedecode::(cuda::)?|\(anonymous namespace\)::", "", out, flags=re.MULTILINE).split("\n")
    return dict(zip(symbols, plain, strict=False))


@functools.cache
def resources():
    """(kernel, "sm_80") -> registers, bytes of stack (spills, arrays outside of registers), of shared memory."""
    text = _run("cuobjdump", "--dump-resource-usage", LIBRARY)
    names = _short_names(text)
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


def mnemonics(cubin):
    """(kernel, "sm_80") -> the opcodes of its machine code, such as "HMMA.16816.F32.BF16".

    `cubin` is a file NAME.ARCH.cubin, or a part of the names of those in the library.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(cubin, Path):
            files = [cubin]
        else:
            _run("cuobjdump", "-xelf", cubin, LIBRARY, cwd=folder)
            files = list(Path(folder).iterdir())
        found = {}
        for file in files:
            text, arch = _run("nvdisasm", "-c", file), file.name.split(".")[-2]
            names = _short_names(text)
            for line in text.splitlines():
                if match := re.match(r"\.text\.(\w+):", line):
                    opcodes = found[names[match[1]], arch] = set()
                elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", line):
                    opcodes.add(match[1])
    return found

"""`treedecode info`: backends and their reasons, the build, and environment variables."""

import shutil
import subprocess
import sys

import pytest
from support import cuda_library

import treedecode
from treedecode import ops, triton_kernels
from treedecode.cli import main as cli
from treedecode.ops import _native


def run(*arguments, cwd=None, **variables):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=variables or None, timeout=120
    )


def test_info_says_which_backend_each_op_takes_and_why(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "failed" not in out
    lines = [line.strip() for line in out[out.index("ops:") :].splitlines()]
    entries = [i for i, line in enumerate(lines) if line.startswith("cpu on cpu: ")]  # ops with the same reasons
    taken = {i: lines[i].removeprefix("cpu on cpu: ").split(", ") for i in entries}
    assert sorted(op for group in taken.values() for op in group) == ops.names()
    for i, group in taken.items():
        has_triton = set(group) <= set(triton_kernels.OPS)
        has_cuda = "runs on cuda tensors only" if set(group) <= _native.CUDA_OPS else "has no CUDA kernel yet"
        if not cuda_library.LIBRARY.exists():
            has_cuda = "not in this build: needs the CUDA kernels"
        assert lines[i + 1] == f"not cuda: {has_cuda}"
        assert lines[i + 2] == "not triton: " + (
            "runs on cuda tensors only" if has_triton else "has no Triton kernel yet"
        )
        assert lines[i + 3].startswith("not reference: only on request")
    assert "_host:        present" in out
    assert "vllm plugin:  not active: " in out or "vllm plugin:  active" in out
    active, detected = ops.cpu_isa()
    assert f"{active} (machine: {detected}; compiled: {', '.join(ops.compiled_isas())}" in out


@pytest.mark.parametrize("library", ["missing", "broken"])
def test_info_prints_without_a_working_library(tmp_path, library):
    package = tmp_path / "treedecode"
    shutil.copytree(
        treedecode.__path__[0], package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "strategies", "models")
    )
    if library == "broken":
        (package / "_ops.so").write_bytes(b"\x7fELF nonsense")
    done = run("-m", "treedecode.cli", "info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch:        2." in done.stdout
    assert "kernels:      failed: " in done.stdout
    assert ("is not built" in done.stdout) == (library == "missing")
    assert "_host:        missing" in done.stdout


def test_a_variable_chooses_backend_and_isa():
    variables = {"OMP_NUM_THREADS": "2", "TREEDECODE_BACKEND": "reference", "TREEDECODE_CPU_ISA": "generic"}
    done = run("-m", "treedecode.cli", "info", **variables)
    assert done.returncode == 0, done.stderr
    assert "variables:    " + " ".join(f"{name}={value!r}" for name, value in variables.items()) in done.stdout
    taken = [line.strip() for line in done.stdout.splitlines() if " on cpu: " in line]
    assert sorted(op for line in taken for op in line.removeprefix("reference on cpu: ").split(", ")) == ops.names()
    assert "not cpu: TREEDECODE_BACKEND=reference is set" in done.stdout
    assert "kernels:      generic (" in done.stdout
    assert "variables:    none set" in run("-m", "treedecode.cli", "info", PATH="").stdout

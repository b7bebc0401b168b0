"""The CUDA library without a GPU: it loads and registers its ops, and its machine code keeps within a budget."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import cuda_library, paths
from support.paths import ROOT

from treedecode import ops
from treedecode.ops import _native

BUDGET = json.loads((paths.GOLDEN / "cuda_budget.json").read_text())


@cuda_library.needs_library
def test_kernels_keep_within_their_budget():
    """No kernel needs more registers than listed or uses local memory, on any architecture."""
    results = cuda_library.resources()
    assert {kernel for kernel, _ in results} == BUDGET.keys(), "tests/golden/cuda_budget.json lists other kernels"
    over = {key: use for key, use in results.items() if use["registers"] > BUDGET[key[0]] or use["stack"]}
    assert not over


def archs():
    return {arch for _, arch in cuda_library.resources()}


@cuda_library.needs_library
def test_every_kernel_is_built_for_every_architecture():
    assert cuda_library.resources().keys() == {(kernel, arch) for kernel in BUDGET for arch in archs()}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_every_name_of_ptx_compiles_to_its_instruction(arch, tmp_path):
    """The shim's own kernels use all of ptx.cuh; nvcc compiles them without a warning."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    cubin = tmp_path / f"self_test.{arch}.cubin"
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Werror=all-warnings", "-cubin", f"-arch={arch}"]
    command = [nvcc, *flags, "-o", str(cubin), str(ROOT / "tests" / "simt" / "self_test.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    opcodes = cuda_library.mnemonics(cubin)
    for dtype, suffix in (("bf16", ".BF16"), ("fp16", "")):
        of_fragments = opcodes[f"_fragments_kernel<{dtype}>", arch]
        assert {f"HMMA.16816.F32{suffix}", "LDSM.16.M88.4", "LDSM.16.MT88.4"} <= of_fragments
    of_wide = opcodes["_wide_kernel", arch]
    expected = {"LDGSTS.E.BYPASS.LTC128B.128", "LDGSTS.E.64", "SHFL.BFLY", "VOTE.ALL", "BAR.SYNC.DEFER_BLOCKING"}
    expected |= {"ACQBULK"} if arch == "sm_90a" else set()
    assert not [name for name in expected if not any(opcode.startswith(name) for opcode in of_wide)], sorted(of_wide)


@cuda_library.needs_library
@pytest.mark.parametrize("op", ["append_kv", "copy_pages"])
def test_wide_accesses(op):
    """The kernels access 16 bytes at a time where addresses allow."""
    results = [opcodes for (name, _), opcodes in cuda_library.mnemonics(op).items() if name == f"_{op}_kernel<16>"]
    assert results
    for opcodes in results:
        assert {"LDG.E.128", "STG.E.128"} <= {opcode.removesuffix(".CONSTANT") for opcode in opcodes}


@cuda_library.needs_library
def test_attention_uses_tensor_cores_and_asynchronous_copies():
    results = cuda_library.mnemonics("mma_")
    assert len(results) == sum("_tree_attention_mma_kernel" in kernel for kernel in BUDGET) * len(archs())
    for (kernel, _), opcodes in results.items():
        assert ("HMMA.16816.F32.BF16" if "bf16" in kernel else "HMMA.16816.F32") in opcodes, kernel
        assert any(name.startswith("LDGSTS.E.BYPASS") and "128" in name for name in opcodes), kernel
        assert any(name.startswith("LDSM.16.MT88.4") for name in opcodes), kernel


@cuda_library.needs_library
@pytest.mark.parametrize("op", sorted(_native.CUDA_OPS))
def test_cuda_tensors_take_the_cuda_kernel(op):
    choice = ops.explain(op, "cuda")
    assert choice.backend == "cuda"
    assert choice.rejected["cpu"] == "runs on cpu tensors only"
    assert ops.explain(op, "cpu").rejected["cuda"] == "runs on cuda tensors only"
    of_any_device = torch._C._dispatch_has_kernel_for_dispatch_key(
        f"treedecode_cuda::{op}", "CompositeExplicitAutograd"
    )
    assert of_any_device, "its argument checks cannot be tested without a GPU"


def test_a_library_that_torch_has_loaded_is_found_by_its_name():
    """The current stream is looked up in libtorch_cuda.so in this way, because its symbols are local."""
    flags = os.RTLD_NOW | os.RTLD_NOLOAD
    assert ctypes.CDLL("libtorch_cpu.so", mode=flags).aoti_torch_get_current_stream
    if torch.cuda.is_available():
        assert ctypes.CDLL("libtorch_cuda.so", mode=flags).aoti_torch_get_current_cuda_stream


def test_loading_registers_nothing_twice():
    code = "import warnings; warnings.simplefilter('error'); import treedecode.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "overrid" not in done.stderr.lower()


@pytest.mark.slow
def test_asking_for_cuda_without_nvcc_is_an_error(tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake on PATH")
    (tmp_path / "bin").mkdir()
    for program in ("c++", "g++", "cc", "gcc", "ld", "as", "ar", "ranlib", "make", "ninja", "uname"):
        if path := shutil.which(program):
            (tmp_path / "bin" / program).symlink_to(path)
    env = {"PATH": str(tmp_path / "bin"), "CUDA_PATH": str(tmp_path), "HOME": str(tmp_path)}
    options = {
        "TREEDECODE_TORCH_DIR": Path(torch.__file__).parent,
        "TREEDECODE_OUTPUT_DIR": tmp_path,
        "Python_EXECUTABLE": sys.executable,
    }
    flags = [f"-D{name}={value}" for name, value in options.items()]
    (tmp_path / "_cuda.so").touch()
    messages = {"1": "TREEDECODE_CUDA=1, but there is no working nvcc", "auto": "the CUDA kernels are left out"}
    for value, message in messages.items():
        command = [cmake, "-S", str(ROOT), "-B", str(tmp_path / value), f"-DTREEDECODE_CUDA={value}", *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert message in done.stderr
        assert (done.returncode != 0) == (value == "1")
    assert not (tmp_path / "_cuda.so").exists(), "the library of an earlier build would be loaded"

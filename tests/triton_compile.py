"""Compiles Triton kernels ahead of time for every target, without a GPU: `python triton_compile.py [op ...]`, to JSON.

A process of its own: the tests beside it run the kernels in Triton's interpreter, and a process does one or the other.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from treedecode import triton_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# Kernel -> types of its arguments by name ("*" and the dtype under test: "*T"; the other pointers point to 32-bit
# integers, and the rest are such), and the values of its constants.
KERNELS = {
    "adopt_pages": ({}, {"BLOCK": 1024}),
    "append_kv": (
        dict.fromkeys(("k_ptr", "v_ptr", "k_pages_ptr", "v_pages_ptr"), "*T")
        | {"slots_ptr": "*i64", "num_slots": "i64"},
        {"BLOCK": 1024},
    ),
    "append_slots_fill": ({"slots_ptr": "*i64", "first_slot_ptr": "*i64"}, {"BLOCK": 256}),
    "append_slots_plan": ({"first_slot_ptr": "*i64"}, {"BLOCK": 512}),
    "beam_update": (
        dict.fromkeys(("running_scores_ptr", "pool_scores_ptr", "scores_ptr", "old_scores_ptr"), "*fp32")
        | {"done_ptr": "*i1", "stop_ptr": "*i1", "penalty_bits": "i64"},
        {"EARLY_STOPPING": 2, "BLOCK": 512},
    ),
    "copy_pages": ({"kv_ptr": "*T"}, {"BLOCK": 2048}),
    "fork_branches_check": ({"last_drop_ptr": "*i64"}, {"BLOCK": 1024}),
    "fork_branches_commit": ({}, {"BLOCK": 1024}),
    "fork_branches_count": ({"last_drop_ptr": "*i64"}, {"BLOCK": 1024}),
    "fork_branches_free": ({"last_drop_ptr": "*i64"}, {"BLOCK": 1024}),
    "hold_pages": ({}, {"HOLD": False, "BLOCK": 1024}),
    "merge_states": (
        dict.fromkeys(("out_ptr", "part_out_ptr"), "*T") | {"lse_ptr": "*fp32", "part_lse_ptr": "*fp32"},
        {"BLOCK_D": 128},
    ),
    "rms_norm": (
        dict.fromkeys(("out_ptr", "x_ptr", "weight_ptr"), "*T") | {"eps": "fp32"},
        {"UNIT_OFFSET": False, "BLOCK": 4096},
    ),
    "rotary_embed": (dict.fromkeys(("q_ptr", "k_ptr", "cos_ptr", "sin_ptr"), "*T"), {"BLOCK": 64}),
}


def resources(compiled, target):
    """Registers and spilled bytes of one kernel, from the code itself."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        return {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found[1]), "stack": int(found[2])}


def kernels_of(op):
    """Every kernel in the op's module, by its name in KERNELS."""
    module = importlib.import_module(f"treedecode.triton_kernels.{op}")
    return {name[1:-7]: kernel for name, kernel in vars(module).items() if re.fullmatch(r"_\w+_kernel", name)}


def compile_one(op, kernel, target_name, dtype):
    function = kernels_of(op)[kernel]
    types, constants = KERNELS[kernel]
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*i32" if name.endswith("_ptr") else "i32").replace("T", dtype)
        for name in function.arg_names
    }
    source = ASTSource(function, signature, constexprs=constants)
    target = TARGETS[target_name]
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    return {"op": op, "kernel": kernel, "target": target_name, "dtype": dtype, "shared": compiled.metadata.shared,
            **resources(compiled, target)}  # fmt: skip


def main():
    # A kernel without "*T" is the same for each dtype: the second time it comes from Triton's cache.
    jobs = [
        (op, kernel, target, dtype)
        for dtype in ("bf16", "fp32")
        for op in sys.argv[1:] or triton_kernels.OPS
        for kernel in kernels_of(op)
        for target in TARGETS
    ]
    with ProcessPoolExecutor(2) as pool:
        json.dump(list(pool.map(compile_one, *zip(*jobs, strict=True))), sys.stdout)


if __name__ == "__main__":
    main()

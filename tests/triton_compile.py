"""Compiles every Triton kernel ahead of time for every target, without a GPU; `python triton_compile.py` prints JSON.

A process of its own: the tests beside it run the kernels in Triton's interpreter, and a process does one or the other.
"""

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

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# Kernel -> types of its arguments by name ("*" and the dtype under test: "*T"; the rest are 32-bit integers), and
# the values of its constants. triton_compile_attention.py has its own.
KERNELS = {
    "append_kv": (
        dict.fromkeys(("k_ptr", "v_ptr", "k_pages_ptr", "v_pages_ptr"), "*T")
        | {"slots_ptr": "*i64", "num_slots": "i64"},
        {"BLOCK": 1024},
    ),
    "copy_pages": (
        {"kv_ptr": "*T", "src_ptr": "*i32", "dst_ptr": "*i32", "num_tokens_ptr": "*i32"},
        {"BLOCK": 4096},
    ),
    "merge_states": (
        dict.fromkeys(("out_ptr", "part_out_ptr"), "*T")
        | {"lse_ptr": "*fp32", "part_lse_ptr": "*fp32", "indptr_ptr": "*i32"},
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


def compile_one(op, target_name, dtype):
    module = getattr(__import__(f"treedecode.triton_kernels.{op}", fromlist=[op]), f"_{op}_kernel")
    types, constants = KERNELS[op]
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32").replace("T", dtype)
        for name in module.arg_names
    }
    source = ASTSource(module, signature, constexprs=constants)
    target = TARGETS[target_name]
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    return {"op": op, "target": target_name, "dtype": dtype, "shared": compiled.metadata.shared,
            **resources(compiled, target)}  # fmt: skip


def main():
    jobs = [(op, target, dtype) for op in KERNELS for target in TARGETS for dtype in ("bf16", "fp32")]
    with ProcessPoolExecutor(2) as pool:
        json.dump(list(pool.map(compile_one, *zip(*jobs, strict=True))), sys.stdout)


if __name__ == "__main__":
    main()

"""Compiles Triton kernels for every target, without a GPU: `python triton_compile.py [op ...]` prints JSON.

A process of its own, because the tests run the kernels in Triton's interpreter, and a process can only do one of these.
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
LOGITS = {"logits_ptr": "*T"}
RANK = {"scores_ptr": "*fp32", "lse_ptr": "*fp32", "keys_ptr": "*i64",
        "refs_ptr": "*fp32", "sums_ptr": "*fp32", "cum_ptr": "*fp32"}  # fmt: skip
MERGE = {"out_scores_ptr": "*fp32", "out_parent_ptr": "*i32", "out_token_ptr": "*i32", "scores_ptr": "*fp32",
         "indptr_ptr": "*i32"}  # fmt: skip
SAMPLE = LOGITS | {
    "best_ptr": "*i64",
    "keys_ptr": "*i64", "sums_ptr": "*fp32", "log_sums_ptr": "*fp32", "masses_ptr": "*fp32", "token_ptr": "*i32",
    "logprob_ptr": "*fp32", "entropy_ptr": "*fp32", "temperature_ptr": "*fp32", "top_k_ptr": "*i32",
    "top_p_ptr": "*fp32", "min_p_ptr": "*fp32", "seed_ptr": "*i64", "position_ptr": "*i64",
}  # fmt: skip
# Kernel -> types of its arguments by name ("*T" points to the dtype under test; other pointers point to 32-bit
# integers, and other arguments are such), values of its constants, and the number of warps if not 4. A suffix after a
# slash tells apart the same kernel with other constants. tree_attention and plan_tree: triton_compile_attention.py.
KERNELS = {
    "adopt_pages": ({}, {"BLOCK": 1024}),
    "append_kv": (
        dict.fromkeys(("k_ptr", "v_ptr", "k_pages_ptr", "v_pages_ptr"), "*T")
        | {"slots_ptr": "*i64", "num_slots": "i64"},
        {"BLOCK": 1024},
    ),
    "append_slots_fill": ({"slots_ptr": "*i64", "first_slot_ptr": "*i64"}, {"BLOCK": 256}),
    "append_slots_plan": ({"first_slot_ptr": "*i64"}, {"BLOCK": 512}),
    "beam_prune_scan": (
        LOGITS | {"refs_ptr": "*fp32", "sums_ptr": "*fp32", "keys_ptr": "*i64"},
        {"maxima_ptr": None, "counts_ptr": None, "CHUNK": 4096, "SETS": 256, "SLOTS": 128},
        8,
    ),
    "beam_prune_scan/wide": (
        LOGITS | {"refs_ptr": "*fp32", "sums_ptr": "*fp32"},
        {"keys_ptr": None, "CHUNK": 4096, "SETS": 64, "SLOTS": 1024},
        8,
    ),
    "beam_prune_collect": (
        LOGITS | {"keys_ptr": "*i64"},
        {"CHUNK": 4096, "SLOTS": 1024, "BLOCK_MAXIMA": 4096},
        8,
    ),
    "beam_prune_rank": (
        RANK,
        {"counts_ptr": None, "IS_LOGPROBS": False, "SORTED": False, "RANKS": 32, "BLOCK": 1024, "CHUNKS": 32},
    ),
    "beam_prune_rank/1024": (RANK, {"IS_LOGPROBS": False, "SORTED": False, "RANKS": 1024, "BLOCK": 1024, "CHUNKS": 32}),
    "beam_prune_merge": (MERGE, {"RANKS": 32, "BEST": 32, "BLOCK": 1024}),
    "beam_prune_merge/1024": (MERGE, {"RANKS": 1024, "BEST": 1024, "BLOCK": 1024}),
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
    "sample_collect": (SAMPLE, {"CHUNK": 4096, "SLOTS": 1024, "BLOCK_MAXIMA": 4096, "FEW": 1024}, 8),
    "sample_draw": (SAMPLE, {"SHIFT": 0, "CHUNK": 4096, "CHUNKS": 32, "FEW": 1024}, 16),
    "sample_scan": (SAMPLE, {"CHUNK": 4096, "SETS": 64}, 8),
}


def resources(compiled, target):
    """Returns the registers and spilled bytes of one kernel, from its code."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        return {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(match[1]), "stack": int(match[2])}


def kernels_of(op):
    """Returns every kernel in the op's module, and its keys in KERNELS."""
    module = importlib.import_module(f"treedecode.triton_kernels.{op}")
    for name, kernel in vars(module).items():
        if re.fullmatch(r"_\w+_kernel", name):
            keys = [key for key in KERNELS if key.partition("/")[0] == name[1:-7]]
            assert keys, f"{name} of {op} is not in KERNELS"
            yield from ((kernel, key) for key in keys)


def compile_one(op, key, target_name, dtype):
    function = next(kernel for kernel, known in kernels_of(op) if known == key)
    types, constants, *warps = KERNELS[key]
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*i32" if name.endswith("_ptr") else "i32").replace("T", dtype)
        for name in function.arg_names
    }
    source = ASTSource(function, signature, constexprs=constants)
    target = TARGETS[target_name]
    compiled = triton.compile(source, target=target, options={"num_warps": warps[0] if warps else 4})
    return {"op": op, "kernel": key, "target": target_name, "dtype": dtype, "shared": compiled.metadata.shared,
            **resources(compiled, target)}  # fmt: skip


def main():
    # All targets compile bf16; one target of each maker compiles fp32, of kernels that depend on a dtype.
    jobs = [
        (op, key, target, dtype)
        for dtype, targets in (("bf16", TARGETS), ("fp32", ("sm_90", "gfx942")))
        for op in sys.argv[1:] or sorted({*triton_kernels.OPS} - {"plan_tree", "tree_attention"})
        for _, key in kernels_of(op)
        for target in targets
        if dtype == "bf16" or "*T" in KERNELS[key][0].values()
    ]
    with ProcessPoolExecutor(2) as pool:
        json.dump(list(pool.map(compile_one, *zip(*jobs, strict=True))), sys.stdout)


if __name__ == "__main__":
    main()

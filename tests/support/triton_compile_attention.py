"""Compiles tree_attention and plan_tree as `triton_compile.py` does, with the constants that their launchers choose."""

import json
import re
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
import triton
from support.triton_compile import TARGETS, resources
from triton.compiler import ASTSource

from treedecode.triton_kernels import plan_tree, row_order, tree_attention

MMA = {
    "sm_80": "mma.sync",
    "sm_90": r"wgmma.mma_async|mma.sync",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
    "gfx950": "v_mfma",
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PLAIN = {"HAS_WINDOW": False, "HAS_SOFT_CAP": False, "GROUP": 4, "NUM_HEADS": 32, "PAGE_SIZE": 16, "sinks_ptr": None}
ALL_OPTIONS = {"HAS_WINDOW": True, "HAS_SOFT_CAP": True, "GROUP": 8, "NUM_HEADS": 64, "PAGE_SIZE": 64}
CASES = [  # dtype, head_dim, packed rows, other constants
    ("bf16", 64, 128, PLAIN),
    ("bf16", 128, 128, PLAIN),
    ("bf16", 256, 128, PLAIN),
    ("bf16", 128, 128, ALL_OPTIONS),
    ("bf16", 128, 8, PLAIN),
    ("fp32", 80, 128, PLAIN),
]
PLAN_LAUNCHES = [  # kernel, BLOCK, warps
    (row_order._hash_pages_kernel, 64, 4),
    (row_order._order_rows_kernel, 256, 4),
    (row_order._common_pages_kernel, 512, 4),
    (plan_tree._nodes_kernel, 512, 4),
    (plan_tree._plan_tree_kernel, 512, 8),
]


def compile_kernel(kernel, target_name, dtype, constants, num_warps):
    values = {"out_ptr", "q_ptr", "k_pages_ptr", "v_pages_ptr"}
    floats = {"lse_ptr", "part_out_ptr", "part_lse_ptr", "sinks_ptr", "sm_scale", "logits_soft_cap"}
    longs = {"hashes_ptr", "hash_mask"}
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        element = dtype if name in values else "fp32" if name in floats else "i64" if name in longs else "i32"
        signature[name] = "*" * name.endswith("_ptr") + element
        if "stride" in name or name.endswith("_ptr"):  # as they are in tensors of their own
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    target = TARGETS[target_name]
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    text = compiled.asm["amdgcn" if target.backend == "hip" else "ptx"]
    report = {
        "target": target_name,
        "dtype": dtype,
        "shared": compiled.metadata.shared,
        "mma": len(re.findall(MMA[target_name], text)),
        "async_copies": text.count("cp.async.cg"),
        **resources(compiled, target),
    }
    if target.backend == "hip":  # the code object has the stack of called functions too
        report["stack"] = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
    return report


def compile_attention(target, dtype, head_dim, rows, constants):
    is_plain = not (constants["HAS_WINDOW"] or constants["HAS_SOFT_CAP"])
    c = tree_attention.config(head_dim, DTYPES[dtype], target, rows, is_plain)
    constants = constants | {"D": head_dim, "BLOCK_D": tree_attention.block_d(head_dim)} | tree_attention.constants(c)
    report = compile_kernel(tree_attention._tree_attention_kernel, target, dtype, constants, c.num_warps)
    return {"op": "tree_attention", "head_dim": head_dim, "stages": c.num_stages, **report}


def compile_merge(target):
    constants = {"NUM_HEADS": 32, "D": 128, "PAGE_SIZE": 16, "BLOCK_D": 128, "BLOCK_P": 8}
    report = compile_kernel(tree_attention._merge_parts_kernel, target, "bf16", constants, 1)
    return {"op": "merge_parts", **report}


def compile_plan(target, launch):
    kernel, block, num_warps = PLAN_LAUNCHES[launch]
    report = compile_kernel(kernel, target, "bf16", {"BLOCK": block}, num_warps)
    return {"op": "plan_tree", "kernel": kernel.__name__, **report}


def main():
    with ProcessPoolExecutor(2) as pool:
        jobs = [
            pool.submit(compile_attention, target, *case)
            for target in TARGETS
            for case in CASES
            if case[0] == "bf16" or target in ("sm_90", "gfx942")
        ]
        jobs += [pool.submit(compile_merge, target) for target in TARGETS]
        jobs += [pool.submit(compile_plan, target, i) for target in TARGETS for i in range(len(PLAN_LAUNCHES))]
        json.dump([job.result() for job in jobs], sys.stdout)


if __name__ == "__main__":
    main()

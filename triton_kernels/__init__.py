"""Triton kernels of the ops, for NVIDIA and AMD: one file per op, a kernel and its launcher.

A launcher takes what the op's schema says; `treedecode.ops` registers it for CUDA tensors (which is what PyTorch calls
AMD's too). It checks shapes, dtypes and strides, and reads no value: the host never waits. Imported as
`treedecode.triton_kernels`, never under its own name, which belongs to a package of triton-lang.
"""

import importlib

# Ops that have a kernel here, each in a module of its name.
OPS = ("append_kv", "copy_pages", "merge_states", "plan_tree", "rms_norm", "rotary_embed", "tree_attention")


def launcher(op: str):
    """The function that runs `op` on CUDA tensors."""
    return getattr(importlib.import_module(f"{__name__}.{op}"), op)

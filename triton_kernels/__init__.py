"""Triton kernels of the ops, for NVIDIA and AMD: one file per op, a kernel and its launcher.

A launcher takes the arguments of the op's schema. `treedecode.ops` registers it for CUDA tensors, which include those
on AMD devices. It checks shapes, dtypes and strides, and reads no values of tensors, so the host never waits. The
package is imported as `treedecode.triton_kernels`, because its own name belongs to a package of triton-lang.
"""

import functools
import importlib

import torch

# Ops that have a kernel here, each in a module of its name.
OPS = (
    "adopt_pages",
    "append_kv",
    "append_slots",
    "beam_prune",
    "beam_update",
    "copy_pages",
    "fork_branches",
    "hold_pages",
    "merge_states",
    "plan_tree",
    "rms_norm",
    "rotary_embed",
    "sample",
    "tree_attention",
)


def launcher(op: str):
    """Returns the function that runs `op` on CUDA tensors."""
    run = getattr(importlib.import_module(f"{__name__}.{op}"), op)

    @functools.wraps(run)
    def launch(*args):
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return run(*args)
        with torch.cuda.device(device):  # Triton launches on the current device, wherever the tensors are
            return run(*args)

    return launch

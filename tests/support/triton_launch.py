"""Runs every Triton kernel up to its launch, without a GPU: Triton specialises the arguments and compiles the kernel.

The launchers run as on a GPU, on CPU tensors, with a driver that names a target and starts nothing. `triton_compile.py`
passes its own signatures to the compiler; here Triton makes them from the launchers' arguments.
"""

import json
import sys
from collections import defaultdict

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.gpu import sanitize
from treedecode import triton_kernels
from treedecode.triton_kernels import tree_attention

ARCH = "sm_90"


class Driver:
    """The part of a driver that a launch needs."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", int(ARCH.removeprefix("sm_")), 32)


def main():
    driver.set_active(Driver())  # before Triton looks for a GPU's driver
    tree_attention.arch_of = lambda device: ARCH
    sanitize.default_workers = lambda device: 264
    compiled, run = defaultdict(set), JITFunction.run
    op_now = ""

    def warm_up(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[op_now].add(kernel.metadata.name)
        return kernel

    def launch(op, args):
        nonlocal op_now
        if op in triton_kernels.OPS:
            op_now = op
            triton_kernels.launcher(op)(*args)

    def launch_and_do(op, args):  # so that the history of the page ops goes on
        launch(op, args)
        getattr(torch.ops.treedecode, op)(*args)

    JITFunction.run = warm_up
    device = torch.device("cpu")
    for part in (sanitize.attention, sanitize.elementwise, sanitize.logits):
        for op, args in part(device):
            launch(op, args)
    sanitize.pages(device, launch_and_do)
    json.dump({op: sorted(names) for op, names in compiled.items()}, sys.stdout)


if __name__ == "__main__":
    main()

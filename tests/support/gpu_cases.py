"""What the tests on a GPU share: the device, moving things there, and which backend the ops' front doors take."""

import sys

import pytest
import torch

from treedecode.ops import _native

DEVICE = torch.device("cuda")
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch sees none"),
]


def on_gpu(test):
    """Marks one test as `pytestmark = GPU` marks those of a file."""
    for mark in GPU:
        test = mark(test)
    return test


def to_gpu(x):
    """`x` on the GPU with the strides it has; `.to` alone makes a slice contiguous."""
    if x is None or x._base is None:
        return x if x is None else x.to(DEVICE)
    return x._base.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


def to_cpu(tensors):
    return tuple(x.cpu() for x in tensors)


def send(monkeypatch, backend, *names):
    """The front doors of these ops call this backend's kernels from here on; skips the test where one has none."""
    from bench.gpu.backends import kernels  # not where `make sanitize` runs, which takes the marks alone

    chosen = {}
    for name in names:
        found = kernels(name, DEVICE)
        if backend not in found:
            pytest.skip(f"{name} has no {backend} kernel")
        chosen[name] = found[backend]

    def call(op, *args):
        name = op._schema.name.removeprefix("treedecode::")
        return chosen[name](*args) if name in chosen else _native.call(op, *args)

    for module in [module for name, module in sys.modules.items() if name.startswith("treedecode.ops.")]:
        if hasattr(module, "call") and module is not _native:
            monkeypatch.setattr(module, "call", call)

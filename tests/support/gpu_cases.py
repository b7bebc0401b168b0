"""Helpers of the tests on a GPU: marks, copies of tensors to it, and the backend of the ops."""

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
    """Marks a single test as `pytestmark = GPU` marks all tests of a file."""
    for mark in GPU:
        test = mark(test)
    return test


def to_gpu(x):
    """Copies `x` to the GPU with its strides; `.to` alone makes a slice contiguous."""
    if x is None or x._base is None:
        return x if x is None else x.to(DEVICE)
    return x._base.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


def to_cpu(tensors):
    return tuple(x.cpu() for x in tensors)


def send(monkeypatch, backend, *names):
    """Makes these ops call the kernels of a backend; skips the test where an op has none."""
    from bench.gpu.backends import kernels  # not at the top: `make sanitize` uses only the marks

    chosen = {}
    for name in names:
        functions = kernels(name, DEVICE)
        if backend not in functions:
            pytest.skip(f"{name} has no {backend} kernel")
        chosen[name] = functions[backend]

    def call(op, *args):
        name = op._schema.name.removeprefix("treedecode::")
        return chosen[name](*args) if name in chosen else _native.call(op, *args)

    for module in [module for name, module in sys.modules.items() if name.startswith("treedecode.ops.")]:
        if hasattr(module, "call") and module is not _native:
            monkeypatch.setattr(module, "call", call)

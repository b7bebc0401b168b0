"""Helpers of the Triton tests: launchers as ops, errors as of the native op, compilation for every target.

Importing this skips a test module where kernels cannot run in Triton's interpreter.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paths import ROOT, TESTS

from treedecode import triton_kernels
from treedecode.ops import _native

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)


IS_3_6 = triton.__version__.startswith("3.6.")  # it spills a few bytes, unlike later versions


def assert_same_error(op, good, change):
    """Asserts that the launcher takes the arguments `good`, and with `change` raises the error of the native op."""
    launch = triton_kernels.launcher(op)
    launch(*copy.deepcopy(good).values())
    args = (good | change).values()
    with pytest.raises((ValueError, TypeError)) as native:
        _native.call(getattr(torch.ops.treedecode, op).default, *args)
    with pytest.raises(native.type) as launcher:
        launch(*args)
    assert str(launcher.value) == str(native.value)


def compile_all(script, *args):
    """Returns the output of a script of this folder that compiles kernels, in a process without the interpreter."""
    path = Path(__file__).with_name(script)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, TESTS)))
    out = subprocess.run([sys.executable, path, *args], capture_output=True, text=True, env=env, check=True).stdout
    return json.loads(out)


class PageOps:
    """The page ops of `treedecode.ops`, by their launchers, as on a GPU."""

    @staticmethod
    def fork_branches(state, src, dst, lens=None):
        triton_kernels.launcher("fork_branches")(*state[:5], src, dst, lens, state.page_size)

    @staticmethod
    def append_slots(state, kv, slots, rows, q_lens=None):
        triton_kernels.launcher("append_slots")(*state[:5], kv, slots, rows, q_lens, state.page_size)

    @staticmethod
    def hold_pages(state, pages, hold=True):
        triton_kernels.launcher("hold_pages")(state.refcount, state.free_pages, state.status, pages, hold)

    @staticmethod
    def adopt_pages(state, pages, row, num_tokens):
        triton_kernels.launcher("adopt_pages")(
            state.refcount, state.page_table, state.seq_lens, state.status, pages, row, num_tokens, state.page_size
        )

"""What the tests of the Triton kernels share: they run in the interpreter, and launchers refuse what native ops do."""

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


IS_3_6 = triton.__version__.startswith("3.6.")  # spills a few bytes that later ones do not


def assert_refused_in_the_same_words(op, good, change):
    """The launcher takes the arguments `good`, and with `change` in them says what the native op says."""
    launch = triton_kernels.launcher(op)
    launch(*copy.deepcopy(good).values())
    args = (good | change).values()
    with pytest.raises((ValueError, TypeError)) as native:
        _native.call(getattr(torch.ops.treedecode, op).default, *args)
    with pytest.raises(native.type) as launcher:
        launch(*args)
    assert str(launcher.value) == str(native.value)


def compile_all(script, *args):
    """What a script of this folder prints that compiles kernels, in a process without the interpreter."""
    path = Path(__file__).with_name(script)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, TESTS)))
    out = subprocess.run([sys.executable, path, *args], capture_output=True, text=True, env=env, check=True).stdout
    return json.loads(out)

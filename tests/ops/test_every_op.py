"""Every op of the library has all parts that "adding an op" in CONTRIBUTING lists."""

import inspect
import re

import pytest
import torch
from support.paths import ROOT

from treedecode import ops, reference

SCHEMAS = (ROOT / "csrc" / "ops.cpp").read_text()


@pytest.fixture(params=ops.names())
def op(request):
    return request.param


@pytest.fixture
def family(op):
    """Returns the name that the files of an op share: its own, or that of a group such as `pages`."""
    names = [path.stem for path in (ROOT / "csrc" / "api").glob("*.cpp") if f'm.impl("{op}"' in path.read_text()]
    assert len(names) == 1, f"{op} is registered in {names} of csrc/api/"
    return names[0]


def test_schemas_are_all_here():
    assert set(re.findall(r'm\.def\(\s*"([a-z]\w*)\(', SCHEMAS)) == set(ops.names())
    assert len(ops.names()) > 0


def test_front_door(op):
    door = getattr(ops, op)
    assert op in ops.__all__
    assert len(inspect.getdoc(door)) > 80
    assert f"torch.ops.treedecode.{op}.default" in inspect.getsource(inspect.getmodule(door))


def test_reference(op):
    assert callable(getattr(reference, op))
    assert op in reference.__all__


def test_fake_kernel(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"treedecode::{op}", "Meta")


def test_cpu_kernel(op):
    assert ops.explain(op, "cpu").backend == "cpu"


def test_test_file_with_opcheck(op, family):
    text = (ROOT / "tests" / "ops" / f"test_{family}.py").read_text()
    assert re.search(rf"\bopcheck\(\s*[\w.]+\.{op}\b", text), f"no opcheck of {op}"


def test_bench_file(op, family):
    assert re.search(rf"\b{op}\b", (ROOT / "bench" / f"bench_{family}.py").read_text())


def test_documented(op):
    assert re.search(rf"^\| `{op}` \| .{{20,}} \|$", (ROOT / "docs" / "ops.md").read_text(), re.MULTILINE)

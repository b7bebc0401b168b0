"""Imports point one way, files stay readable, and only env.py reads the environment."""

import ast
import re

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "treedecode"
MODULES = {path.relative_to(ROOT): path for path in sorted([*PACKAGE.rglob("*.py"), *ROOT.glob("triton_kernels/*.py")])}

# Part of the package -> the parts it may import. A part that is not listed stands on top and may import all others.
ALLOWED = {
    "common": set(),
    "reference": set(),
    "ops": {"common", "reference", "triton_kernels"},
    "cache": {"ops", "_host"},
}


def part_of(module):
    """`ops` of treedecode/ops/sample.py."""
    return module.parts[0] if module.parts[0] == "triton_kernels" else module.parts[1].removesuffix(".py")


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports(tree):
    """Absolute dotted names imported anywhere, at run time, in a module of treedecode."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a module stands"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


def parts_imported(tree):
    return {name.split(".")[1] for name in imports(tree) if name.startswith("treedecode.")}


def reads_environment(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in ("environ", "environb", "getenv"))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_one_way(module):
    part = part_of(module)
    allowed = ALLOWED.get(part)
    if allowed is None:
        return
    known = {part_of(other) for other in MODULES} | {"_host"}
    forbidden = (parts_imported(ast.parse(MODULES[module].read_text())) & known) - allowed - {part}
    assert not forbidden, f"{module} may import {sorted(allowed) or 'nothing of treedecode'}, and imports {forbidden}"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_env_reads_the_environment(module):
    if module.name != "env.py":
        assert not list(reads_environment(ast.parse(MODULES[module].read_text())))


def test_files_stay_short():
    native = [path for end in ("cpp", "h", "cu", "cuh") for path in ROOT.glob(f"csrc/**/*.{end}")]
    paths = [*MODULES.values(), *native, *ROOT.glob("tests/simt/*"), *ROOT.glob("bench/*.py")]
    long = {str(path.relative_to(ROOT)): count for path in paths if (count := len(path.read_text().splitlines())) > 400}
    assert not long


def test_kernels_and_host_code_see_no_torch():
    for path in [*ROOT.glob("csrc/cpu/*"), *ROOT.glob("csrc/host/*")]:
        includes = re.findall(r'#include [<"]([^>"]+)', path.read_text())
        assert not [name for name in includes if name.startswith(("torch/", "ATen/", "c10/"))], path
        assert not [name for name in includes if name.startswith("../")], path
    # types, and what both sides compute alike: costs of plans, keys that order candidates, random numbers
    shared = {f"../../cpu/{name}.h" for name in ("dtypes", "keys", "philox", "plan_tree")}
    for path in ROOT.glob("csrc/cuda/*/*.*"):
        includes = set(re.findall(r'#include [<"]([^>"]+)', path.read_text()))
        assert not [name for name in includes if name.startswith(("torch/", "ATen/", "c10/"))], path
        assert {name for name in includes if name.startswith("../") and "/cpu/" in name} <= shared, path


def test_only_ptx_uses_what_the_host_shim_lacks():
    for path in {*ROOT.glob("csrc/cuda/*/*.cuh")} - {ROOT / "csrc/cuda/common/ptx.cuh"}:
        assert not re.findall(
            r"\basm\b|\b__(?:shfl|sync|ballot|cvta|ld)\w*|\bthreadIdx\b|\b__shared__\b", path.read_text()
        ), path


def test_package_imports_without_torch_or_native_code():
    top_level = ast.parse((PACKAGE / "__init__.py").read_text()).body
    eager = {name.split(".")[0] for name in imports(ast.Module([n for n in top_level if not is_type_checking(n)], []))}
    assert eager <= {"importlib", "os", "typing"}


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("import treedecode.decoding.frontier", {"decoding"}),
        ("from treedecode import ops, env", {"ops", "env"}),
        ("def f():\n    from treedecode.decoding.decoder import Decoder", {"decoding"}),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from treedecode.decoding.decoder import Decoder",
            set(),
        ),
    ],
)
def test_the_walk_sees_imports(source, parts):
    assert parts_imported(ast.parse(source)) == parts


def test_the_walk_sees_the_environment():
    assert sorted(reads_environment(ast.parse("import os\nos.environ['A']\nfrom os import getenv"))) == [2, 3]

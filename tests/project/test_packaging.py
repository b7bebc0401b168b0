"""The package and the source distribution contain every file that is opened, imported or compiled."""

import importlib.util
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from support.paths import ROOT

import treedecode
from treedecode import strategies

PACKAGE = ROOT / "treedecode"
BUILT = {".so", ".pyc"}


def files(folder):
    return {path for path in folder.rglob("*") if path.is_file() and path.suffix not in BUILT}


def test_every_file_beside_the_modules_is_package_data():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["treedecode"]
    matches = {pattern: set(PACKAGE.glob(pattern)) for pattern in patterns}
    assert all(matches.values()), matches
    data = {path for path in files(PACKAGE) if path.suffix != ".py"}
    assert len(data) > 10
    assert data == set.union(*matches.values())


def test_every_module_is_in_a_package_that_is_found():
    for module in PACKAGE.rglob("*.py"):
        assert (module.parent / "__init__.py").exists(), module
    kernels = ROOT / "triton_kernels"
    assert {path.parent for path in kernels.rglob("*.py")} == {kernels}  # setup.py names this one folder


@pytest.mark.parametrize("folder", ["csrc", "tests", "examples", "docs"])
def test_a_source_distribution_has_all_that_builds_and_tests(folder):
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    (patterns,) = (rest for kind, name, *rest in lines if (kind, name) == ("recursive-include", folder))
    missing = {path for path in files(ROOT / folder) if not any(fnmatch(path.name, one) for one in patterns)}
    assert not missing


@pytest.mark.parametrize("folder", ["tests", "bench", "docs", "examples", "csrc"])
def test_a_checkout_gives_the_package_no_further_modules(folder):
    assert (ROOT / folder).is_dir()
    assert importlib.util.find_spec(f"treedecode.{folder}") is None


def test_triton_kernels_are_found_beside_the_package():
    spec = importlib.util.find_spec("treedecode.triton_kernels")
    assert Path(spec.origin) == ROOT / "triton_kernels" / "__init__.py"
    assert not any(Path(folder) == ROOT for folder in treedecode.__path__)


def test_every_strategy_is_a_public_name():
    names = set(strategies.__all__) - {"STRATEGIES"}
    assert names <= set(treedecode.__all__)
    assert all(getattr(treedecode, name) is getattr(strategies, name) for name in names)
    for name in ("NoSuchStrategy", "solving"):
        with pytest.raises(AttributeError, match=f"module 'treedecode' has no attribute '{name}'"):
            getattr(treedecode, name)

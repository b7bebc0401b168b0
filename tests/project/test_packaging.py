"""The package and the source distribution contain every file that is opened, imported or compiled."""

import tomllib
from fnmatch import fnmatch

import pytest
from support.paths import ROOT

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


@pytest.mark.parametrize("folder", ["csrc", "tests", "examples"])
def test_a_source_distribution_has_all_that_builds_and_tests(folder):
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    (patterns,) = (rest for kind, name, *rest in lines if (kind, name) == ("recursive-include", folder))
    missing = {path for path in files(ROOT / folder) if not any(fnmatch(path.name, one) for one in patterns)}
    assert not missing

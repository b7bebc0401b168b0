"""Thin driver: CMake and ninja build the native libraries, setuptools packages what they built."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD_VARIABLES = ("TREEDECODE_CUDA", "TREEDECODE_CUDA_ARCHS")  # only the build reads them


def torch_dir() -> Path:
    """The torch package to build against.

    An isolated build hides the environment's packages from `import`, but the stable-ABI headers of the torch that is
    installed there are the ones to use: they cost no download and match what will load the library.
    """
    for name in ("platlib", "purelib"):
        candidate = Path(sysconfig.get_paths()[name]) / "torch"
        if (candidate / "include" / "torch" / "csrc" / "stable").is_dir():
            return candidate
    import torch  # not before this point: an isolated build may have none

    return Path(torch.__file__).parent


def needed(tool: str) -> str:
    # The one beside this Python first: with another CMake than last time everything would be built again, and which one
    # PATH has depends on whether the environment is activated.
    path = shutil.which(tool, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if path is None:
        sys.exit(f"no {tool}: `pip install cmake ninja pybind11`, or install without --no-build-isolation")
    return path


class CMakeBuild(build_ext):
    """Builds all native targets at once with CMake; `build_ext.extensions` only name the results."""

    def run(self) -> None:
        out = ROOT / "treedecode" if self.inplace else Path(self.build_lib).resolve() / "treedecode"
        build = ROOT / "build" / "inplace" if self.inplace else Path(self.build_temp).resolve()
        cmake, ninja = needed("cmake"), needed("ninja")
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}"]  # an isolated build's ninja is gone by the next build
        configure += [f"-DTREEDECODE_OUTPUT_DIR={out}", f"-DTREEDECODE_TORCH_DIR={torch_dir()}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        for name in BUILD_VARIABLES:  # without one CMake would go on with that of the last build
            configure += [f"-D{name}={os.environ[name]}" if name in os.environ else f"-U{name}"]
        configure += [f"-DTREEDECODE_TESTS={'ON' if self.inplace else 'OFF'}"]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        log = sys.stderr if self.verbose else subprocess.DEVNULL
        subprocess.run(configure, check=True, stdout=log)
        subprocess.run([cmake, "--build", str(build)], check=True, stdout=sys.stderr)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib).resolve() / "treedecode"
        return [str(path) for path in package.glob("_*.so")]


setup(
    # `triton_kernels` is a folder of this project, but never a package of that name: triton-lang has one.
    packages=[*find_packages(include=["treedecode*"]), "treedecode.triton_kernels"],
    package_dir={"treedecode.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("treedecode._ops", sources=[]), Extension("treedecode._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

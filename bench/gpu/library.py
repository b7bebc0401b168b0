"""Tries to load the native libraries in treedecode/ and prints a line for each: `python -m bench.gpu.library`.

A library that was built elsewhere, against the headers of a newer torch, should load: it is linked only to torch's
stable ABI. The Python module `_host` alone is bound to a version of Python. The exit status is 0 when all of them load.
"""

import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[2] / "treedecode"
LOAD = "import sys, torch; torch.ops.load_library(sys.argv[1])"


def load(library: Path) -> str | None:
    """Loads a library in a process of its own, which a bad one may take down; returns the error, if there is one."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(library)], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def main() -> int:
    hosts = [path for suffix in EXTENSION_SUFFIXES if (path := PACKAGE / f"_host{suffix}").exists()]
    libraries = [PACKAGE / "_ops.so", PACKAGE / "_cuda.so", *hosts[:1]]
    all_load = bool(hosts)
    for library in libraries:
        error = load(library) if library.exists() else "it is not there"
        print(f"{library.name} loads on torch {torch.__version__}: {'yes' if error is None else f'no ({error})'}")
        all_load &= error is None
    if not hosts:
        print(f"_host{EXTENSION_SUFFIXES[0]} is not there")
    return int(not all_load)


if __name__ == "__main__":
    sys.exit(main())

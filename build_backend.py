"""setuptools' build backend, asking for torch only where no installed torch can be built against.

`pip install .` builds in isolation. Requiring torch there would download a second copy (gigabytes of CUDA wheels by
default) although setup.py can use the headers of the one that is installed.
"""

import sysconfig
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403
from setuptools.build_meta import get_requires_for_build_editable as _editable
from setuptools.build_meta import get_requires_for_build_wheel as _wheel


def _torch() -> list[str]:
    paths = sysconfig.get_paths()
    found = any((Path(paths[name]) / "torch" / "include").is_dir() for name in ("platlib", "purelib"))
    return [] if found else ["torch>=2.11"]


def get_requires_for_build_wheel(config_settings=None):
    return _wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings=None):
    return _editable(config_settings) + _torch()

"""Loads strategies and verifiers from Python files that a command names as `FILE.py:NAME`."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

_REFERENCE = re.compile(r"(?P<path>.+\.py):(?P<name>\w+)(?::(?P<settings>.*))?", re.DOTALL)


def is_reference(text: str) -> bool:
    """Returns whether a text names an object in a Python file."""
    return _REFERENCE.fullmatch(text) is not None


def load_object(text: str, argument: str) -> tuple[Any, str]:
    """Imports the object that `FILE.py:NAME` or `FILE.py:NAME:SETTINGS` names.

    The file is run as a module of its own, which can import others from its folder.

    Args:
        argument: the one that names it.

    Returns:
        the object, and the settings ("" where there are none).

    Raises:
        ValueError: there is no such file, it cannot be imported, or it has no such name.
    """
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise ValueError(f"{argument}: expected FILE.py:NAME, got {text!r}")
    path, name = Path(match["path"]), match["name"]
    if not path.is_file():
        raise ValueError(f"{argument}: there is no file {str(path)!r}")
    module_name = f"treedecode_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    folder = str(path.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{argument}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{argument}: {path} has no {name!r}")
    return getattr(module, name), match["settings"] or ""

from collections.abc import Callable
from typing import Any

OPS: tuple[str, ...]

def launcher(op: str) -> Callable[..., Any]: ...

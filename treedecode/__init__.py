"""treedecode: decode a whole search tree for about the price of one chain."""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from treedecode import ops as ops
    from treedecode import strategies as strategies
    from treedecode import tasks as tasks
    from treedecode.budget import Budget as Budget
    from treedecode.completions import Completion as Completion
    from treedecode.decoder import Decoder as Decoder
    from treedecode.forecasting import forecast as forecast
    from treedecode.gate.model import Gate as Gate
    from treedecode.integrations.transformers import generate as generate
    from treedecode.sampling import Sampling as Sampling
    from treedecode.solving import solve as solve
    from treedecode.solving import solve_async as solve_async
    from treedecode.tasks.base import Problem as Problem
    from treedecode.tree import Frontier as Frontier

# An installed package holds the Triton kernels; a source checkout has them beside it.
_checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_checkout, "triton_kernels", "append_kv.py")):
    __path__.append(_checkout)

# Public name -> module that defines it. Loaded on first use: `python -m treedecode.collect_env` prints also where the
# native library is missing, and `import treedecode` costs nothing.
_EXPORTS: dict[str, str] = {
    "Budget": "treedecode.budget",
    "Completion": "treedecode.completions",
    "Decoder": "treedecode.decoder",
    "Frontier": "treedecode.tree",
    "Gate": "treedecode.gate.model",
    "Problem": "treedecode.tasks.base",
    "Sampling": "treedecode.sampling",
    "forecast": "treedecode.forecasting",
    "generate": "treedecode.integrations.transformers",
    "solve": "treedecode.solving",
    "solve_async": "treedecode.solving",
}
_MODULES = ("ops", "strategies", "tasks")

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"treedecode.{name}")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name[:1].isupper():  # td.TreeOfThoughts is td.strategies.TreeOfThoughts
        strategies = importlib.import_module("treedecode.strategies")
        if name in strategies.__all__:
            return getattr(strategies, name)
    raise AttributeError(f"module 'treedecode' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

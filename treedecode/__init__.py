"""treedecode: decode a whole search tree for about the price of one chain."""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from treedecode import ops as ops
    from treedecode import strategies as strategies
    from treedecode import tasks as tasks
    from treedecode.accounting.budget import Budget as Budget
    from treedecode.allocation.forecast import forecast as forecast
    from treedecode.allocation.gate import Gate as Gate
    from treedecode.decoding.decoder import Decoder as Decoder
    from treedecode.decoding.frontier import Frontier as Frontier
    from treedecode.decoding.generate import Completion as Completion
    from treedecode.engine.sampling import Sampling as Sampling
    from treedecode.integrations.transformers import generate as generate
    from treedecode.search.solve import solve as solve
    from treedecode.search.solve import solve_async as solve_async
    from treedecode.tasks.base import Problem as Problem

# An installed package holds the Triton kernels; a source checkout has them beside it.
_checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_checkout, "triton_kernels", "append_kv.py")):
    __path__.append(_checkout)

# Public name -> module that defines it. Loaded on first use: `python -m treedecode.cli.info` prints also where the
# native library is missing, and `import treedecode` costs nothing.
_EXPORTS: dict[str, str] = {
    "Budget": "treedecode.accounting.budget",
    "Completion": "treedecode.decoding.generate",
    "Decoder": "treedecode.decoding.decoder",
    "Frontier": "treedecode.decoding.frontier",
    "Gate": "treedecode.allocation.gate",
    "Problem": "treedecode.tasks.base",
    "Sampling": "treedecode.engine.sampling",
    "forecast": "treedecode.allocation.forecast",
    "generate": "treedecode.integrations.transformers",
    "solve": "treedecode.search.solve",
    "solve_async": "treedecode.search.solve",
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

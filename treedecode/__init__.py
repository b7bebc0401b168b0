"""treedecode: decode a whole search tree for about the price of one chain."""

import importlib
import os
import sys
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
    from treedecode.search.strategy import Strategy as Strategy
    from treedecode.strategies.best_of_n import BestOfN as BestOfN
    from treedecode.strategies.chain_of_thought import ChainOfThought as ChainOfThought
    from treedecode.strategies.dvts import DVTS as DVTS
    from treedecode.strategies.dynamic_allocation import DynamicAllocation as DynamicAllocation
    from treedecode.strategies.ets import ETS as ETS
    from treedecode.strategies.iterative_refinement import IterativeRefinement as IterativeRefinement
    from treedecode.strategies.mcts import MCTS as MCTS
    from treedecode.strategies.particle_filter import ParticleFilter as ParticleFilter
    from treedecode.strategies.rebase import REBASE as REBASE
    from treedecode.strategies.self_consistency import SelfConsistency as SelfConsistency
    from treedecode.strategies.step_beam_search import StepBeamSearch as StepBeamSearch
    from treedecode.strategies.tree_of_thoughts import TreeOfThoughts as TreeOfThoughts
    from treedecode.tasks.base import Problem as Problem

# Public name -> module that defines it. Loaded on first use: `treedecode info` prints also where the native
# library is missing, and `import treedecode` costs nothing.
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
    "Strategy": "treedecode.search.strategy",
    "BestOfN": "treedecode.strategies.best_of_n",
    "ChainOfThought": "treedecode.strategies.chain_of_thought",
    "DVTS": "treedecode.strategies.dvts",
    "DynamicAllocation": "treedecode.strategies.dynamic_allocation",
    "ETS": "treedecode.strategies.ets",
    "IterativeRefinement": "treedecode.strategies.iterative_refinement",
    "MCTS": "treedecode.strategies.mcts",
    "ParticleFilter": "treedecode.strategies.particle_filter",
    "REBASE": "treedecode.strategies.rebase",
    "SelfConsistency": "treedecode.strategies.self_consistency",
    "StepBeamSearch": "treedecode.strategies.step_beam_search",
    "TreeOfThoughts": "treedecode.strategies.tree_of_thoughts",
}
_MODULES = ("ops", "strategies", "tasks")

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"treedecode.{name}")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'treedecode' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_KERNELS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "triton_kernels")


class _CheckoutKernels:
    """Finds `treedecode.triton_kernels` in a source checkout, where it lies beside this package instead of within.

    The checkout itself is not on `__path__`: `treedecode.tests` and `treedecode.bench` would be importable too.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        """The spec of that one package; None for every other name."""
        if name != f"{__name__}.triton_kernels":
            return None
        from importlib.util import spec_from_file_location

        file = os.path.join(_KERNELS, "__init__.py")
        return spec_from_file_location(name, file, submodule_search_locations=[_KERNELS])


if os.path.isfile(os.path.join(_KERNELS, "append_kv.py")):  # triton-lang's package of that name has no such module
    sys.meta_path.insert(0, _CheckoutKernels)

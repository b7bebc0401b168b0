"""treedecode: decode a whole search tree for about the price of one chain."""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from treedecode import ops as ops
    from treedecode.completions import Completion as Completion
    from treedecode.decoder import Decoder as Decoder
    from treedecode.integrations.transformers import generate as generate
    from treedecode.sampling import Sampling as Sampling
    from treedecode.tree import Frontier as Frontier

# An installed package holds the Triton kernels; a source checkout has them beside it.
_checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_checkout, "triton_kernels", "append_kv.py")):
    __path__.append(_checkout)

# Public name -> module that defines it. Loaded on first use: `python -m treedecode.collect_env` prints also where the
# native library is missing, and `import treedecode` costs nothing.
_EXPORTS: dict[str, str] = {
    "Completion": "treedecode.completions",
    "Decoder": "treedecode.decoder",
    "Frontier": "treedecode.tree",
    "Sampling": "treedecode.sampling",
    "generate": "treedecode.integrations.transformers",
}

__all__ = ["__version__", "ops", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("treedecode.ops")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'treedecode' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Adapts models to the decoder, and loads them."""

import importlib
from typing import TYPE_CHECKING, Any

from treedecode.models.adapter import ModelAdapter
from treedecode.models.context import StepContext

if TYPE_CHECKING:
    from treedecode.models.loading import load_pretrained as load_pretrained
    from treedecode.models.transformers import TransformersModel as TransformersModel

# Transformers takes seconds to import, so these are imported on first use.
_LAZY = {"TransformersModel": "treedecode.models.transformers", "load_pretrained": "treedecode.models.loading"}

__all__ = ["ModelAdapter", "StepContext", "TransformersModel", "as_adapter", "load_pretrained"]


def as_adapter(model: Any) -> ModelAdapter:
    """Adapts a model of Transformers; an adapter is returned as it is.

    Raises:
        TypeError: it is neither, or an adapter that lacks members.
        ValueError: the model is not supported (the message says why).
    """
    if isinstance(model, ModelAdapter):
        return model
    if hasattr(model, "num_kv_heads"):
        members = (*ModelAdapter.__annotations__, "forward", "forward_hidden", "refresh")
        missing = [name for name in members if not hasattr(model, name)]
        raise TypeError(
            f"model: {type(model).__name__} lacks {', '.join(missing)}; inherit from treedecode.models.ModelAdapter, "
            "which has defaults"
        )
    from treedecode.models.transformers import TransformersModel  # takes seconds to import

    return TransformersModel(model)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'treedecode.models' has no attribute {name!r}")

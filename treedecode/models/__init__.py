"""Model adapters: what the decoder runs, and how models are loaded."""

from treedecode.models.loading import load_pretrained
from treedecode.models.transformers import StepContext, TransformersModel

__all__ = ["StepContext", "TransformersModel", "load_pretrained"]

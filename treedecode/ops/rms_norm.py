"""rms_norm: root-mean-square normalisation, as Transformers models round it."""

import torch
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call, register_fake


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """Computes `x / sqrt(mean(x^2) + eps)` over the last dimension, scaled by `weight`, in fp32.

    Args:
        x: `[..., size]`, fp32, bf16 or fp16, unit stride in the last dimension.
        weight: `[size]`, dtype of x.
        eps: added to the mean square.
        unit_offset: False rounds to the dtype of x, then multiplies by `weight` (Llama and most others); True
            multiplies by `1 + weight` in fp32 and rounds once (Gemma).

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        ValueError: an argument's shape, stride or value does not fit.
        TypeError: an argument's dtype does not fit.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """
    if USE_REFERENCE:
        return reference.rms_norm(x, weight, eps, unit_offset=unit_offset)
    heads = x if x.dim() == 3 else x.unsqueeze(0) if x.dim() == 2 else x.reshape(1, -1, x.shape[-1])
    out = call(torch.ops.treedecode.rms_norm.default, heads, weight, eps, unit_offset)
    return out if x.dim() == 3 else out.view(x.shape)


@register_fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    return x.new_empty(x.shape)

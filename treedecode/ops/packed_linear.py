"""packed_linear: a linear layer with weights laid out for few rows, and bias, gate and residual in one pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call, register_fake

_PANEL = 16  # neighbouring output features


def pack_weight(weight: Tensor, up: Tensor | None = None) -> Tensor:
    """Lays out `weight` for `packed_linear`: a copy, as large as the original.

    Args:
        weight: `[out_features, in_features]`, fp32, bf16 or fp16, in_features even.
        up: for a gated layer, the weight of the product that the gate scales, shaped like `weight`.

    Returns:
        `[num_panels, in_features, 16]`: output features in panels of 16 (zeros beyond out_features); gate and up
        alternate. In bf16 the two values of neighbouring in_features are next to each other.

    Raises:
        ValueError: another shape, or `up` does not fit `weight`.
    """
    if weight.dim() != 2 or 0 in weight.shape or weight.shape[1] % 2:
        raise ValueError(
            "weight: expected shape [out_features, in_features], not empty and with in_features even, got "
            f"{list(weight.shape)}"
        )
    if up is not None:
        if up.shape != weight.shape or up.dtype != weight.dtype:
            raise ValueError(f"up: expected shape and dtype of weight, got {list(up.shape)} {up.dtype}")
        return torch.stack([pack_weight(weight), pack_weight(up)], dim=1).flatten(0, 1)
    out_features, in_features = weight.shape
    panels = F.pad(weight.detach(), (0, 0, 0, -out_features % _PANEL)).view(-1, _PANEL, in_features)
    if weight.dtype == torch.bfloat16:
        pairs = panels.view(-1, _PANEL, in_features // 2, 2).transpose(1, 2)
        return pairs.reshape(-1, in_features, _PANEL)
    return panels.transpose(1, 2).contiguous()


def pack_bias(bias: Tensor, up: Tensor | None = None) -> Tensor:
    """Lays out the bias that goes with a packed weight: `[num_panels * 16]`."""
    panels = F.pad(bias.detach(), (0, -bias.shape[0] % _PANEL)).view(-1, _PANEL)
    return (panels if up is None else torch.stack([panels, pack_bias(up).view(-1, _PANEL)], dim=1)).flatten()


def packed_linear(
    x: Tensor,
    weight: Tensor,
    out_features: int,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: str = "",
) -> Tensor:
    """Computes `x @ W.T + bias + residual`, or gated `act(x @ W.T + bias) * (x @ U.T + bias_up) + residual`.

    Everything is computed in fp32 and rounded once. A row of the result does not depend on the other rows of `x`, not
    even in the last bit, nor on the number of threads.

    Args:
        x: `[num_rows, in_features]`, fp32, bf16 or fp16, unit stride in the last dimension.
        weight: `[num_panels, in_features, 16]` from `pack_weight`, dtype of x.
        out_features: of the result.
        bias: `[num_panels * 16]` from `pack_bias`, dtype of x.
        residual: `[num_rows, out_features]`, added to the result; dtype of x.
        gate: `""` for a plain layer; `"silu"` or `"gelu_tanh"` for a gated one, whose weight packs gate and up.

    Returns:
        `[num_rows, out_features]`, contiguous, dtype of x.

    Raises:
        ValueError: an argument's shape, stride or value does not fit.
        TypeError: an argument's dtype does not fit.
    """
    if USE_REFERENCE:
        return reference.packed_linear(x, weight, out_features, bias=bias, residual=residual, gate=gate)
    return call(torch.ops.treedecode.packed_linear.default, x, weight, out_features, bias, residual, gate)


@register_fake("packed_linear")
def _(x: Tensor, weight: Tensor, out_features: int, bias: Tensor | None, residual: Tensor | None, gate: str) -> Tensor:
    return x.new_empty(x.shape[0], out_features)

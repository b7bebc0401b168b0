"""Reference of rms_norm."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """See `treedecode.ops.rms_norm`."""
    exact = x.double()
    normed = exact / torch.sqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (normed * (1.0 + weight.double())).to(x.dtype)
    return (normed.to(x.dtype).double() * weight.double()).to(x.dtype)

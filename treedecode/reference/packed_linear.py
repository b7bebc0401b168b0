"""Reference of packed_linear."""

import torch
from torch import Tensor


def packed_linear(
    x: Tensor,
    weight: Tensor,
    out_features: int,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: str = "",
) -> Tensor:
    """See `treedecode.ops.packed_linear`."""
    num_panels, in_features, _ = weight.shape
    columns = torch.zeros(num_panels, 16, in_features, dtype=torch.float64)
    flat = weight.reshape(num_panels, -1).double()
    for k in range(in_features):
        for n in range(16):
            position = (k // 2 * 16 + n) * 2 + k % 2 if weight.dtype == torch.bfloat16 else k * 16 + n
            columns[:, n, k] = flat[:, position]
    y = torch.einsum("tk,pnk->tpn", x.double(), columns)
    if bias is not None:
        y = y + bias.double().view(num_panels, 16)
    if gate:
        first, up = y[:, 0::2], y[:, 1::2]
        y = (torch.nn.functional.silu(first) if gate == "silu" else _gelu_tanh(first)) * up
    y = y.flatten(1)[:, :out_features]
    if residual is not None:
        y = y + residual.double()
    return y.to(x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")

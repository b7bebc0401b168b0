"""Triton kernel of rms_norm."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from treedecode.triton_kernels import check


@triton.jit
def _rms_norm_kernel(
    out_ptr, x_ptr,  # [rows, heads, size], x with strides (row, head)
    weight_ptr,  # [size]
    x_stride_r, x_stride_h, heads, size, eps,
    UNIT_OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride_r + head * x_stride_h + i, mask=i < size, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    normed = x / tl.sqrt(tl.sum(x * x) / size + eps)
    if UNIT_OFFSET:
        out = normed * (1.0 + weight)
    else:
        out = normed.to(out_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(out_ptr + (row * heads + head) * size + i, out.to(out_ptr.dtype.element_ty), mask=i < size)


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """Launches `treedecode.ops.rms_norm`; x is `[rows, heads, size]`."""
    check.tensor(x, "x", "[num_rows, num_heads, size]", (-1, -1, -1), *check.FLOATS)
    rows, heads, size = x.shape
    check.tensor(weight, "weight", "[size]", (size,), x.dtype, contiguous=True)
    check.value(eps >= 0, "eps", "a non-negative number", eps)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        block = triton.next_power_of_2(size)
        _rms_norm_kernel[(rows, heads)](
            out, x, weight, *x.stride()[:2], heads, size, eps, UNIT_OFFSET=unit_offset, BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip
    return out

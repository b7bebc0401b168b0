"""Triton kernel of rotary_embed."""

import triton
import triton.language as tl
from torch import Tensor

from treedecode.triton_kernels import check


@triton.jit
def _rotary_embed_kernel(
    q_ptr, k_ptr,  # [num_tokens, Hq, 2 * HALF] and [num_tokens, Hk, 2 * HALF], strides (token, head)
    cos_ptr, sin_ptr,  # [num_tokens, 2 * HALF], stride (token)
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, cos_stride, sin_stride,
    Hq, HALF, BLOCK: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if head < Hq:
        x_ptr = q_ptr + token * q_stride_t + head * q_stride_h
    else:
        x_ptr = k_ptr + token * k_stride_t + (head - Hq) * k_stride_h
    i = tl.arange(0, BLOCK)
    mask = i < HALF
    a = tl.load(x_ptr + i, mask=mask).to(tl.float32)
    b = tl.load(x_ptr + HALF + i, mask=mask).to(tl.float32)
    cos_a = tl.load(cos_ptr + token * cos_stride + i, mask=mask).to(tl.float32)
    cos_b = tl.load(cos_ptr + token * cos_stride + HALF + i, mask=mask).to(tl.float32)
    sin_a = tl.load(sin_ptr + token * sin_stride + i, mask=mask).to(tl.float32)
    sin_b = tl.load(sin_ptr + token * sin_stride + HALF + i, mask=mask).to(tl.float32)
    tl.store(x_ptr + i, (a * cos_a - b * sin_a).to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(x_ptr + HALF + i, (b * cos_b + a * sin_b).to(q_ptr.dtype.element_ty), mask=mask)


def rotary_embed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Launches `treedecode.ops.rotary_embed`."""
    check.tensor(q, "q", "[num_tokens, num_qo_heads, head_dim]", (-1, -1, -1), *check.FLOATS)
    num_tokens, num_qo_heads, head_dim = q.shape
    check.value(head_dim % 2 == 0, "q", "an even head_dim", head_dim)
    check.tensor(k, "k", "[num_tokens, num_kv_heads, head_dim]", (num_tokens, -1, head_dim), q.dtype)
    check.tensor(cos, "cos", "[num_tokens, head_dim]", (num_tokens, head_dim), q.dtype)
    check.tensor(sin, "sin", "[num_tokens, head_dim]", (num_tokens, head_dim), q.dtype)
    if num_tokens == 0:
        return
    _rotary_embed_kernel[(num_tokens, num_qo_heads + k.shape[1])](
        q, k, cos, sin, *q.stride()[:2], *k.stride()[:2], cos.stride(0), sin.stride(0), num_qo_heads, head_dim // 2,
        BLOCK=triton.next_power_of_2(head_dim // 2), num_warps=1,
    )  # fmt: skip

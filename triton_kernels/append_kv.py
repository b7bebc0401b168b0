"""Triton kernel of append_kv."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from treedecode.triton_kernels import check


@triton.jit
def _append_kv_kernel(
    k_ptr, v_ptr,  # [num_tokens, H, D], strides (token, head) in k_strides and v_strides
    k_pages_ptr, v_pages_ptr,  # [num_pages, page_size, H, D], strides (page, token, head)
    slots_ptr,  # [num_tokens] int64
    k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    kp_stride_p, kp_stride_t, kp_stride_h, vp_stride_p, vp_stride_t, vp_stride_h,
    num_slots, page_size, H, D,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head, d = i // D, i % D
    page, offset = slot // page_size, slot % page_size
    mask = i < tl.where(slot >= 0, tl.where(slot < num_slots, H * D, 0), 0)
    k = tl.load(k_ptr + token * k_stride_t + head * k_stride_h + d, mask=mask)
    v = tl.load(v_ptr + token * v_stride_t + head * v_stride_h + d, mask=mask)
    tl.store(k_pages_ptr + page * kp_stride_p + offset * kp_stride_t + head * kp_stride_h + d, k, mask=mask)
    tl.store(v_pages_ptr + page * vp_stride_p + offset * vp_stride_t + head * vp_stride_h + d, v, mask=mask)


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Launches `treedecode.ops.append_kv`. A slot beyond the pages is skipped, because the host does not read slots."""
    check.tensor(k, "k", "[num_tokens, num_kv_heads, head_dim]", (-1, -1, -1), *check.FLOATS)
    num_tokens, num_heads, head_dim = k.shape
    check.tensor(v, "v", "the shape of k", tuple(k.shape), k.dtype)
    text = "[num_pages, page_size, num_kv_heads, head_dim]"
    check.tensor(k_pages, "k_pages", text, (-1, -1, num_heads, head_dim), k.dtype)
    check.tensor(v_pages, "v_pages", text, (-1, -1, num_heads, head_dim), k.dtype)
    check.tensor(v_pages, "v_pages", "the shape of k_pages", tuple(k_pages.shape), k.dtype)
    check.tensor(slots, "slots", "[num_tokens]", (num_tokens,), torch.int64, contiguous=True)
    if num_tokens == 0:
        return
    block = min(1024, triton.next_power_of_2(num_heads * head_dim))
    _append_kv_kernel[(num_tokens, triton.cdiv(num_heads * head_dim, block))](
        k, v, k_pages, v_pages, slots, *k.stride()[:2], *v.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
        k_pages.shape[0] * k_pages.shape[1], k_pages.shape[1], num_heads, head_dim, BLOCK=block, num_warps=4,
    )  # fmt: skip

"""Triton kernel of copy_pages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from treedecode.triton_kernels import check


@triton.jit(do_not_specialize=["n"])
def _copy_pages_kernel(
    kv_ptr,  # [num_layers, 2, num_pages, H, page_size, D], strides (layer, k or v, page)
    src_ptr, dst_ptr, num_tokens_ptr,  # [n] int32; num_tokens may be null
    num_copies_ptr,  # [1] int32, copies to make, the first of the n; null = all
    n, stride_l, stride_kv, stride_p, page_size, H, D,
    BLOCK: tl.constexpr,
):  # fmt: skip
    layer, kv = tl.program_id(1) // 2, tl.program_id(1) % 2
    base = kv_ptr + layer.to(tl.int64) * stride_l + kv * stride_kv
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if num_copies_ptr is not None:
        n = tl.load(num_copies_ptr)
    for copy in range(tl.program_id(0), n, tl.num_programs(0)):
        src, dst = tl.load(src_ptr + copy).to(tl.int64), tl.load(dst_ptr + copy).to(tl.int64)
        len = page_size
        if num_tokens_ptr is not None:
            len = tl.load(num_tokens_ptr + copy)
        len = tl.where(dst >= 0, len, 0)
        mask = (i < H * page_size * D) & ((i // D) % page_size < len)
        tl.store(base + dst * stride_p + i, tl.load(base + src * stride_p + i, mask=mask), mask=mask)


def check_kv(kv: Tensor, page_size: int = -1) -> None:
    """Checks a cache of pages.

    Raises:
        ValueError: another shape, or pages that are not contiguous; the message names the argument.
    """
    text = "[num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]"
    check.tensor(kv, "kv", text, (-1, 2, -1, -1, page_size, -1), kv.dtype)
    if kv.numel() and not kv[0, 0, 0].is_contiguous():
        raise ValueError("kv: expected each page's [num_kv_heads, page_size, head_dim] to be contiguous")


def launch(kv: Tensor, src: Tensor, dst: Tensor, num_tokens: Tensor | None, num_copies: Tensor | None = None) -> None:
    """Makes the first `num_copies[0]` copies; None = all."""
    num_layers, _, _, num_heads, page_size, head_dim = kv.shape
    n, size = src.shape[0], num_heads * page_size * head_dim
    if n == 0 or kv.numel() == 0:
        return
    block = min(2048, triton.next_power_of_2(size))
    # Only the device knows num_copies, which is mostly small: with a program for each of the n, most would do nothing.
    width = n if num_copies is None else min(n, 16)
    _copy_pages_kernel[(width, 2 * num_layers, triton.cdiv(size, block))](
        kv, src, dst, num_tokens, num_copies, n, *kv.stride()[:3], page_size, num_heads, head_dim,
        BLOCK=block, num_warps=4,
    )  # fmt: skip


def copy_pages(kv: Tensor, src: Tensor, dst: Tensor, num_tokens: Tensor | None) -> None:
    """Launches `treedecode.ops.copy_pages`. Page ids and lengths are not checked."""
    check_kv(kv)
    check.tensor(src, "src", "[n]", (-1,), torch.int32, contiguous=True)
    for indices, name in ((dst, "dst"), (num_tokens, "num_tokens")):
        if indices is not None:
            check.tensor(indices, name, "the shape of src", tuple(src.shape), torch.int32, contiguous=True)
    launch(kv, src, dst, num_tokens)

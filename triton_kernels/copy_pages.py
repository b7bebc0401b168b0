import torch
import triton
import triton.language as tl
from torch import Tensor

from treedecode.triton_kernels import check


@triton.jit
def _copy_pages_kernel(
    kv_ptr,  # [num_layers, 2, num_pages, H, page_size, D], strides (layer, k or v, page)
    src_ptr, dst_ptr, num_tokens_ptr,  # [n] int32; num_tokens may be null
    stride_l, stride_kv, stride_p, page_size, H, D,
    BLOCK: tl.constexpr,
):  # fmt: skip
    copy, layer, kv = tl.program_id(0), tl.program_id(1) // 2, tl.program_id(1) % 2
    src, dst = tl.load(src_ptr + copy).to(tl.int64), tl.load(dst_ptr + copy).to(tl.int64)
    len = page_size
    if num_tokens_ptr is not None:
        len = tl.load(num_tokens_ptr + copy)
    base = kv_ptr + layer.to(tl.int64) * stride_l + kv * stride_kv
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    len = tl.where(dst >= 0, len, 0)
    kept = (i < H * page_size * D) & ((i // D) % page_size < len)
    tl.store(base + dst * stride_p + i, tl.load(base + src * stride_p + i, mask=kept), mask=kept)


def copy_pages(kv: Tensor, src: Tensor, dst: Tensor, num_tokens: Tensor | None) -> None:
    """See `treedecode.ops.copy_pages`; page ids and lengths are not looked at."""
    text = "[num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]"
    check.tensor(kv, "kv", text, (-1, 2, -1, -1, -1, -1), kv.dtype)
    if not kv[:1, :1, :1].is_contiguous():
        raise ValueError("kv: expected each page's [num_kv_heads, page_size, head_dim] to be contiguous")
    check.tensor(src, "src", "[n]", (-1,), torch.int32, contiguous=True)
    for indices, name in ((dst, "dst"), (num_tokens, "num_tokens")):
        if indices is not None:
            check.tensor(indices, name, "the shape of src", tuple(src.shape), torch.int32, contiguous=True)
    num_layers, _, _, num_heads, page_size, head_dim = kv.shape
    if src.shape[0] == 0:
        return
    size = num_heads * page_size * head_dim
    block = min(4096, triton.next_power_of_2(size))
    _copy_pages_kernel[(src.shape[0], 2 * num_layers, triton.cdiv(size, block))](
        kv, src, dst, num_tokens, *kv.stride()[:3], page_size, num_heads, head_dim, BLOCK=block, num_warps=4
    )

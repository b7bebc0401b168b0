import pytest
import torch

from treedecode import ops


@pytest.mark.parametrize("num_tokens", [64, 4096], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_append_kv(compare, dtype, num_tokens):
    num_pages, page_size, num_kv_heads, head_dim = 2048, 16, 8, 128
    k, v = torch.randn(2, num_tokens, num_kv_heads, head_dim).to(dtype)
    pages = torch.zeros(2, num_pages, num_kv_heads, page_size, head_dim, dtype=dtype)
    k_pages, v_pages = pages.transpose(2, 3)
    slots = torch.randperm(num_pages * page_size)[:num_tokens]
    page, offset = slots // page_size, slots % page_size

    flat = torch.zeros(2, num_pages * page_size, num_kv_heads, head_dim, dtype=dtype)

    def index_put():
        k_pages.index_put_((page, offset), k)
        v_pages.index_put_((page, offset), v)

    def index_copy():
        flat[0].index_copy_(0, slots, k)
        flat[1].index_copy_(0, slots, v)

    compare(
        lambda: ops.append_kv(k, v, k_pages, v_pages, slots),
        {"index_put": index_put, "index_copy (NHD cache)": index_copy},
        num_bytes=2 * 2 * k.nbytes,  # K and V, read and written
        dtype=dtype,
    )

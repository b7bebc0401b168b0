"""The CUDA kernel of append_kv, run on the host."""

import pytest
import torch
from support import simt_kernels as simt
from support.gpu_cases import on_gpu

from treedecode import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def strides(tensor, n):
    return tuple(stride * tensor.element_size() for stride in tensor.stride()[:n])


def append_kv(k, v, k_pages, v_pages, slots, **options):
    num_pages, page_size, num_kv_heads, head_dim = k_pages.shape
    simt.run(
        "append_kv",
        k=k, v=v, k_pages=k_pages, v_pages=v_pages, slots=slots, num_tokens=len(slots),
        num_slots=num_pages * page_size, num_kv_heads=num_kv_heads, head_bytes=head_dim * k.element_size(),
        page_size=page_size, k_stride=strides(k, 2), v_stride=strides(v, 2), k_page_stride=strides(k_pages, 3),
        v_page_stride=strides(v_pages, 3), **options,
    )  # fmt: skip


# head_dim 24, 6, 3 and an odd offset: words of 16, 4, 2 bytes, or all down to one element
@pytest.mark.parametrize("head_dim", [24, 6, 3])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype, layout, head_dim):
    torch.manual_seed(0)
    num_kv_heads, num_tokens = 3, 57
    qkv = torch.randn(num_tokens, 3 * num_kv_heads, head_dim).to(dtype)
    _, k, v = qkv.split(num_kv_heads, dim=1)
    shape = (9, 8, num_kv_heads, head_dim) if layout == "NHD" else (9, num_kv_heads, 8, head_dim)
    got, want = ([torch.full(shape, 7.0, dtype=dtype) for _ in "kv"] for _ in "ab")
    if layout == "HND":
        got, want = ([pages.transpose(1, 2) for pages in pair] for pair in (got, want))
    slots = torch.randperm(72)[:num_tokens]
    slots[[0, 5]] = -1
    reference.append_kv(k, v, *want, slots)
    slots[5] = 72  # beyond the pages: the host does not check slots
    for seed in simt.SEEDS:
        append_kv(k, v, *got, slots, seed=seed)
        assert all(map(torch.equal, got, want))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_device(dtype):
    assert ops.explain("append_kv", "cuda").backend == "cuda"
    torch.manual_seed(0)
    k, v = torch.randn(2, 57, 8, 128).to(dtype)
    got, want = torch.full((2, 2, 9, 8, 8, 128), 7.0, dtype=dtype).transpose(3, 4).unbind()
    slots = torch.randperm(72)[:57]
    slots[[0, 5]] = -1
    reference.append_kv(k, v, *want, slots)
    pages = got.cuda()
    ops.append_kv(k.cuda(), v.cuda(), *pages, slots.cuda())
    assert torch.equal(pages.cpu(), want)


def test_a_token_wider_than_a_block():
    k, v = torch.randn(2, 2, 5, 700)
    pages = torch.zeros(2, 1, 4, 5, 700)
    append_kv(k, v, *pages.unbind(), torch.tensor([3, 0]))
    assert torch.equal(pages[0, 0, [3, 0]], k)
    assert torch.equal(pages[1, 0, [3, 0]], v)


def test_nothing_to_write():
    k = torch.zeros(0, 2, 8)
    append_kv(k, k, torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8), torch.zeros(0, dtype=torch.int64))

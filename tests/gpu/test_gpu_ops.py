"""The small ops on CUDA tensors by every backend, with the CPU tests' inputs and budgets; and the backend taken."""

import pytest
import torch
from support.gpu_cases import DEVICE, GPU, to_cpu, to_gpu
from support.merge_states_cases import assert_within_budget, random_parts
from support.page_cases import make_pages

from treedecode import ops, reference, triton_kernels

pytestmark = GPU
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU_ONLY = {"decoder_forward", "packed_linear"}  # weights in an order that is for CPUs


@pytest.mark.parametrize("op", ops.names())
def test_backend_taken(op):
    """C++ is taken where it has a kernel, else Triton, with a reason for each backend that was not."""
    choice = ops.explain(op, "cuda")
    expected = "triton" if op in triton_kernels.OPS else "none"
    if hasattr(torch.ops, "treedecode_cuda") and hasattr(torch.ops.treedecode_cuda, op):
        expected = "cuda"
    assert choice.backend == expected
    assert (choice.backend == "none") == (op in CPU_ONLY)
    assert set(choice.rejected) == {"cuda", "triton", "cpu", "reference"} - {choice.backend}
    assert all(choice.rejected.values())


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_kv(through, dtype, page_size, layout):
    through("append_kv")
    torch.manual_seed(0)
    _, k, v = torch.randn(150, 9, 24).to(dtype).split(3, dim=1)
    slots = torch.randperm(160 * page_size)[:150]
    slots[[3, 77]] = -1
    want = [make_pages(160, page_size, 3, 24, dtype, layout) for _ in "kv"]
    got = [to_gpu(make_pages(160, page_size, 3, 24, dtype, layout)) for _ in "kv"]
    ops.append_kv(to_gpu(k), to_gpu(v), *got, slots.to(DEVICE))
    reference.append_kv(k, v, *want, slots)
    assert all(map(torch.equal, to_cpu(got), want))


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize(("page_size", "head_dim"), [(1, 8), (4, 24), (16, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_pages(through, dtype, page_size, head_dim, some):
    through("copy_pages")
    torch.manual_seed(0)
    want = torch.randn(3, 2, 9, 2, page_size, head_dim).to(dtype)
    got = want.to(DEVICE, copy=True)
    ids = torch.tensor([[0, 3, 4, 8], [1, -1, 7, 2]], dtype=torch.int32)
    num_tokens = torch.tensor([page_size, 1, 0, page_size // 2], dtype=torch.int32) if some else None
    ops.copy_pages(got, *ids.to(DEVICE), to_gpu(num_tokens))
    reference.copy_pages(want, *ids, num_tokens)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(9, 64), (16, 72), (3, 257), (32, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_states(through, dtype, num_heads, head_dim):
    through("merge_states")
    torch.manual_seed(0)
    parts = random_parts([3, 1, 0, 17, 2, 0, 5, 1], num_heads, head_dim, dtype)
    got = ops.merge_states(*map(to_gpu, parts))
    assert_within_budget(to_cpu(got), *parts)
    assert all(map(torch.equal, got, ops.merge_states(*map(to_gpu, parts))))


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("size", [7, 128, 576, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(through, dtype, size, unit_offset):
    through("rms_norm")
    torch.manual_seed(0)
    x = (torch.randn(5, 4, size + 3) * 3).to(dtype)[:, 1:, 2 : 2 + size]
    weight = torch.randn(size).to(dtype)
    got = ops.rms_norm(to_gpu(x), weight.to(DEVICE), 1e-5, unit_offset=unit_offset).cpu()
    want = reference.rms_norm(x.double(), weight.double(), 1e-5, unit_offset=unit_offset)
    assert got.dtype == dtype
    # as for the CPU: one rounding of the result, and without unit_offset one of the normed value
    half_ulp = torch.finfo(dtype).eps / 2
    budget = (half_ulp * (1 if unit_offset else 2.01) + 1e-6) * want.abs() + torch.finfo(dtype).smallest_normal
    assert ((got.double() - want).abs() <= budget).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_embed(through, dtype):
    through("rotary_embed")
    torch.manual_seed(0)
    qkv, cos, sin = torch.randn(40, 7, 64).to(dtype), *torch.randn(2, 40, 64).to(dtype)
    want, got = qkv.clone(), qkv.to(DEVICE, copy=True)
    ops.rotary_embed(got[:, :4], got[:, 4:6], cos.to(DEVICE), sin.to(DEVICE))
    reference.rotary_embed(want[:, :4], want[:, 4:6], cos, sin)
    # a cos - b sin may cancel: an ulp of each product, not of the result
    ulp = torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.cpu(), want, rtol=2 * torch.finfo(dtype).eps, atol=8 * ulp)
    assert torch.equal(got[:, 6].cpu(), qkv[:, 6])

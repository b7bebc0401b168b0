"""Triton kernels without a GPU: in the interpreter against the reference, and compiled for every target."""

import pytest
import torch
from support.merge_states_cases import assert_within_budget, random_parts
from support.triton_cases import IS_3_6, assert_same_error, compile_all

from treedecode import ops, reference, triton_kernels
from treedecode.ops import _native

# The interpreter multiplies bf16 as raw bits and cuts digits off when it rounds to bf16, so the kernels are run in
# fp32 and fp16 here, and compiled for bf16 below.
DTYPES = [torch.float32, torch.float16]
STACK = {"beam_prune_rank": 24, "beam_prune_merge": 8, "sample_draw": 32} if IS_3_6 else {}  # bytes


@pytest.fixture(scope="module")
def compiled():
    """Returns the report of the compiler on every kernel on every target, a row each."""
    return compile_all("triton_compile.py")


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted({*triton_kernels.OPS} - {"plan_tree", "tree_attention"}))
def test_compiles_for_every_target_without_spills(compiled, op):
    rows = [row for row in compiled if row["op"] == op]
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942", "gfx950"}
    for row in rows:
        assert row.get("stack", 0) <= STACK.get(row["kernel"], 0), row
        assert row.get("vgpr_spill_count", 0) == 0, row
        assert row.get("registers", row.get("vgpr_count")) <= 128, row
        assert row["shared"] <= 64 << 10, row


@pytest.mark.slow
def test_every_launcher_reaches_the_compiler():
    """The compiler gets the arguments as in a launch, with tuples and functions among the constants."""
    assert compile_all("triton_launch.py").keys() == {*triton_kernels.OPS}


@pytest.mark.parametrize("op", triton_kernels.OPS)
def test_backend_of_cuda_tensors(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"treedecode::{op}", "CUDA")
    choice = ops.explain(op, "cuda")
    if op in _native.CUDA_OPS:
        assert (choice.backend, choice.rejected["triton"]) == ("cuda", "the CUDA kernel goes first")
    else:
        assert choice.backend == "triton"
    assert choice.rejected["cpu"] == "runs on cpu tensors only"
    assert ops.explain(op, "cpu").rejected["triton"] == "runs on cuda tensors only"


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_kv(dtype, layout):
    torch.manual_seed(0)
    _, k, v = torch.randn(9, 9, 24).to(dtype).split(3, dim=1)
    shape = (7, 4, 3, 24) if layout == "NHD" else (7, 3, 4, 24)
    got, want = ([torch.full(shape, 7.0, dtype=dtype) for _ in "kv"] for _ in "ab")
    if layout == "HND":
        got, want = ([pages.transpose(1, 2) for pages in pair] for pair in (got, want))
    slots = torch.randperm(28)[:9]
    slots[[0, 5]] = -1
    triton_kernels.launcher("append_kv")(k, v, *got, slots)
    reference.append_kv(k, v, *want, slots)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_pages(dtype, some):
    torch.manual_seed(0)
    got = torch.randn(2, 2, 9, 3, 4, 8).to(dtype)
    want = got.clone()
    src, dst = torch.tensor([0, 3, 4, 8], dtype=torch.int32), torch.tensor([1, -1, 7, 2], dtype=torch.int32)
    num_tokens = torch.tensor([4, 2, 0, 3], dtype=torch.int32) if some else None
    triton_kernels.launcher("copy_pages")(got, src, dst, num_tokens)
    reference.copy_pages(want, src, dst, num_tokens)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_states(dtype):
    torch.manual_seed(0)
    for head_dim in (24, 300):
        parts = random_parts([3, 1, 0, 5, 2], 3, head_dim, dtype, empty=0.3)
        assert_within_budget(triton_kernels.launcher("merge_states")(*parts), *parts)
    nan = (torch.zeros(2, 1, 8), torch.tensor([[torch.nan], [1.0]]), torch.tensor([0, 2], dtype=torch.int32))
    out, lse = triton_kernels.launcher("merge_states")(*nan)
    assert out.isnan().all()
    assert lse.isnan().all()


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype, unit_offset):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 96).to(dtype)[:, 1:4], torch.randn(96).to(dtype)
    got = triton_kernels.launcher("rms_norm")(x, weight, 1e-5, unit_offset)
    want = reference.rms_norm(x, weight, 1e-5, unit_offset=unit_offset)
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_embed(dtype):
    torch.manual_seed(0)
    qkv, cos, sin = torch.randn(4, 7, 24).to(dtype), *torch.randn(2, 4, 24).to(dtype)
    want = qkv.clone()
    triton_kernels.launcher("rotary_embed")(qkv[:, :4], qkv[:, 4:6], cos, sin)
    reference.rotary_embed(want[:, :4], want[:, 4:6], cos, sin)
    # a cos - b sin may cancel: an ulp of each product, not of the result
    ulp = torch.finfo(torch.float32).eps
    torch.testing.assert_close(qkv, want, rtol=2 * torch.finfo(dtype).eps, atol=8 * ulp)
    assert torch.equal(qkv[:, 6], want[:, 6])


BAD = {
    "append_kv": [
        {"v": torch.zeros(5, 2, 9)}, {"k": torch.zeros(5, 2, 8).double()}, {"k": torch.zeros(5, 2)},
        {"v": torch.zeros(5, 2, 16)[..., ::2]}, {"slots": torch.arange(5).int()}, {"slots": torch.arange(10)[::2]},
        {"slots": torch.arange(4)}, {"k_pages": torch.zeros(4, 4, 3, 8)}, {"v_pages": torch.zeros(5, 4, 2, 8)},
    ],
    "merge_states": [
        {"part_out": torch.zeros(3, 2)}, {"part_lse": torch.zeros(3, 3)}, {"part_lse": torch.zeros(3, 2).half()},
        {"merge_indptr": torch.zeros(2)}, {"merge_indptr": torch.zeros(0, dtype=torch.int32)},
    ],
    "rms_norm": [
        {"x": torch.zeros(2, 8)}, {"weight": torch.zeros(7)}, {"weight": torch.zeros(8).half()}, {"eps": -1.0},
    ],
    "rotary_embed": [
        {"q": torch.zeros(3, 2, 7)}, {"k": torch.zeros(4, 2, 8)}, {"k": torch.zeros(3, 2, 8).half()},
        {"cos": torch.zeros(3, 4)}, {"sin": torch.zeros(3, 8).bfloat16()},
    ],
    "copy_pages": [
        {"kv": torch.zeros(1, 3, 4, 2, 4, 8)}, {"src": torch.zeros(2)}, {"dst": torch.zeros(3, dtype=torch.int32)},
        {"num_tokens": torch.zeros(2)}, {"kv": torch.zeros(1, 2, 4, 4, 2, 8).transpose(3, 4)},
    ],
}  # fmt: skip


def good_arguments(op):
    ids = torch.tensor([0, 1], dtype=torch.int32)
    return {
        "append_kv": {"k": torch.zeros(5, 2, 8), "v": torch.zeros(5, 2, 8), "k_pages": torch.zeros(4, 4, 2, 8),
                      "v_pages": torch.zeros(4, 4, 2, 8), "slots": torch.arange(5)},
        "merge_states": {"part_out": torch.zeros(3, 2, 8), "part_lse": torch.zeros(3, 2), "merge_indptr": ids},
        "rms_norm": {"x": torch.zeros(2, 3, 8), "weight": torch.zeros(8), "eps": 1e-5, "unit_offset": False},
        "rotary_embed": {"q": torch.zeros(3, 4, 8), "k": torch.zeros(3, 2, 8), "cos": torch.zeros(3, 8),
                         "sin": torch.zeros(3, 8)},
        "copy_pages": {"kv": torch.zeros(1, 2, 4, 2, 4, 8), "src": ids, "dst": ids + 2, "num_tokens": None},
    }[op]  # fmt: skip


@pytest.mark.parametrize(("op", "change"), [(op, change) for op in BAD for change in BAD[op]])
def test_same_errors_as_the_native_op(op, change):
    assert_same_error(op, good_arguments(op), change)

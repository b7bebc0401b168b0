import pytest
import torch
from support.page_cases import make_pages

from treedecode import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype, page_size, layout):
    torch.manual_seed(0)
    num_pages, num_kv_heads, head_dim, num_tokens = 160, 3, 24, 150
    qkv = torch.randn(num_tokens, 3 * num_kv_heads, head_dim, dtype=dtype)
    _, k, v = qkv.split(num_kv_heads, dim=1)  # strided, as a fused projection leaves them
    slots = torch.randperm(num_pages * page_size)[:num_tokens]
    slots[[3, 77]] = -1
    got, want = ([make_pages(num_pages, page_size, num_kv_heads, head_dim, dtype, layout) for _ in "kv"] for _ in "ab")
    ops.append_kv(k, v, *got, slots)
    reference.append_kv(k, v, *want, slots)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_opcheck():
    k, v = torch.randn(2, 5, 2, 8)
    pages = torch.zeros(2, 4, 4, 2, 8)
    torch.library.opcheck(torch.ops.treedecode.append_kv, (k, v, *pages.unbind(), torch.arange(5)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v": torch.zeros(5, 2, 9)}, ValueError, r"v: expected shape the shape of k = \[5, 2, 8\], got \[5, 2, 9\]"),
        ({"k": torch.zeros(5, 2, 8, dtype=torch.float64)}, TypeError, "k: expected dtype float32, bfloat16 or float16"),
        ({"slots": torch.arange(5, dtype=torch.int32)}, TypeError, "slots: expected dtype int64, got int32"),
        (
            {"slots": torch.tensor([0, 1, 2, 3, 16])},
            ValueError,
            "slots: expected values below .* = 16, got 16 at index 4",
        ),
        ({"k_pages": torch.zeros(4, 4, 3, 8)}, ValueError, "k_pages: expected shape"),
    ],
)
def test_bad_arguments_write_nothing(change, error, message):
    args = {
        "k": torch.ones(5, 2, 8),
        "v": torch.ones(5, 2, 8),
        "k_pages": torch.zeros(4, 4, 2, 8),
        "v_pages": torch.zeros(4, 4, 2, 8),
        "slots": torch.arange(5),
    } | change
    with pytest.raises(error, match=message):
        ops.append_kv(**args)
    if "slots" in change and error is ValueError:
        with pytest.raises(ValueError, match="slots: expected values below 16"):
            reference.append_kv(**args)
    assert not args["k_pages"].any()
    assert not args["v_pages"].any()


def test_a_meta_tensor_among_others_is_refused():
    """With one meta tensor the dispatcher would take the fake kernel, which writes nothing."""
    k, pages = torch.ones(2, 1, 8), torch.zeros(2, 4, 1, 8)
    with pytest.raises(ValueError, match="append_kv: expected tensors on one device, got cpu and meta"):
        ops.append_kv(k.to("meta"), k, pages, pages.clone(), torch.arange(2))
    meta = pages.to("meta")
    ops.append_kv(k.to("meta"), k.to("meta"), meta, meta, torch.arange(2, device="meta"))

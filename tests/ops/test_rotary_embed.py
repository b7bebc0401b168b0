import pytest
import torch

from treedecode import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(num_tokens, num_qo_heads, num_kv_heads, head_dim, dtype):
    """Makes q and k as strided views of one projection, and angles."""
    torch.manual_seed(0)
    qkv = torch.randn(num_tokens, num_qo_heads + 2 * num_kv_heads, head_dim).to(dtype)
    q, k, _ = qkv.split([num_qo_heads, num_kv_heads, num_kv_heads], dim=1)
    angles = torch.randn(num_tokens, head_dim) * 10
    return qkv, q, k, angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 64), (5, 6), (17, 24), (200, 80)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(isa, dtype, num_tokens, head_dim):
    qkv, q, k, cos, sin = case(num_tokens, 3, 2, head_dim, dtype)
    v = qkv[:, 5:].clone()
    want = [x.double() for x in (q, k, cos, sin)]
    size = [x.abs().max() for x in want[:2]]
    reference.rotary_embed(*want)
    ops.rotary_embed(q, k, cos, sin)
    for got, truth, largest in zip((q, k), want[:2], size, strict=True):
        rounding = (truth.to(dtype).double() - truth).abs() * 1.01
        assert ((got.double() - truth).abs() <= rounding + 4e-7 * largest).all()
    assert torch.equal(qkv[:, 5:], v)


def test_opcheck():
    _, q, k, cos, sin = case(3, 2, 1, 8, torch.float32)
    args = (q.contiguous(), k.contiguous(), cos, sin)
    torch.library.opcheck(torch.ops.treedecode.rotary_embed, args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.ones(3, 2, 6)}, ValueError, r"k: expected shape .* = \[3, \*, 8\], got \[3, 2, 6\]"),
        ({"k": torch.ones(3, 2, 8).half()}, TypeError, "k: expected dtype float32, got float16"),
        ({"cos": torch.ones(3, 4)}, ValueError, r"cos: expected shape \[num_tokens, head_dim\] = \[3, 8\]"),
        ({"sin": torch.ones(3, 8).bfloat16()}, TypeError, "sin: expected dtype float32, got bfloat16"),
        ({"q": torch.ones(3, 2, 7)}, ValueError, "q: expected an even head_dim, got 7"),
    ],
)
def test_bad_arguments_write_nothing(change, error, message):
    args = {"q": torch.ones(3, 4, 8), "k": torch.ones(3, 2, 8), "cos": torch.zeros(3, 8), "sin": torch.zeros(3, 8)}
    args |= change
    with pytest.raises(error, match=message):
        ops.rotary_embed(**args)
    assert (args["q"] == 1).all()
    assert (args["k"] == 1).all()


def test_gradients_are_refused_and_nothing_is_written():
    _, q, k, cos, sin = case(3, 2, 1, 8, torch.float32)
    q = q.clone().requires_grad_()
    before = q.detach().clone()
    with pytest.raises(RuntimeError, match="q of rotary_embed requires grad"):
        ops.rotary_embed(q, k, cos, sin)
    assert torch.equal(q, before)

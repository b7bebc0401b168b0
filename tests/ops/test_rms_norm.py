import pytest
import torch

from treedecode import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("size", [1, 7, 16, 33, 576])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(isa, dtype, size, unit_offset):
    torch.manual_seed(0)
    x = (torch.randn(5, 4, size + 3) * 3).to(dtype)[:, 1:, 2 : 2 + size]  # heads of a wider projection
    weight = torch.randn(size).to(dtype)
    got = ops.rms_norm(x, weight, 1e-5, unit_offset=unit_offset)
    want = reference.rms_norm(x.double(), weight.double(), 1e-5, unit_offset=unit_offset)
    assert got.shape == x.shape
    assert got.dtype == dtype
    assert got.is_contiguous()
    # One rounding of the result; without unit_offset also one of the normed value, which scales to the same size.
    half_ulp = torch.finfo(dtype).eps / 2
    budget = (half_ulp * (1 if unit_offset else 2.01) + 1e-6) * want.abs() + torch.finfo(dtype).smallest_normal
    assert ((got.double() - want).abs() <= budget).all()
    assert torch.equal(ops.rms_norm(x[0], weight, 1e-5, unit_offset=unit_offset), got[0])
    batch = ops.rms_norm(x.reshape(1, 5, 3, size), weight, 1e-5, unit_offset=unit_offset)
    assert torch.equal(batch[0], got)


def test_threads_do_not_change_a_bit():
    x, weight = torch.randn(400, 1, 576), torch.randn(576)
    whole = ops.rms_norm(x, weight, 1e-6)
    assert torch.equal(torch.cat([ops.rms_norm(row, weight, 1e-6) for row in x.split(1)]), whole)


def test_zero_row_stays_zero(isa):
    assert not ops.rms_norm(torch.zeros(2, 48), torch.ones(48), 1e-6).any()


def test_opcheck():
    torch.library.opcheck(torch.ops.treedecode.rms_norm, (torch.randn(2, 3, 8), torch.randn(8), 1e-6, False))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "x: expected dtype float32, bfloat16 or float16"),
        ({"weight": torch.zeros(9)}, ValueError, r"weight: expected shape \[size\] = \[8\], got \[9\]"),
        ({"weight": torch.zeros(8, dtype=torch.bfloat16)}, TypeError, "weight: expected dtype float32, got bfloat16"),
        ({"eps": -1.0}, ValueError, "eps: expected a non-negative number, got -1"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        ops.rms_norm(**({"x": torch.zeros(2, 8), "weight": torch.zeros(8), "eps": 1e-6} | change))


def test_gradients_are_refused():
    """A residual connection around an op would hide the missing gradient of the op."""
    x, weight = torch.ones(2, 8, requires_grad=True), torch.nn.Parameter(torch.ones(8))
    with pytest.raises(RuntimeError, match=r"inference: x, weight of rms_norm requires grad; use .*, or detach"):
        ops.rms_norm(x * 2, weight, 1e-6)
    compiled = torch.compile(lambda x, weight: ops.rms_norm(x, weight, 1e-6), backend="aot_eager")
    with pytest.raises(RuntimeError, match="x, weight of rms_norm requires grad"):
        compiled(x, weight)
    want = ops.rms_norm(x.detach(), weight.detach(), 1e-6)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(ops.rms_norm(x, weight, 1e-6), want)
            assert torch.equal(compiled(x, weight), want)

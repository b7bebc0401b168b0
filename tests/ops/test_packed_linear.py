import pytest
import torch

from treedecode import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(rows, in_features, out_features, dtype, gate="", extras=True, seed=0):
    """Makes (x, arguments) of packed_linear, with weights scaled so that results are of order one."""
    torch.manual_seed(seed)
    count = 2 if gate else 1
    weights = [(torch.randn(out_features, in_features) * in_features**-0.5).to(dtype) for _ in range(count)]
    kwargs = {"gate": gate}
    if extras:
        kwargs["bias"] = ops.pack_bias(*[torch.randn(out_features, dtype=dtype) for _ in range(count)])
        kwargs["residual"] = torch.randn(rows, 2 * out_features, dtype=dtype)[:, :out_features]
    x = torch.randn(rows, in_features + 6, dtype=dtype)[:, :in_features]  # strided, as a slice of a fused projection
    return x, (ops.pack_weight(*weights), out_features), kwargs


def exact(x, args, kwargs):
    double = {name: v.double() if torch.is_tensor(v) else v for name, v in kwargs.items()}
    return reference.packed_linear(_Double(x), *args, **double)


class _Double:
    """An x for which the reference returns float64."""

    def __init__(self, x):
        self._x = x
        self.dtype = torch.float64

    def double(self):
        return self._x.double()


def check(x, args, kwargs):
    want = exact(x, args, kwargs)
    got = ops.packed_linear(x, *args, **kwargs)
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    # Rounding of the result, and what fp32 sums of in_features terms of order in_features**-0.5 may lose.
    rounding = (want.to(x.dtype).double() - want).abs()
    ulp = torch.finfo(x.dtype).eps * want.abs() if x.dtype != torch.float32 else 0
    assert ((got.double() - want).abs() <= rounding + ulp * 0.01 + 2e-6 * (1 + want.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features"),
    [
        *[(1, 64, 80), (2, 6, 1), (3, 130, 33), (5, 34, 64), (8, 48, 49), (13, 40, 16), (16, 32, 70), (300, 24, 36)],
        *[(40, 64, 80), (270, 96, 40)],  # tile registers: one and two blocks of rows and of panels
    ],
)
def test_matches_reference(isa, rows, in_features, out_features, dtype):
    check(*case(rows, in_features, out_features, dtype))
    check(*case(rows, in_features, out_features, dtype, extras=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "in_features"), [(1, 38), (6, 38), (19, 38), (3, 64), (45, 64)])
def test_gated_matches_reference(isa, rows, in_features, gate, dtype):
    check(*case(rows, in_features, 50, dtype, gate))
    check(*case(rows, in_features, 50, dtype, gate, extras=False))


def test_gates_survive_large_arguments(isa):
    x = torch.tensor([[100.0, 0.0], [-100.0, 0.0], [-3.0e4, 0.0], [3.0e4, 0.0]])
    one = torch.tensor([[1.0, 0.0]])
    for gate in ("silu", "gelu_tanh"):
        got = ops.packed_linear(x, ops.pack_weight(one, one), 1, gate=gate)
        assert torch.equal(got, torch.tensor([[1e4], [0.0], [0.0], [9e8]])), gate


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_bitwise_independent_of_the_others_and_of_threads(isa, dtype):
    x, args, kwargs = case(67, 96, 112, dtype, "silu")
    residual = kwargs.pop("residual")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = ops.packed_linear(x, *args, residual=residual, **kwargs)
        torch.set_num_threads(1)
        assert torch.equal(ops.packed_linear(x, *args, residual=residual, **kwargs), whole)
    finally:
        torch.set_num_threads(before)
    for begin, end in [(0, 1), (3, 5), (7, 12), (20, 36), (50, 67)]:
        part = ops.packed_linear(x[begin:end], *args, residual=residual[begin:end], **kwargs)
        assert torch.equal(part, whole[begin:end]), (begin, end)


def test_no_rows():
    x, args, kwargs = case(0, 8, 20, torch.float32)
    assert ops.packed_linear(x, *args, **kwargs).shape == (0, 20)


def test_opcheck():
    x, args, kwargs = case(3, 8, 20, torch.bfloat16, "silu")
    kwargs["residual"] = kwargs["residual"].contiguous()
    torch.library.opcheck(
        torch.ops.treedecode.packed_linear, (x, *args, kwargs["bias"], kwargs["residual"], kwargs["gate"])
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.zeros(3, 10)},
            ValueError,
            r"weight: expected shape \[num_panels, in_features, 16\] = \[\*, 10, 16\]",
        ),
        ({"x": torch.zeros(3, 8, dtype=torch.float64)}, TypeError, "x: expected dtype float32, bfloat16 or float16"),
        ({"x": torch.zeros(8, 3).t()}, ValueError, "x: expected unit stride"),
        ({"x": torch.zeros(3, 0), "weight": torch.zeros(2, 0, 16)}, ValueError, "x: expected .* at least 2, got 0"),
        ({"x": torch.zeros(3, 7), "weight": torch.zeros(2, 7, 16)}, ValueError, "x: expected an even number"),
        ({"weight": torch.zeros(2, 8, 16, dtype=torch.float16)}, TypeError, "weight: expected dtype float32"),
        ({"out_features": 33}, ValueError, "out_features: expected a number that fills the panels of weight, got 33"),
        ({"gate": "relu"}, ValueError, "gate: expected '', 'silu' or 'gelu_tanh', got 'relu'"),
        ({"gate": "silu"}, ValueError, "out_features: expected a number that fills"),
        ({"bias": torch.zeros(20)}, ValueError, r"bias: expected shape \[num_panels \* 16\] = \[32\], got \[20\]"),
        ({"residual": torch.zeros(3, 21)}, ValueError, r"residual: expected shape .* = \[3, 20\], got \[3, 21\]"),
    ],
)
def test_bad_arguments(change, error, message):
    good = {"x": torch.zeros(3, 8), "weight": torch.zeros(2, 8, 16), "out_features": 20}
    with pytest.raises(error, match=message):
        ops.packed_linear(**(good | change))


def test_pack_weight_names_what_it_cannot_pack():
    for shape in ((4, 7), (4, 0), (0, 8), (4,)):
        with pytest.raises(ValueError, match=r"weight: expected shape .* not empty and with in_features even"):
            ops.pack_weight(torch.zeros(shape))
    with pytest.raises(ValueError, match="up: expected shape and dtype of weight"):
        ops.pack_weight(torch.zeros(4, 8), torch.zeros(5, 8))

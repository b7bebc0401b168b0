"""decoder_forward refuses bad arguments by name, before it writes anything."""

import dataclasses

import pytest
import torch
from support.decoder_cases import assert_same, bits, make_case

from treedecode import ops
from treedecode.ops.decoder_forward import HEAD_TENSORS, LAYER_TENSORS


def tensors_with(case, **changes):
    """Returns the weights of a case, with changes in layer 1 or in the head; a function gets the old tensor."""
    names = [*LAYER_TENSORS, *(f"1.{name}" for name in LAYER_TENSORS), *HEAD_TENSORS]
    tensors = dict(zip(names, case.weights.tensors, strict=True))
    for name, new in changes.items():
        key = name if name in HEAD_TENSORS else f"1.{name}"
        tensors[key] = new(tensors[key]) if callable(new) else new
    return list(tensors.values())


def strided(t):
    return torch.stack([t, t], dim=-1)[..., 0]


def rows_of(*values):
    return torch.tensor(values, dtype=torch.int64)


def argument(name, change, error, message):
    """Makes a parameter: argument `name` is replaced by `change(case)`."""
    return pytest.param(lambda case: {name: change(case)}, error, f"{name}: {message}", id=f"{name} {message}")


def weight(name, change, error, message):
    """Makes a parameter: a tensor of layer 1 or of the head is replaced."""
    where = "weights: " if name in HEAD_TENSORS else "weights of layer 1: "
    return pytest.param(
        lambda case: {"tensors": tensors_with(case, **{name: change})}, error, f"{where}{name}: {message}",
        id=f"{name} {message}",
    )  # fmt: skip


NAMES = ["x", "cos", "sin", "kv", "slots", "page_table", "seq_lens", "plan", "logit_rows"]


def of(name):
    return lambda case: case.args[NAMES.index(name)]


def value(x):
    return lambda case: x


def other_plan(**options):
    def plan(case):
        page_size = options.pop("page_size", 4)
        sizes = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 8}
        return ops.plan_tree(case.args[5], case.args[6], page_size=page_size, **sizes, **options)

    return plan


def plan_with(**changes):
    return lambda case: dataclasses.replace(of("plan")(case), **{n: f(case) for n, f in changes.items()})


BAD = [
    argument("x", lambda case: of("x")(case)[0], ValueError, r"expected shape \[num_tokens, hidden_size\]"),
    argument("x", lambda case: of("x")(case).double(), TypeError, "expected dtype float32, bfloat16 or float16"),
    argument("x", lambda case: strided(of("x")(case)), ValueError, "expected a contiguous tensor"),
    argument("cos", lambda case: of("cos")(case)[1:], ValueError, r"expected shape \[num_tokens, head_dim\]"),
    argument("cos", lambda case: of("cos")(case).half(), TypeError, "expected dtype float32, got float16"),
    argument("sin", lambda case: of("sin")(case)[:, :4], ValueError, r"expected shape .* = \[\d+, 8\]"),
    argument("sin", lambda case: strided(of("sin")(case)), ValueError, "expected unit stride"),
    argument("kv", lambda case: case.kv[:, 0], ValueError, r"expected shape \[num_layers, 2, num_pages, "),
    argument("kv", lambda case: case.kv[:, :1], ValueError, r"expected shape \[num_layers, 2, num_pages, "),
    argument("kv", lambda case: case.kv.double(), TypeError, "expected dtype float32, got float64"),
    argument("kv", lambda case: strided(case.kv), ValueError, "expected unit stride in the last dimension"),
    argument("kv", lambda case: case.kv[..., :4], ValueError, "expected head_dim a multiple of 8 up to 256, got 4"),
    argument("kv", lambda case: case.kv[..., :0], ValueError, "expected head_dim a multiple of 8 up to 256, got 0"),
    argument("kv", lambda case: case.kv[..., :0, :], ValueError, "expected page_size above 0"),
    argument("num_qo_heads", value(0), ValueError, "expected .* got 0"),
    argument("num_qo_heads", value(-2), ValueError, "expected .* got -2"),
    argument("num_qo_heads", value(3), ValueError, "expected a positive multiple of num_kv_heads, got 3"),
    argument("num_qo_heads", value(2**61 + 4), ValueError, "expected .* of the range of int32"),  # 32 heads, mod 2^64
    argument("intermediate_size", value(0), ValueError, "expected .* got 0"),
    argument("intermediate_size", value(2**63 - 2), ValueError, "expected .* of the range of int32"),
    argument("vocab_size", value(-1), ValueError, "expected .* got -1"),
    argument("vocab_size", value(2**63 - 1), ValueError, "expected .* of the range of int32"),
    argument("eps", value(-1e-6), ValueError, "expected a non-negative number"),
    argument("eps", value(float("nan")), ValueError, "expected a non-negative number"),
    argument("gate", value(""), ValueError, "expected 'silu' or 'gelu_tanh', got ''"),
    argument("gate", value("relu"), ValueError, "expected 'silu' or 'gelu_tanh', got 'relu'"),
    argument("slots", lambda case: of("slots")(case)[1:], ValueError, r"expected shape \[num_tokens\]"),
    argument("slots", lambda case: of("slots")(case).int(), TypeError, "expected dtype int64, got int32"),
    argument("slots", lambda case: strided(of("slots")(case)), ValueError, "expected a contiguous tensor"),
    argument("slots", lambda case: of("slots")(case) + 4 * case.kv.shape[2], ValueError, "expected values below"),
    argument("logit_rows", value(rows_of(0, 99)), ValueError, "expected numbers of tokens of x, got 99"),
    argument("logit_rows", value(rows_of(0, -1)), ValueError, "expected numbers of tokens of x, got -1"),
    argument("logit_rows", value(rows_of(0).int()), TypeError, "expected dtype int64, got int32"),
    argument("logit_rows", value(rows_of(0)[None]), ValueError, r"expected shape \[num_logits\]"),
    argument("logit_rows", value(strided(rows_of(0, 1))), ValueError, "expected a contiguous tensor"),
    argument("page_table", lambda case: of("page_table")(case).long(), TypeError, "expected dtype int32"),
    argument("page_table", lambda case: of("page_table")(case) + 99, ValueError, "expected page ids below"),
    argument("page_table", lambda case: strided(of("page_table")(case)), ValueError, "expected unit stride"),
    argument("seq_lens", lambda case: of("seq_lens")(case)[1:], ValueError, r"expected shape \[num_branches\]"),
    pytest.param(lambda case: {"seq_lens": of("seq_lens")(case) - 1}, ValueError, "plan: was made for seq_lens",
                 id="plan of other seq_lens"),
    argument("plan", other_plan(num_workers=8), ValueError, "is flat, for a GPU"),
    argument("plan", lambda case: of("plan")(make_case(page_size=1)), ValueError, ""),
    argument("plan", plan_with(chunks=lambda case: of("plan")(case).chunks + 1), ValueError, "chunk 0 covers"),
    argument("plan", plan_with(q_indptr=lambda case: of("plan")(case).q_indptr + 1), ValueError, "expected q_indptr"),
    pytest.param(lambda case: {"tensors": case.weights.tensors[:-1]}, ValueError,
                 "weights: expected 13 tensors per layer of kv and 3 of the head, 29 in all, got 28",
                 id="weights too few"),
    argument("sm_scales", value([1.0]), ValueError, "expected one number per layer of kv, got 1"),
    argument("soft_caps", value([1.0] * 3), ValueError, "expected one number per layer of kv, got 3"),
    argument("windows", value([]), ValueError, "expected one number per layer of kv, got 0"),
    argument("sm_scales", value([1.0, 0.0]), ValueError, "expected a positive number"),
    argument("soft_caps", value([0.0, -1.0]), ValueError, r"expected 0 \(off\) or a positive number"),
    argument("windows", value([0, -2]), ValueError, "expected -1 .* or more, got -2"),
    weight("input_norm", lambda t: t[1:], ValueError, r"expected shape \[size\] = \[24\], got \[23\]"),
    weight("input_norm", strided, ValueError, "expected a contiguous tensor"),
    weight("input_norm", lambda t: t[:0], ValueError, "expected shape"),
    weight("output_norm", lambda t: t.half(), TypeError, "expected dtype float32, got float16"),
    weight("q_norm", torch.zeros(0), ValueError, r"expected shape \[size\] = \[8\], got \[0\]"),
    weight("k_norm", torch.zeros(0), ValueError, r"expected shape \[size\] = \[8\], got \[0\]"),
    weight("k_norm", torch.zeros(9), ValueError, "expected shape"),
    weight("qkv", lambda t: t[1:], ValueError, r"expected shape \[num_panels, in_features, 16\] = \[4, 24, 16\]"),
    weight("qkv", strided, ValueError, "expected a contiguous tensor"),
    weight("qkv", torch.zeros(0), ValueError, "expected shape"),
    weight("qkv_bias", lambda t: t[:3], ValueError, r"expected shape \[size\] = \[64\]"),
    weight("o_proj", lambda t: t.bfloat16(), TypeError, "expected dtype float32, got bfloat16"),
    weight("o_proj", lambda t: t[:, 1:], ValueError, "expected shape"),
    weight("o_proj_bias", strided, ValueError, "expected a contiguous tensor"),
    weight("gate_up", lambda t: t[1:], ValueError, r"expected shape .* = \[6, 24, 16\], got \[5, 24, 16\]"),
    weight("gate_up_bias", lambda t: t.half(), TypeError, "expected dtype float32"),
    weight("down", lambda t: t.mT.contiguous(), ValueError, "expected shape"),
    weight("down_bias", lambda t: t[None], ValueError, "expected shape"),
    weight("sinks", lambda t: t[1:], ValueError, r"expected shape \[num_qo_heads\] = \[4\]"),
    weight("sinks", lambda t: t.half(), TypeError, "expected dtype float32"),
    weight("sinks", torch.tensor([0, torch.inf, 0, 0]), ValueError, "expected numbers below .*inf"),
    weight("final_norm", lambda t: t[1:], ValueError, "expected shape"),
    weight("lm_head", lambda t: t[1:], ValueError, r"expected shape .* = \[3, 24, 16\], got \[2, 24, 16\]"),
    weight("lm_head_bias", lambda t: t[1:], ValueError, "expected shape"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change, error, message):
    good = make_case(head_norms=True, biases=True, sinks=True)
    bad = good.replace(**change(good))
    before = [bits(case.kv).clone() for case in (good, bad) if case.kv.dtype == torch.float32]
    with pytest.raises(error, match=message):
        ops.decoder_forward(*bad.args, bad.weights)
    after = [bits(case.kv) for case in (good, bad) if case.kv.dtype == torch.float32]
    assert all(map(torch.equal, before, after))


def test_odd_hidden_size():
    case = make_case()
    x = torch.zeros(len(case.args[0]), 23)
    with pytest.raises(ValueError, match=r"weights of layer 0: (input_norm|qkv): expected .*"):
        ops.decoder_forward(*case.replace(x=x).args, case.weights)


def test_gradients_and_other_devices_are_refused_in_weights_too():
    case = make_case()
    tensors = [t.clone().requires_grad_() for t in case.weights.tensors]
    with pytest.raises(RuntimeError, match="inference: weights of decoder_forward requires grad"):
        case.replace(tensors=tensors).run()
    with torch.no_grad():
        assert_same(case.replace(tensors=tensors).run(), case.run())
    meta = [t.to("meta") for t in case.weights.tensors]
    with pytest.raises(ValueError, match="decoder_forward: expected tensors on one device, got cpu and meta"):
        case.replace(tensors=meta).run()

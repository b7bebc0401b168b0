import math

import numpy as np
import pytest
import torch
from support.logits_cases import DTYPES, KINDS, make_logits, pack
from support.sample_cases import FILTERS, LARGE, OFF, assert_drawn_right, per_row
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.generation import logits_process as warpers

from treedecode import ops
from treedecode.reference import sample as reference_sample
from treedecode.reference.sample import kept_tokens, philox4x32, uniform


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "-".join(f"{k}{v}" for k, v in f.items()) or "plain")
def test_matches_reference(filters, kind, isa):
    rows, vocab = 7, 5003
    for dtype in DTYPES:
        logits = make_logits(kind, rows, vocab).to(dtype)
        settings = per_row(rows, **filters, seed=torch.arange(rows), position=77)
        assert_drawn_right(logits, ops.sample(logits, **settings), settings)


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 31, 33, 1023, 1025, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_vocab(dtype, vocab, isa):
    rows = 5
    storage = torch.full((rows, vocab + 3), math.nan, dtype=dtype)
    logits = storage[:, :vocab]
    logits.copy_(make_logits("peaked", rows, vocab))
    settings = per_row(rows, top_p=0.9, top_k=[0, 1, 5, 0, 2000], temperature=[1, 0.5, 1, 2, 0], seed=9)
    assert_drawn_right(logits, ops.sample(logits, **settings), settings)


@pytest.mark.parametrize("scale", [1, 8, 50, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabularies(dtype, scale, isa):
    generator = torch.Generator().manual_seed(scale)
    logits = (scale * torch.randn(2, LARGE, generator=generator)).to(dtype)
    settings = per_row(2, temperature=[1.0, 0.6], top_p=0.95)
    assert_drawn_right(logits, ops.sample(logits, **settings), settings)


@pytest.mark.parametrize("filters", FILTERS[:6], ids=str)
def test_masks(filters, isa):
    rows, vocab = 6, 3001
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator)
    allowed = torch.rand(rows, vocab, generator=generator) < torch.tensor([0.5, 0.01, 0.001, 1.0, 0.9, 0.0])[:, None]
    allowed[5, 2999] = True
    logits[~allowed] += 50
    logits[0, (~allowed[0]).nonzero()[0]] = math.nan  # the logit of a forbidden token is not read
    mask = pack(allowed)
    settings = per_row(rows, **filters, seed=torch.arange(rows))
    got = ops.sample(logits, **settings, token_mask=mask)
    assert allowed.gather(1, got[0].long()[:, None]).all()
    assert_drawn_right(logits.masked_fill(~allowed, -math.inf), got, settings)


def transformers_kept(logits, temperature, top_k, top_p, min_p):
    scores = warpers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = warpers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = warpers.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = warpers.MinPLogitsWarper(min_p)(None, scores)
    return (scores > -math.inf).nonzero()[:, 1]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_reference_keeps_the_tokens_that_transformers_keeps(filters):
    f = {name: (OFF | filters)[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    if f["temperature"] == 0:
        pytest.skip("transformers has no temperature 0")
    for seed in range(5):
        logits = 3 * torch.randn(1, 2003, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert torch.equal(kept_tokens(logits[0], **f)[0], transformers_kept(logits, **f))


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_p": 0.8},
        {"top_k": 7, "temperature": 1.7},
        {"min_p": 0.1, "temperature": 0.6},
        {"top_p": 0.9, "top_k": 30},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(filters):
    """A chi-square test of 20,000 draws over the kept tokens of one row, each with its own position."""
    draws, vocab = 20000, 300
    logits = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(3))
    settings = {name: (OFF | filters)[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    token = ops.sample(logits.expand(draws, vocab), **settings, seed=11, position=torch.arange(draws))[0]
    kept, weights = kept_tokens(logits.double(), **settings)
    counts = torch.bincount(token, minlength=vocab)
    assert counts[kept].sum() == draws
    expected = draws * weights / weights.sum()
    often = expected >= 5
    chi = ((counts[kept] - expected) ** 2 / expected)[often].sum().item()
    rest, rest_expected = counts[kept][~often].sum().item(), expected[~often].sum().item()
    chi += (rest - rest_expected) ** 2 / max(rest_expected, 1.0)
    freedom = int(often.sum())
    assert chi < freedom + 4 * math.sqrt(2 * freedom) + 8  # about one in 10^5; the draws are fixed, so never by chance


def test_philox_known_answers():
    """The vectors are those of the Random123 distribution for philox4x32-10."""
    ones = 0xFFFFFFFF
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox4x32(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_the_kernel_draws_with_philox():
    """With equal logits, the token is floor(uniform * vocab)."""
    vocab, rows = 4096, 64
    seed = torch.arange(rows) * 0x123456789ABCD - 2**62
    position = torch.arange(rows) * 2**33 + 5
    token = ops.sample(torch.zeros(rows, vocab), **OFF | {"seed": seed, "position": position})[0]
    want = [math.floor(uniform(s, p) * vocab) for s, p in zip(seed.tolist(), position.tolist(), strict=True)]
    assert token.tolist() == want
    assert len(set(want)) > rows - 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_nothing_but_itself(dtype, isa):
    rows, vocab = 12, 9001
    logits = make_logits("normal", rows, vocab).to(dtype)
    settings = per_row(
        rows,
        top_p=torch.linspace(0.1, 1, rows),
        temperature=torch.linspace(0, 2, rows),
        top_k=[0, 0, 0, 40, 0, 0, 3, 0, 0, 2000, 0, 0],
        seed=torch.arange(rows),
        position=torch.arange(rows),
    )
    whole = ops.sample(logits, **settings)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for got, want in zip(ops.sample(logits, **settings), whole, strict=True):
            assert torch.equal(got, want)
    finally:
        torch.set_num_threads(threads)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    shuffled = ops.sample(logits[order], **{name: value[order] for name, value in settings.items()})
    for got, want in zip(shuffled, whole, strict=True):
        assert torch.equal(got, want[order])
    for row in range(rows):
        alone = ops.sample(logits[row : row + 1], **{name: value[row : row + 1] for name, value in settings.items()})
        for got, want in zip(alone, whole, strict=True):
            assert torch.equal(got, want[row : row + 1])


def test_ties(isa):
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0] + [-5.0] * 100])
    assert ops.sample(logits, **OFF | {"temperature": 0})[0].tolist() == [1]
    for top_k, top_p, want in [
        (1, 1.0, {1}),
        (2, 1.0, {1, 2}),
        (4, 1.0, {0, 1, 2, 4}),
        (0, 0.35, {1, 2}),
        (3, 0.34, {1, 2}),
    ]:
        settings = OFF | {"top_k": top_k, "top_p": top_p, "temperature": 4.0 if top_k else 0.5}
        tokens = ops.sample(logits.expand(400, -1), **settings | {"position": torch.arange(400)})[0]
        assert set(tokens.tolist()) == want


@pytest.mark.parametrize("top_p", [0.0, 1e-30, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_token_is_always_kept(dtype, top_p, isa):
    rows, vocab = 40, 5003
    for kind in ("normal", "peaked", "flat", "descending", "few"):
        logits = make_logits(kind, 1, vocab).to(dtype).expand(rows, -1)
        allowed = torch.ones(rows, vocab, dtype=torch.bool)
        allowed[:, int(logits[0].argmax())] = False
        for mask in (None, pack(allowed)):
            best = (logits if mask is None else logits.masked_fill(~allowed, -math.inf)).float().argmax(1)
            for more in ({}, {"temperature": 0.3}, {"min_p": 0.01}, {"top_k": 20}, {"top_k": 2000}):
                settings = OFF | more | {"top_p": top_p, "seed": torch.arange(rows)}
                assert torch.equal(ops.sample(logits, **settings, token_mask=mask)[0].long(), best), (kind, more)


@pytest.mark.parametrize("temperature", [20.0, 100.0, 1e6])
def test_impossible_tokens_have_no_mass_at_any_temperature(temperature, isa):
    rows, vocab = 60, 6000
    logits = torch.full((rows, vocab), -math.inf)
    logits[:, 2900:2950] = make_logits("normal", rows, 50)
    logits[:, 100] = -1000.0  # possible, but far below the others
    for filters in ({}, {"top_p": 0.999}, {"min_p": 1e-6}, {"top_k": 3000}):
        settings = per_row(rows, **filters, temperature=temperature, seed=torch.arange(rows))
        assert_drawn_right(logits, ops.sample(logits, **settings), settings)


def test_large_equal_logits_are_as_uncertain_as_any(isa):
    for value in (torch.finfo(torch.float32).min, torch.finfo(torch.float32).max, 0.0):
        settings = per_row(3, seed=torch.arange(3))
        for sample in (ops.sample, reference_sample):
            _, logprob, entropy = sample(torch.full((3, 500), value), **settings)
            assert logprob.tolist() == pytest.approx([-math.log(500)] * 3, abs=1e-5)
            assert entropy.tolist() == pytest.approx([math.log(500)] * 3, abs=1e-5)


def test_flushed_denormals_change_nothing(isa):
    """The number next below 0 is a denormal, which is equal to 0 where denormals are flushed."""
    rows, vocab = 30, 4000
    logits = torch.full((rows, vocab), -1.0)
    logits[:, 1000::3] = 0.0
    filters = [{"min_p": 1.0}, {"min_p": math.exp(-0.5)}, {"top_k": 5}, {"top_k": 900}, {"top_k": 900, "min_p": 1.0}]
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        got = [ops.sample(logits, **OFF | f | {"seed": torch.arange(rows)})[0] for f in filters]
    finally:
        torch.set_flush_denormal(False)
    for f, token in zip(filters, got, strict=True):
        assert torch.equal(token, ops.sample(logits, **OFF | f | {"seed": torch.arange(rows)})[0]), f
        assert (logits.gather(1, token.long()[:, None]) == 0).all(), f


def test_scalars_equal_tensors():
    logits = make_logits("normal", 4, 500)
    scalars = OFF | {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 2**40, "position": 12}
    for got, want in zip(ops.sample(logits, **scalars), ops.sample(logits, **per_row(4, **scalars)), strict=True):
        assert torch.equal(got, want)


def test_numbers_of_any_kind():
    logits = make_logits("normal", 4, 500)
    off = ops.sample(logits, **OFF)[0]
    for top_k in (2**40, 2**31, torch.full((4,), 2**32 + 1), np.int64(0), torch.zeros(4, dtype=torch.uint8)):
        assert torch.equal(ops.sample(logits, **OFF | {"top_k": top_k})[0], off)
    ops.sample(logits, **OFF | {"top_k": 2})
    with pytest.raises(
        TypeError, match=r"top_k: expected an integer, got 2.0"
    ):  # 2 is cached already, and 2.0 must not use it
        ops.sample(logits, **OFF | {"top_k": 2.0})
    settings = OFF | {"temperature": np.float32(0.5), "seed": np.uint32(7)}
    assert torch.equal(
        ops.sample(logits, **settings)[0], ops.sample(logits, **OFF | {"temperature": 0.5, "seed": 7})[0]
    )


@pytest.mark.parametrize("seed", [1001, 1002])
def test_settings_are_not_kept_from_tracing(seed):
    """Tensors of settings made while tracing are not used outside of it, and the other way round."""
    settings = OFF | {"temperature": 0.83, "seed": seed}
    logits = make_logits("normal", 2, 50)
    want = ops.sample(logits, **OFF | {"temperature": 0.83, "seed": torch.tensor([seed])})[0]

    def draw(x):
        return ops.sample(x, **settings)[0]

    def check():
        assert torch.equal(draw(logits), want)

    if seed == 1002:
        check()  # cached before
    with FakeTensorMode():
        draw(torch.empty(2, 50))
    check()
    make_fx(draw, tracing_mode="fake")(logits)
    check()
    assert torch.equal(torch.func.functionalize(draw)(logits), want)
    check()
    with torch.inference_mode():
        check()
    assert torch.equal(torch.compile(draw, backend="eager", fullgraph=True)(logits), want)
    tensors = {name: torch.tensor([value]) for name, value in settings.items()}
    compiled = torch.compile(lambda x: ops.sample(x, **tensors)[0], backend="eager", fullgraph=True)
    assert torch.equal(compiled(logits), want)
    assert not ops.sample(logits, **settings)[0].is_inference()
    check()


def test_no_rows():
    token, logprob, entropy = ops.sample(torch.empty(0, 50), **OFF)
    assert token.shape == logprob.shape == entropy.shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 700, 5002])
def test_bad_row_is_named(column, bad, isa):
    logits = make_logits("normal", 5, 5003)
    logits[3, column] = bad
    for filters in ({}, {"temperature": 0}, {"top_k": 20}, {"top_p": 0.9, "temperature": 0.5}):
        with pytest.raises(ValueError, match=r"logits: expected numbers below .inf, got NaN or .inf in row 3"):
            ops.sample(logits, **OFF | filters)


def test_row_without_a_token_is_named(isa):
    logits = make_logits("normal", 3, 1000)
    logits[1] = -math.inf
    with pytest.raises(ValueError, match=r"logits: expected at least one token .* got none in row 1"):
        ops.sample(logits, **OFF)
    with pytest.raises(ValueError, match=r"logits: expected at least one token .* got none in row 2"):
        ops.sample(torch.zeros(3, 1000), **OFF, token_mask=pack(torch.tensor([[1], [1], [0]]).expand(3, 1000)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(5)}, ValueError, r"logits: expected shape \[rows, vocab\]"),
        ({"logits": torch.zeros(5, 9, dtype=torch.float64)}, TypeError, "logits: expected dtype float32, bfloat16"),
        ({"temperature": -1.0}, ValueError, "temperature: expected 0 or a positive finite number, got -1"),
        (
            {"temperature": torch.ones(4)},
            ValueError,
            r"temperature: expected shape \[rows\] = \[5\] or \[1\], got \[4\]",
        ),
        ({"temperature": math.nan}, ValueError, "temperature: expected 0 or a positive"),
        ({"top_k": -1}, ValueError, "top_k: expected 0"),
        ({"top_k": torch.ones(5)}, TypeError, "top_k: expected dtype int32, got float32"),
        ({"top_p": 1.5}, ValueError, r"top_p: expected a number in \[0, 1\], got 1.5"),
        ({"min_p": -0.5}, ValueError, "min_p: expected a number"),
        ({"seed": torch.ones(5)}, TypeError, "seed: expected dtype int64, got float32"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer, got 1.5"),
        ({"seed": 2**63}, ValueError, "seed: expected a number that torch.int64 holds, got 9223372036854775808"),
        ({"top_k": -(2**40)}, ValueError, "top_k: expected a number that torch.int32 holds"),
        ({"top_k": torch.full((5,), -(2**40))}, ValueError, r"top_k: expected 0 \(off\) or more"),
        ({"temperature": None}, TypeError, "temperature: expected a number or a tensor, got None"),
        ({"top_p": [1.0]}, TypeError, r"top_p: expected a number or a tensor, got \[1.0\]"),
        ({"temperature": 10**400}, ValueError, "temperature: expected a number that torch.float32 holds"),
        ({"temperature": torch.ones(5, dtype=torch.complex64)}, TypeError, "temperature: expected dtype float32"),
        ({"token_mask": torch.ones(5, 2, dtype=torch.int32)}, ValueError, r"token_mask: expected shape .* \[5, 1\]"),
        ({"token_mask": torch.ones(5, 1)}, TypeError, "token_mask: expected dtype int32, got float32"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        ops.sample(**{"logits": torch.zeros(5, 9)} | OFF | change)


def test_a_meta_tensor_among_others_is_refused():
    with pytest.raises(ValueError, match="sample: expected tensors on one device, got cpu and meta"):
        ops.sample(torch.zeros(4, 9), **OFF | {"seed": torch.arange(4, device="meta")})
    token, _, _ = ops.sample(torch.zeros(4, 9, device="meta"), **OFF)
    assert token.device.type == "meta"


def test_opcheck():
    settings = per_row(3)
    args = (torch.randn(3, 40), *(settings[name].clone() for name in OFF))
    torch.library.opcheck(torch.ops.treedecode.sample, (*args, None))
    torch.library.opcheck(torch.ops.treedecode.sample, (*args, torch.full((3, 2), -1, dtype=torch.int32)))

"""The CUDA kernels of sample, run on the host, with the checks of the CPU kernel."""

import math

import pytest
import torch
from support import cuda_library
from support.logits_cases import DTYPES, KINDS, make_logits, pack
from support.logits_kernels import sample
from support.sample_cases import FILTERS, LARGE, assert_drawn_right, per_row
from support.simt_kernels import SEEDS

from treedecode.reference.sample import uniform


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "-".join(f"{k}{v}" for k, v in f.items()) or "plain")
def test_matches_reference(filters, kind):
    rows, vocab = 3, 2003
    case = KINDS.index(kind) + FILTERS.index(filters)  # every kind and every filter meets every dtype
    logits = make_logits(kind, rows, vocab).to(DTYPES[case % 3])
    settings = per_row(rows, **filters, seed=torch.arange(rows), position=77)
    got = sample(logits, settings, chunk_len=(None, 512, 2048)[case // 3 % 3], seed=case, resident_blocks=2)
    assert_drawn_right(logits, got, settings)


@pytest.mark.parametrize("vocab", [1, 2, 17, 33, 1025])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_vocab_and_alignment(dtype, vocab):
    rows = 5
    storage = torch.full((rows, vocab + 3), math.nan, dtype=dtype)
    logits = storage[:, 1 : vocab + 1]
    logits.copy_(make_logits("peaked", rows, vocab))
    settings = per_row(rows, top_p=0.9, top_k=[0, 1, 5, 0, 2000], temperature=[1, 0.5, 1, 2, 0], seed=9)
    assert_drawn_right(logits, sample(logits, settings), settings)


@pytest.mark.parametrize("scale", [1, 50])
def test_large_vocabularies(scale):
    logits = (scale * torch.randn(2, LARGE, generator=torch.Generator().manual_seed(scale))).bfloat16()
    settings = per_row(2, temperature=[1.0, 0.6], top_p=0.95)
    assert_drawn_right(logits, sample(logits, settings), settings)


@pytest.mark.parametrize("filters", FILTERS[:6], ids=str)
def test_masks(filters):
    rows, vocab = 6, 1501
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator)
    allowed = torch.rand(rows, vocab, generator=generator) < torch.tensor([0.5, 0.01, 0.001, 1.0, 0.9, 0.0])[:, None]
    allowed[5, 1499] = True
    logits[~allowed] += 50
    logits[0, (~allowed[0]).nonzero()[0]] = math.nan  # the logit of a forbidden token is not read
    settings = per_row(rows, **filters, seed=torch.arange(rows))
    got = sample(logits, settings, token_mask=pack(allowed), chunk_len=512)
    assert allowed.gather(1, got[0].long()[:, None]).all()
    assert_drawn_right(logits.masked_fill(~allowed, -math.inf), got, settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_several_chunks(dtype):
    """The last kept token is among the best 256, among the best 2048, or below them."""
    rows = 6
    logits = make_logits("normal", rows, 17003).to(dtype)
    settings = per_row(rows, top_k=[0, 100, 700, 0, 5000, 0], top_p=[1, 1, 0.99, 0.99, 0.9, 1], seed=torch.arange(rows))
    assert_drawn_right(logits, sample(logits, settings), settings)


@pytest.mark.parametrize(
    ("num_complete", "top_k"), [(128, 128), (128, 129), (256, 256), (256, 257), (2048, 2048), (2048, 2049)]
)
def test_filters_that_cut_at_the_end_of_the_ranked_tokens(num_complete, top_k):
    """`num_complete` tokens are ranked; a filter that cuts there, or later, takes another path to the same token."""
    vocab, rows = 4096, 4
    logits = make_logits("flat", 1, vocab).expand(rows, -1)
    settings = per_row(rows, top_k=top_k, seed=torch.arange(rows), temperature=0.01)
    chunk_len = {128: 4096, 256: 2048, 2048: 256}[num_complete]
    assert_drawn_right(logits, sample(logits, settings, chunk_len=chunk_len), settings)


def test_it_draws_with_philox():
    """With equal logits, the token is floor(uniform * vocab)."""
    vocab, rows = 1024, 24
    seed = torch.arange(rows) * 0x123456789ABCD - 2**62
    position = torch.arange(rows) * 2**33 + 5
    token = sample(torch.zeros(rows, vocab), per_row(rows, seed=seed, position=position), chunk_len=256)[0]
    want = [math.floor(uniform(s, p) * vocab) for s, p in zip(seed.tolist(), position.tolist(), strict=True)]
    assert token.tolist() == want
    assert len(set(want)) > rows - 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_nothing_but_itself(dtype):
    rows, vocab = 8, 1001
    logits = make_logits("normal", rows, vocab).to(dtype)
    settings = per_row(
        rows,
        top_p=[0.1, 0.5, 0.9, 1, 1, 1, 0.999, 1],
        temperature=[0, 1, 2, 0.5, 1, 1.5, 1, 1],
        top_k=[0, 0, 0, 40, 3, 0, 500, 0],
        min_p=[0, 0, 0, 0, 0, 0.1, 0, 0],
        seed=torch.arange(rows),
        position=torch.arange(rows),
    )
    whole = sample(logits, settings, chunk_len=256)
    for schedule in SEEDS[1:]:
        again = sample(logits, settings, chunk_len=256, seed=schedule, resident_blocks=3)
        assert all(map(torch.equal, again, whole))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    shuffled = sample(logits[order], {name: value[order] for name, value in settings.items()}, chunk_len=256)
    for got, want in zip(shuffled, whole, strict=True):
        assert torch.equal(got, want[order])


def test_one_value_for_all_rows():
    logits = make_logits("normal", 3, 300)
    chosen = {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 2**40, "position": 12}
    one = {name: value[:1] for name, value in per_row(1, **chosen).items()}
    assert all(map(torch.equal, sample(logits, one), sample(logits, per_row(3, **chosen))))


def test_ties():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0] + [-5.0] * 100])
    assert sample(logits, per_row(1, temperature=0))[0].tolist() == [1]
    for top_k, top_p, want in [
        (1, 1.0, {1}),
        (2, 1.0, {1, 2}),
        (4, 1.0, {0, 1, 2, 4}),
        (0, 0.35, {1, 2}),
        (3, 0.34, {1, 2}),
    ]:
        settings = per_row(40, top_k=top_k, top_p=top_p, temperature=4.0 if top_k else 0.5, position=torch.arange(40))
        assert set(sample(logits.expand(40, -1), settings)[0].tolist()) == want


@pytest.mark.parametrize("filters", [{"top_k": 500}, {"top_p": 0.5}, {"top_k": 800, "top_p": 0.625}], ids=str)
def test_ties_beyond_the_ranked_tokens(filters):
    """All logits are equal, so the first tokens are kept."""
    vocab, rows = 1000, 12
    settings = per_row(rows, **filters, seed=torch.arange(rows))
    token = sample(torch.full((rows, vocab), 2.5), settings)[0]
    kept = 500
    want = [math.floor(uniform(s, 0) * kept) for s in range(rows)]
    assert token.tolist() == want


@pytest.mark.parametrize("temperature", [20.0, 1e6])
def test_impossible_tokens_have_no_mass_at_any_temperature(temperature):
    rows, vocab = 8, 2000
    logits = torch.full((rows, vocab), -math.inf)
    logits[:, 900:950] = make_logits("normal", rows, 50)
    logits[:, 100] = -1000.0  # possible, but far below the others
    for filters in ({}, {"top_p": 0.999}, {"min_p": 1e-6}, {"top_k": 1500}):
        settings = per_row(rows, **filters, temperature=temperature, seed=torch.arange(rows))
        assert_drawn_right(logits, sample(logits, settings, chunk_len=256), settings)


def test_large_equal_logits_are_as_uncertain_as_any():
    for value in (torch.finfo(torch.float32).min, torch.finfo(torch.float32).max, 0.0):
        _, logprob, entropy = sample(torch.full((3, 500), value), per_row(3, seed=torch.arange(3)), chunk_len=64)
        assert logprob.tolist() == pytest.approx([-math.log(500)] * 3, abs=1e-5)
        assert entropy.tolist() == pytest.approx([math.log(500)] * 3, abs=1e-5)


def assert_marked(got, want, bad):
    token, logprob, entropy = got
    assert token[bad] == -1
    assert logprob[bad].isnan()
    assert entropy[bad].isnan()
    others = torch.arange(len(token)) != bad
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "filters", [{}, {"temperature": 0}, {"top_k": 20}, {"top_p": 0.9, "temperature": 0.5}], ids=str
)
def test_bad_logits_are_marked(filters, bad):
    logits, settings = make_logits("normal", 4, 603), per_row(4, **filters)
    want = sample(logits, settings, chunk_len=256)
    for column in (0, 400, 602):
        broken = logits.clone()
        broken[2, column] = bad
        assert_marked(sample(broken, settings, chunk_len=256), want, 2)


def test_a_row_without_a_token_is_marked():
    logits, settings = make_logits("normal", 3, 200), per_row(3, top_k=[0, 5, 0])
    want = sample(logits, settings)
    none = logits.clone()
    none[1] = -math.inf
    assert_marked(sample(none, settings), want, 1)
    mask = pack(torch.tensor([[1], [1], [0]]).expand(3, 200))
    assert_marked(sample(logits, settings, token_mask=mask), want, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"min_p": -0.5},
    ],
    ids=str,
)
def test_settings_out_of_range_are_marked(change):
    logits, settings = make_logits("normal", 3, 100), {name: value.clone() for name, value in per_row(3).items()}
    want = sample(logits, settings)
    for name, value in change.items():
        settings[name][1] = value
    assert_marked(sample(logits, settings), want, 1)


def test_no_rows():
    assert sample(torch.empty(0, 50), per_row(1))[0].shape == (0,)


@cuda_library.needs_library
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, ValueError, "logits: expected a CUDA tensor, got cpu"),
        ({"logits": torch.zeros(5)}, ValueError, r"logits: expected shape \[rows, vocab\]"),
        ({"logits": torch.zeros(5, 9, dtype=torch.float64)}, TypeError, "logits: expected dtype float32, bfloat16"),
        (
            {"temperature": torch.ones(4)},
            ValueError,
            r"temperature: expected shape \[rows\] = \[5\] or \[1\], got \[4\]",
        ),
        ({"top_k": torch.ones(5)}, TypeError, "top_k: expected dtype int32, got float32"),
        ({"seed": torch.ones(5)}, TypeError, "seed: expected dtype int64, got float32"),
        ({"token_mask": torch.ones(5, 2, dtype=torch.int32)}, ValueError, r"token_mask: expected shape .* \[5, 1\]"),
        ({"token_mask": torch.ones(5, 1)}, TypeError, "token_mask: expected dtype int32, got float32"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"logits": torch.zeros(5, 9), **per_row(5), "token_mask": None} | change
    with pytest.raises(error, match=message):
        cuda_library.call("sample", *arguments.values())

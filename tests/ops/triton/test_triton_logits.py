"""The Triton kernels of beam_prune and sample, in the interpreter against the reference and the CPU kernels.

Only fp32 and fp16, as in test_triton_kernels.py: the interpreter gets bf16 wrong.
"""

import math
import sys

import pytest
import torch
from support.beam_prune_cases import assert_pruned_right, indptr
from support.logits_cases import KINDS, make_logits, pack
from support.sample_cases import OFF, assert_drawn_right, per_row
from support.triton_cases import assert_same_error

from treedecode import ops, triton_kernels

DTYPES = [torch.float32, torch.float16]
CUM = torch.tensor([-1.0, -2.5, -2.5, -math.inf])
GROUPS = indptr(1, 0, 3)


def beam_prune(logits, cum, groups, k, *, token_mask=None, is_logprobs=False):
    return triton_kernels.launcher("beam_prune")(logits, cum, groups, k, token_mask, is_logprobs)


def sample(logits, *, token_mask=None, **settings):
    settings = {name: value if isinstance(value, torch.Tensor) else per_row(1, **{name: value})[name]
                for name, value in settings.items()}  # fmt: skip
    return triton_kernels.launcher("sample")(logits, *(settings[name] for name in OFF), token_mask)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Makes blocks so small that small rows have several chunks and take every path."""
    import importlib

    for op, sizes in {
        "beam_prune": {"CHUNK": 512, "BLOCK": 64, "MAX_LOCAL": 20, "MAX_SORTED": 128},
        "sample": {"CHUNK": 256, "FEW": 64},
    }.items():
        module = importlib.import_module(f"treedecode.triton_kernels.{op}")
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize("k", [1, 16, 100, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_beam_prune_matches_reference(kind, k):
    for dtype in DTYPES if kind == "normal" else DTYPES[k % 3 == 1 :][:1]:
        logits = make_logits(kind, 4, 1203).to(dtype)
        assert_pruned_right(logits, CUM, GROUPS, k, beam_prune(logits, CUM, GROUPS, k))


@pytest.mark.parametrize("k", [2, 40, 600])
@pytest.mark.parametrize("vocab", [1, 2, 17, 511, 513])
def test_beam_prune_any_vocab(vocab, k):
    storage = torch.full((3, vocab + 3), math.nan)
    logits = storage[:, :vocab]
    logits.copy_(make_logits("peaked", 3, vocab))
    cum = torch.tensor([-0.25, -0.5, -0.125])
    assert_pruned_right(logits, cum, indptr(1, 2), k, beam_prune(logits, cum, indptr(1, 2), k))


@pytest.mark.parametrize("k", [4, 40, 300])
def test_beam_prune_is_what_the_cpu_computes(k):
    """The last bits of scores may differ with lse, but the order of a row's tokens is the same."""
    logits, cum = make_logits("normal", 3, 1100), torch.zeros(3)
    got, want = (f(logits, cum, indptr(1, 1, 1), k) for f in (beam_prune, ops.beam_prune))
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], want[2])
    logp = logits.log_softmax(1) - 3.0
    got, want = (f(logp, CUM[:3], indptr(3), k, is_logprobs=True) for f in (beam_prune, ops.beam_prune))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("k", [4, 40, 300])
def test_beam_prune_masks(k):
    rows, vocab = 5, 1201
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator)
    allowed = torch.rand(rows, vocab, generator=generator) < torch.tensor([0.5, 0.01, 0.0, 1.0, 0.9])[:, None]
    logits[~allowed] += 8
    mask, groups = pack(allowed), indptr(1, 1, 1, 2)
    got = beam_prune(logits, torch.zeros(rows), groups, k, token_mask=mask)
    exists = got[1] >= 0
    assert allowed[got[1][exists].long(), got[2][exists].long()].all()
    assert (got[1][2] == -1).all()
    assert_pruned_right(logits, torch.zeros(rows), groups, k, got, token_mask=mask)


@pytest.mark.parametrize("k", [8, 110])
def test_beam_prune_ties(k):
    logits = torch.zeros(3, 40)
    logits[:, [7, 30]] = 1.0
    logits[1, 3] = -0.0
    _, parent, token, _ = beam_prune(logits, torch.zeros(3), indptr(3), k)
    assert parent[0, :8].tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    assert token[0, :8].tolist() == [7, 30, 7, 30, 7, 30, 0, 1]
    _, want_parent, want_token, _ = ops.beam_prune(logits, torch.zeros(3), indptr(3), k)
    assert torch.equal(parent, want_parent)
    assert torch.equal(token, want_token)


def test_beam_prune_far_apart_values():
    logits = torch.full((3, 1500), -300.0)
    logits[0, 1400] = 500.0
    logits[1, :1000] = -math.inf
    logits[2] = torch.finfo(torch.float32).min
    logits[2, 900] = torch.finfo(torch.float32).max
    got = beam_prune(logits, torch.zeros(3), indptr(1, 1, 1), 2)
    assert got[3].tolist() == [500.0, pytest.approx(math.log(500) - 300, abs=1e-4), torch.finfo(torch.float32).max]
    assert got[2][:, 0].tolist() == [1400, 1000, 900]


@pytest.mark.parametrize("k", [10, 50, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_beam_prune_of_a_group_depends_on_nothing_else(dtype, k):
    logits, cum = make_logits("normal", 6, 1100).to(dtype), torch.linspace(-3, 0, 6)
    whole = beam_prune(logits, cum, indptr(2, 3, 1), k)
    part = beam_prune(logits[2:5], cum[2:5], indptr(3), k)
    assert torch.equal(part[0][0], whole[0][1])
    assert torch.equal(part[1][0], whole[1][1] - 2)
    assert torch.equal(part[2][0], whole[2][1])
    assert torch.equal(part[3], whole[3][2:5])


@pytest.mark.parametrize("is_logprobs", [False, True])
@pytest.mark.parametrize("k", [4, 40, 300])
def test_beam_prune_marks_the_groups_of_bad_rows(k, is_logprobs):
    logits, cum = make_logits("normal", 6, 1100), torch.zeros(6)
    groups = indptr(1, 2, 1, 1, 1)
    want = beam_prune(logits, cum, groups, k, is_logprobs=is_logprobs)
    logits[1, 1099], logits[3, 0] = math.nan, math.inf
    cum[4] = math.nan
    scores, parent, token, lse = beam_prune(logits, cum, groups, k, is_logprobs=is_logprobs)
    assert lse.isnan().tolist() == [False, True, False, True, False, False]
    assert torch.equal(lse[[0, 2, 4, 5]], want[3][[0, 2, 4, 5]])
    assert scores[1:4].isnan().all()
    assert (parent[1:4] == -1).all()
    assert (token[1:4] == -1).all()
    for got, good in zip((scores, parent, token), want[:3], strict=True):
        assert torch.equal(got[[0, 4]], good[[0, 4]])


@pytest.mark.parametrize("k", [4, 300])
@pytest.mark.parametrize("offsets", [[0, 4, 1, 3], [-9, 2, 2**31 - 1], [7, 8], [0]])
def test_beam_prune_stays_inside_whatever_the_offsets(offsets, k):
    scores, parent, token, _ = beam_prune(
        make_logits("normal", 3, 700), torch.zeros(3), torch.tensor(offsets, dtype=torch.int32), k
    )
    assert scores.shape == (len(offsets) - 1, k)
    assert ((parent >= -1) & (parent < 3)).all()
    assert ((token >= -1) & (token < 700)).all()


def test_beam_prune_no_rows():
    scores, parent, token, lse = beam_prune(torch.empty(0, 50), torch.empty(0), indptr(0, 0), 3)
    assert (scores == -math.inf).all()
    assert (parent == -1).all()
    assert (token == -1).all()
    assert lse.shape == (0,)


FILTERS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0, "top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.3, "temperature": 0.5},
    {"top_k": 50},
    {"top_k": 1},
    {"top_k": 10**6, "top_p": 0.9},
    {"top_k": 150, "top_p": 0.8},
    {"min_p": 0.05},
    {"min_p": 0.4},
    {"top_k": 60, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
]


@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "-".join(f"{k}{v}" for k, v in f.items()) or "plain")
def test_sample_matches_reference(filters):
    rows = 2
    for i, kind in enumerate(KINDS):
        logits = make_logits(kind, rows, 603).to(DTYPES[i % 2])
        settings = per_row(rows, **filters, seed=torch.arange(rows), position=77)
        assert_drawn_right(logits, sample(logits, **settings), settings)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_sample_draws_the_cpu_s_tokens(filters):
    rows = 4
    logits = make_logits("peaked", rows, 603)
    settings = per_row(rows, **filters, seed=torch.arange(rows) - 2**62, position=torch.arange(rows) * 2**33 + 5)
    got, want = sample(logits, **settings), ops.sample(logits, **settings)
    assert torch.equal(got[0], want[0])


def test_sample_draws_with_philox():
    """With equal logits, the token is floor(uniform * vocab)."""
    seed, position = torch.arange(8) * 0x123456789ABCD - 2**62, torch.arange(8) * 2**33 - 5
    logits = torch.zeros(8, 512)
    settings = per_row(8, seed=seed, position=position)
    assert torch.equal(sample(logits, **settings)[0], ops.sample(logits, **settings)[0])


@pytest.mark.parametrize("vocab", [1, 2, 17, 63, 64, 65, 255, 257])
def test_sample_any_vocab(vocab):
    rows = 5
    storage = torch.full((rows, vocab + 3), math.nan)
    logits = storage[:, :vocab]
    logits.copy_(make_logits("peaked", rows, vocab))
    settings = per_row(rows, top_p=0.9, top_k=[0, 1, 5, 0, 2000], temperature=[1, 0.5, 1, 2, 0], seed=9)
    assert_drawn_right(logits, sample(logits, **settings), settings)


@pytest.mark.parametrize("filters", [FILTERS[i] for i in (0, 2, 3, 5, 8)], ids=str)
def test_sample_masks(filters):
    rows, vocab = 5, 601
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator)
    allowed = torch.rand(rows, vocab, generator=generator) < torch.tensor([0.5, 0.02, 1.0, 0.9, 0.0])[:, None]
    allowed[4, 599] = True
    logits[~allowed] += 50
    logits[0, (~allowed[0]).nonzero()[0]] = math.nan  # the logit of a forbidden token is not read
    settings = per_row(rows, **filters, seed=torch.arange(rows))
    got = sample(logits, **settings, token_mask=pack(allowed))
    assert allowed.gather(1, got[0].long()[:, None]).all()
    assert_drawn_right(logits.masked_fill(~allowed, -math.inf), got, settings)


@pytest.mark.parametrize("size", [64, 2])
def test_sample_ties(size, monkeypatch):
    monkeypatch.setattr(
        sys.modules["treedecode.triton_kernels.sample"], "FEW", size
    )  # 2: every row searches all tokens
    logits = torch.tensor([[1.0, 2.0, 2.0, -0.0, 2.0, 1.0] + [-5.0] * 100])
    for top_k, top_p, want in [(1, 1.0, {1}), (2, 1.0, {1, 2}), (4, 1.0, {0, 1, 2, 4}), (0, 0.35, {1, 2}),
                               (3, 0.34, {1, 2})]:  # fmt: skip
        settings = OFF | {"top_k": top_k, "top_p": top_p, "temperature": 4.0 if top_k else 0.5}
        tokens = sample(logits.expand(12, -1), **settings | {"position": torch.arange(12)})[0]
        assert set(tokens.tolist()) == want


@pytest.mark.parametrize("top_p", [0.0, 1e-30])
def test_sample_always_keeps_the_best_token(top_p):
    rows = 3
    for kind in ("normal", "flat", "few"):
        logits = make_logits(kind, 1, 500).expand(rows, -1)
        best = logits.argmax(1)
        for more in ({}, {"temperature": 0.3}, {"min_p": 0.01}, {"top_k": 20}, {"top_k": 200}):
            settings = OFF | more | {"top_p": top_p, "seed": torch.arange(rows)}
            assert torch.equal(sample(logits, **settings)[0].long(), best), (kind, more)


@pytest.mark.parametrize("temperature", [1e-30, 100.0, 1e38])
def test_sample_gives_impossible_tokens_no_mass_at_any_temperature(temperature):
    rows, vocab = 3, 700
    logits = torch.full((rows, vocab), -math.inf)
    logits[:, 290:340] = make_logits("normal", rows, 50)
    logits[:, 100] = -1000.0  # possible, but far below the others
    for filters in ({}, {"top_p": 0.999}, {"min_p": 1e-6}, {"top_k": 300}):
        settings = per_row(rows, **filters, temperature=temperature, seed=torch.arange(rows))
        assert_drawn_right(logits, sample(logits, **settings), settings)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_of_a_row_depends_on_nothing_else(dtype):
    rows = 8
    logits = make_logits("normal", rows, 601).to(dtype)
    settings = per_row(
        rows,
        top_p=torch.linspace(0.1, 1, rows),
        temperature=torch.linspace(0, 2, rows),
        top_k=[0, 0, 40, 0, 3, 200, 0, 0],
        seed=torch.arange(rows),
        position=torch.arange(rows),
    )
    whole = sample(logits, **settings)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    shuffled = sample(logits[order], **{name: value[order] for name, value in settings.items()})
    for got, want in zip(shuffled, whole, strict=True):
        assert torch.equal(got, want[order])
    for row in (1, 2, 5):
        alone = sample(logits[row : row + 1], **{name: value[row : row + 1] for name, value in settings.items()})
        assert all(torch.equal(got, want[row : row + 1]) for got, want in zip(alone, whole, strict=True))


@pytest.mark.parametrize("filters", [{}, {"temperature": 0}, {"top_k": 20}, {"top_p": 0.9}], ids=str)
def test_sample_marks_bad_rows(filters):
    logits = make_logits("normal", 6, 601)
    want = sample(logits, **OFF | filters)
    logits[1, 0], logits[2, 600], logits[4] = math.nan, math.inf, -math.inf
    token, logprob, entropy = sample(logits, **OFF | filters)
    bad = [1, 2, 4]
    assert (token[bad] == -1).all()
    assert logprob[bad].isnan().all()
    assert entropy[bad].isnan().all()
    good = [0, 3, 5]
    assert all(torch.equal(got[good], one[good]) for got, one in zip((token, logprob, entropy), want, strict=True))


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 1.5},
     {"top_p": math.nan}, {"min_p": -0.5}, {"min_p": math.nan}],
    ids=str,
)  # fmt: skip
def test_sample_marks_rows_of_bad_settings(bad):
    settings = per_row(2)
    for name, value in bad.items():
        settings[name] = torch.tensor([settings[name][0].item(), value], dtype=settings[name].dtype)
    token, logprob, entropy = sample(make_logits("normal", 2, 300), **settings)
    assert token[0] >= 0
    assert token[1] == -1
    assert logprob.isnan().tolist() == entropy.isnan().tolist() == [False, True]


def test_sample_no_rows():
    assert [tuple(out.shape) for out in sample(torch.empty(0, 50), **OFF)] == [(0,)] * 3


GOOD = {
    "beam_prune": {"logits": torch.zeros(5, 9), "cum_logprobs": torch.zeros(5), "group_indptr": indptr(2, 3),
                   "num_candidates": 4, "token_mask": None, "is_logprobs": False},
    "sample": {"logits": torch.zeros(5, 9), **per_row(5), "token_mask": None},
}  # fmt: skip
LOGITS = [
    {"logits": torch.zeros(5)}, {"logits": torch.zeros(5, 9).double()}, {"logits": torch.zeros(5, 18)[:, ::2]},
    {"logits": torch.zeros(5, 0)}, {"token_mask": torch.ones(5, 2, dtype=torch.int32)},
    {"token_mask": torch.ones(5, 1)},
]  # fmt: skip
BAD = {
    "beam_prune": [
        *LOGITS, {"cum_logprobs": torch.zeros(4)}, {"cum_logprobs": torch.zeros(5).double()},
        {"cum_logprobs": torch.zeros(10)[::2]}, {"group_indptr": torch.tensor([0, 5])},
        {"group_indptr": torch.zeros(0, dtype=torch.int32)}, {"num_candidates": 0}, {"num_candidates": 65537},
    ],
    "sample": [
        *LOGITS, {"temperature": torch.ones(4)}, {"temperature": torch.ones(5).double()}, {"top_k": torch.ones(5)},
        {"top_p": torch.ones(5, 1)}, {"min_p": torch.ones(5).half()}, {"seed": torch.ones(5, dtype=torch.int32)},
        {"position": torch.ones(2, dtype=torch.int64)},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("op", "change"), [(op, change) for op in BAD for change in BAD[op]])
def test_same_errors_as_the_native_op(op, change):
    assert_same_error(op, GOOD[op], change)

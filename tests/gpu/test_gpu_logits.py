"""beam_prune, sample and beam_update on CUDA tensors, by every backend, with the CPU tests' inputs and budgets."""

import math

import pytest
import torch
from support.beam_prune_cases import assert_pruned_right, indptr
from support.beam_update_cases import POOL, i32
from support.gpu_cases import DEVICE, GPU, to_cpu, to_gpu
from support.logits_cases import DTYPES, KINDS, make_logits, pack
from support.sample_cases import FILTERS, OFF, assert_drawn_right, per_row

from treedecode import ops, reference

pytestmark = GPU


def prune(logits, cum, groups, k, token_mask=None, **options):
    """Runs `ops.beam_prune` on the GPU, and checks that a second call gives the same bits."""
    args = to_gpu(logits), to_gpu(cum), to_gpu(groups), k
    first, second = (to_cpu(ops.beam_prune(*args, token_mask=to_gpu(token_mask), **options)) for _ in range(2))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))
    return first


def draw(logits, settings, token_mask=None):
    """Runs `ops.sample` on the GPU."""
    on_gpu = {name: value.to(DEVICE) for name, value in settings.items()}
    return to_cpu(ops.sample(to_gpu(logits), **on_gpu, token_mask=to_gpu(token_mask)))


# -- beam_prune --


@pytest.mark.parametrize("k", [1, 16, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_prune(through, kind, k):
    through("beam_prune")
    cum = torch.tensor([-1.0, -2.5, -2.5, 0.0, -math.inf, -7.0])
    groups = indptr(1, 3, 0, 2)
    for dtype in DTYPES:
        logits = make_logits(kind, 6, 3003).to(dtype)
        assert_pruned_right(logits, cum, groups, k, prune(logits, cum, groups, k))


@pytest.mark.parametrize("vocab", [1, 2, 17, 63, 1023, 1025, 4100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prune_any_vocab(through, dtype, vocab):
    through("beam_prune")
    logits = torch.full((4, vocab + 3), math.nan, dtype=dtype)[:, :vocab]
    logits.copy_(make_logits("peaked", 4, vocab))
    cum = -torch.rand(4, generator=torch.Generator().manual_seed(0))
    assert_pruned_right(logits, cum, indptr(4), 8, prune(logits, cum, indptr(4), 8))


@pytest.mark.parametrize("kind", ["normal", "ascending", "equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prune_real_vocab(through, dtype, kind):
    through("beam_prune")
    logits, cum = make_logits(kind, 8, 128256).to(dtype), torch.linspace(-3, 0, 8)
    for groups, k in ((indptr(8), 16), (indptr(4, 4), 1024)):
        assert_pruned_right(logits, cum, groups, k, prune(logits, cum, groups, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_prune_masks(through, dtype):
    through("beam_prune")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3001, generator=generator).to(dtype)
    allowed = torch.rand(5, 3001, generator=generator) < torch.tensor([0.5, 0.01, 0.0, 1.0, 0.9])[:, None]
    logits[~allowed] += 8
    cum, groups, mask = torch.zeros(5), indptr(1, 1, 1, 2), pack(allowed)
    for k in (4, 40):
        got = prune(logits, cum, groups, k, mask)
        found = got[1] >= 0
        assert allowed[got[1][found].long(), got[2][found].long()].all()
        assert (got[1][2] == -1).all()
        assert_pruned_right(logits, cum, groups, k, got, token_mask=mask)


def test_prune_ties_and_log_probabilities(through):
    through("beam_prune")
    logits = torch.zeros(3, 40)
    logits[:, [7, 30]] = 1.0
    _, parent, token, _ = prune(logits, torch.zeros(3), indptr(3), 8)
    assert parent.tolist() == [[0, 0, 1, 1, 2, 2, 0, 0]]
    assert token.tolist() == [[7, 30, 7, 30, 7, 30, 0, 1]]
    x, cum = make_logits("impossible", 4, 2000).log_softmax(1) - 3.0, -torch.arange(4.0)
    got = prune(x, cum, indptr(2, 2), 9, is_logprobs=True)
    want = reference.beam_prune(x, cum, indptr(2, 2), 9, is_logprobs=True)
    assert torch.equal(got[0], want[0].float())
    assert torch.equal(got[2], want[2])
    assert not got[3].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pruning_does_not_depend_on_the_batch(through, dtype):
    through("beam_prune")
    logits, cum = make_logits("normal", 6, 40001).to(dtype), torch.linspace(-3, 0, 6)
    whole = prune(logits, cum, indptr(2, 3, 1), 20)
    part = prune(logits[2:5].clone(), cum[2:5], indptr(3), 20)
    assert torch.equal(part[0][0], whole[0][1])
    assert torch.equal(part[1][0] + 2, whole[1][1])
    assert torch.equal(part[2][0], whole[2][1])
    assert torch.equal(part[3], whole[3][2:5])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 1500, 3002])
def test_prune_marks_a_bad_row(through, column, bad):
    through("beam_prune")
    logits = make_logits("normal", 5, 3003)
    want = prune(logits, torch.zeros(5), indptr(2, 3), 4)
    logits[3, column] = bad
    scores, parent, token, lse = prune(logits, torch.zeros(5), indptr(2, 3), 4)
    assert lse.isnan().tolist() == [False, False, False, True, False]
    assert scores[1].isnan().all()
    assert (parent[1] == -1).all()
    assert (token[1] == -1).all()
    for got, good in zip((scores, parent, token), want, strict=False):
        assert torch.equal(got[0], good[0])


# -- sample --


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "-".join(f"{k}{v}" for k, v in f.items()) or "plain")
def test_sample(through, filters, kind):
    """Tokens are those of the reference, and so of the CPU's op, up to roundings of the borders."""
    through("sample")
    for dtype in DTYPES:
        logits = make_logits(kind, 7, 5003).to(dtype)
        settings = per_row(7, **filters, seed=torch.arange(7), position=77)
        assert_drawn_right(logits, draw(logits, settings), settings)


@pytest.mark.parametrize("vocab", [1, 2, 17, 33, 1023, 1025, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_any_vocab(through, dtype, vocab):
    through("sample")
    logits = torch.full((5, vocab + 3), math.nan, dtype=dtype)[:, :vocab]
    logits.copy_(make_logits("peaked", 5, vocab))
    settings = per_row(5, top_p=0.9, top_k=[0, 1, 5, 0, 2000], temperature=[1, 0.5, 1, 2, 0], seed=9)
    assert_drawn_right(logits, draw(logits, settings), settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sample_real_vocab(through, dtype):
    through("sample")
    logits = make_logits("normal", 12, 128256).to(dtype)
    top_p, top_k = [1.0, 0.9, 0.5, 1.0] * 3, [0, 0, 40, 1000] * 3
    settings = per_row(12, top_p=top_p, top_k=top_k, temperature=[1.0] * 8 + [0.7] * 4, seed=torch.arange(12))
    assert_drawn_right(logits, draw(logits, settings), settings)


@pytest.mark.parametrize("filters", FILTERS[:6], ids=str)
def test_sample_masks(through, filters):
    through("sample")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3001, generator=generator)
    allowed = torch.rand(6, 3001, generator=generator) < torch.tensor([0.5, 0.01, 0.001, 1.0, 0.9, 0.0])[:, None]
    allowed[5, 2999] = True
    logits[~allowed] += 50
    logits[0, (~allowed[0]).nonzero()[0]] = math.nan
    settings = per_row(6, **filters, seed=torch.arange(6))
    got = draw(logits, settings, pack(allowed))
    assert allowed.gather(1, got[0].long()[:, None]).all()
    assert_drawn_right(logits.masked_fill(~allowed, -math.inf), got, settings)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9, "top_k": 300, "temperature": 0.8}], ids=str)
def test_draws_are_those_of_the_cpu(through, filters):
    """Of 1,000 rows none differs: a border falls between the roundings of two sums about once in a million draws."""
    through("sample")
    logits = make_logits("normal", 1000, 2003)
    settings = per_row(1000, **filters, seed=torch.arange(1000) * 7919, position=torch.arange(1000))
    token = draw(logits, settings)[0]
    assert (token != ops.sample(logits, **settings)[0]).sum() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_draw_does_not_depend_on_the_batch(through, dtype):
    through("sample")
    logits = make_logits("normal", 9, 40001).to(dtype)
    settings = per_row(9, top_p=[1.0, 0.9, 0.5] * 3, top_k=[0, 50, 3000] * 3, seed=torch.arange(9), position=5)
    whole = draw(logits, settings)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for rows in (order, order[:1], order[3:7]):
        part = draw(logits[rows].clone(), {name: value[rows] for name, value in settings.items()})
        assert all(torch.equal(got, want[rows]) for got, want in zip(part, whole, strict=True))


def test_sample_ties(through):
    through("sample")
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0] + [-5.0] * 100])
    for top_k, top_p, want in [(1, 1.0, {1}), (2, 1.0, {1, 2}), (4, 1.0, {0, 1, 2, 4}), (3, 0.34, {1, 2})]:
        settings = per_row(400, top_k=top_k, top_p=top_p, temperature=4.0, position=torch.arange(400))
        assert set(draw(logits.expand(400, -1).clone(), settings)[0].tolist()) == want
    assert draw(logits, per_row(1, temperature=0.0))[0].tolist() == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sample_marks_a_bad_row(through, bad):
    through("sample")
    logits = make_logits("normal", 5, 5003)
    for filters in ({}, {"temperature": 0}, {"top_k": 20}, {"top_p": 0.9, "temperature": 0.5}):
        settings = per_row(5, **filters, seed=torch.arange(5))
        want = draw(logits, settings)
        broken = logits.clone()
        broken[3, slice(None) if bad == -math.inf else 700] = bad
        token, logprob, entropy = draw(broken, settings)
        assert token[3] == -1
        assert logprob[3].isnan()
        assert entropy[3].isnan()
        for got, good in zip((token, logprob, entropy), want, strict=True):
            assert torch.equal(got[[0, 1, 2, 4]], good[[0, 1, 2, 4]])


def test_numbers_for_all_rows():
    """A number for all rows goes to the device once."""
    logits = make_logits("normal", 4, 500).to(DEVICE)
    settings = OFF | {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 2**40, "position": 12}
    by_row = {name: value.to(DEVICE) for name, value in per_row(4, **settings).items()}
    for got, want in zip(ops.sample(logits, **settings), ops.sample(logits, **by_row), strict=True):
        assert torch.equal(got, want)


# -- beam_update --


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("seed", range(6))
def test_beam_update(through, seed, early_stopping):
    """Several steps of several searches equal the reference, with ties, stops and searches that end."""
    through("beam_update")
    generator = torch.Generator().manual_seed(seed)

    def randint(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    num_beams = [1, 4, 3, 8][: 1 + seed % 4]
    groups, eos, use_stop = len(num_beams), list(range(seed % 3)), bool(seed % 2)
    width = ops.beam_candidates(max(num_beams), len(eos)) + 3
    beam_indptr = indptr(*num_beams)
    want = {
        "pool_scores": torch.full((sum(num_beams),), -1e9),
        **{name: torch.zeros(sum(num_beams), dtype=torch.int32) for name in POOL[1:]},
        "done": torch.zeros(groups, dtype=torch.bool),
    }
    got = {name: tensor.to(DEVICE, copy=True) for name, tensor in want.items()}
    want["pool_scores"] = want["pool_scores"].double()
    for step in range(7):
        row_indptr = torch.arange(groups + 1, dtype=torch.int32) if step == 0 else beam_indptr
        scores = -(randint(300, groups, width) * 2.0**-4).sort(dim=1).values - step
        parent = torch.stack([a + randint(int(b - a), width) for a, b in row_indptr.unfold(0, 2, 1)]).int()
        args = {
            "scores": scores,
            "parent": parent,
            "token": randint(9, groups, width).int(),
            "row_indptr": row_indptr,
            "beam_indptr": beam_indptr,
            "gen_lens": torch.full((groups,), step, dtype=torch.int32),
            "max_new_tokens": torch.full((groups,), 7, dtype=torch.int32),
            "eos_ids": i32(eos),
            "length_penalty": [1.0, 0.0, -0.7, 2.0][seed % 4],
            "early_stopping": early_stopping,
            "stop": randint(10, groups, width) < 3 if use_stop else None,
        }
        on_gpu = {name: to_gpu(x) if isinstance(x, torch.Tensor) else x for name, x in args.items()}
        running = to_cpu(ops.beam_update(**on_gpu, **got))
        want_running = reference.beam_update(**args, **want)
        for name in (*POOL[1:], "done"):
            assert torch.equal(got[name].cpu(), want[name]), (step, name)
        assert torch.equal(running[0], want_running[0].float())
        assert torch.equal(running[1], want_running[1])
        assert torch.equal(running[2], want_running[2])
        # a finished score is a quotient by a rounded divisor: twice half an ulp
        budget = torch.finfo(torch.float32).eps * want["pool_scores"].abs()
        assert ((got["pool_scores"].cpu().double() - want["pool_scores"]).abs() <= budget).all()

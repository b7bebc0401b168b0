import math

import pytest
import torch
from support.beam_prune_cases import assert_pruned_right, indptr
from support.logits_cases import DTYPES, KINDS, make_logits, pack

from treedecode import ops
from treedecode.reference import beam_prune as reference_beam_prune


@pytest.mark.parametrize("k", [1, 5, 16, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(kind, k, isa):
    rows, vocab = 6, 3003
    cum = torch.tensor([-1.0, -2.5, -2.5, 0.0, -math.inf, -7.0])
    groups = indptr(1, 3, 0, 2)
    for dtype in DTYPES:
        logits = make_logits(kind, rows, vocab).to(dtype)
        assert_pruned_right(logits, cum, groups, k, ops.beam_prune(logits, cum, groups, k))


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 63, 65, 1023, 1025, 4100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_vocab(dtype, vocab, isa):
    rows = 4
    storage = torch.full((rows, vocab + 3), math.nan, dtype=dtype)
    logits = storage[:, :vocab]
    logits.copy_(make_logits("peaked", rows, vocab))
    cum = -torch.rand(rows, generator=torch.Generator().manual_seed(0))
    assert_pruned_right(logits, cum, indptr(4), 8, ops.beam_prune(logits, cum, indptr(4), 8))


@pytest.mark.parametrize("kind", ["normal", "ascending", "descending", "equal"])
def test_several_chunks_and_many_candidates(kind, isa):
    logits = make_logits(kind, 2, 70001)
    cum = torch.zeros(2)
    for k in (2, 1024):
        assert_pruned_right(logits, cum, indptr(2), k, ops.beam_prune(logits, cum, indptr(2), k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(dtype, isa):
    rows, vocab = 5, 3001
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator).to(dtype)
    allowed = torch.rand(rows, vocab, generator=generator) < torch.tensor([0.5, 0.01, 0.0, 1.0, 0.9])[:, None]
    logits[~allowed] += 8
    mask, cum, groups = pack(allowed), torch.zeros(rows), indptr(1, 1, 1, 2)
    for k in (4, 40):
        got = ops.beam_prune(logits, cum, groups, k, token_mask=mask)
        exists = got[1] >= 0
        assert allowed[got[1][exists].long(), got[2][exists].long()].all()
        assert (got[1][2] == -1).all()
        assert_pruned_right(logits, cum, groups, k, got, token_mask=mask)


def test_log_probabilities_are_used_as_they_are(isa):
    x = make_logits("impossible", 4, 2000).log_softmax(1) - 3.0
    cum = -torch.arange(4.0)
    got = ops.beam_prune(x, cum, indptr(2, 2), 9, is_logprobs=True)
    want = reference_beam_prune(x, cum, indptr(2, 2), 9, is_logprobs=True)
    assert torch.equal(got[0], want[0].float())
    assert torch.equal(got[2], want[2])
    assert not got[3].any()


def test_ties(isa):
    logits = torch.zeros(3, 40)
    logits[:, [7, 30]] = 1.0
    _, parent, token, _ = ops.beam_prune(logits, torch.zeros(3), indptr(3), 8)
    assert parent.tolist() == [[0, 0, 1, 1, 2, 2, 0, 0]]
    assert token.tolist() == [[7, 30, 7, 30, 7, 30, 0, 1]]


def test_far_apart_values(isa):
    """The base of the exponentials must move up when a later block is far above the first ones."""
    logits = torch.full((3, 9000), -300.0)
    logits[0, 8000] = 500.0
    logits[1, :5000] = -math.inf
    logits[2] = torch.finfo(torch.float32).min
    logits[2, 4500] = torch.finfo(torch.float32).max
    got = ops.beam_prune(logits, torch.zeros(3), indptr(1, 1, 1), 2)
    assert got[3].tolist() == [500.0, pytest.approx(math.log(4000) - 300, abs=1e-4), torch.finfo(torch.float32).max]
    assert got[2][:, 0].tolist() == [8000, 5000, 4500]


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_batch_do_not_matter(dtype, isa):
    logits = make_logits("normal", 6, 40001).to(dtype)
    cum = torch.linspace(-3, 0, 6)
    whole = ops.beam_prune(logits, cum, indptr(2, 3, 1), 20)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = ops.beam_prune(logits, cum, indptr(2, 3, 1), 20)
    finally:
        torch.set_num_threads(threads)
    part = ops.beam_prune(logits[2:5], cum[2:5], indptr(3), 20)
    for i, (got, want) in enumerate(zip(single, whole, strict=True)):
        assert torch.equal(got, want)
        assert torch.equal(part[i][0] if i < 3 else part[i], (whole[i][1] - 2 * (i == 1)) if i < 3 else whole[i][2:5])


@pytest.mark.parametrize("k", [5, 100])
def test_flushed_denormals_change_nothing(k, isa):
    """The number next below 0 is a denormal, which is equal to 0 where denormals are flushed."""
    logits = torch.full((2, 6000), -1.0)
    logits[:, 1::2] = 0.0
    args = logits, torch.zeros(2), indptr(1, 1), k
    want = ops.beam_prune(*args)
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        got = ops.beam_prune(*args)
    finally:
        torch.set_flush_denormal(False)
    assert want[2][0].tolist() == list(range(1, 2 * k, 2))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_more_candidates_than_tokens():
    """Scratch memory depends on the number of tokens of a row, not on the number of candidates asked for."""
    rows, k = 40000, 65536
    logits, cum = make_logits("normal", rows, 3), torch.zeros(rows)
    got = ops.beam_prune(logits, cum, indptr(rows), k)
    want = logits.log_softmax(1).flatten().sort(descending=True).values[:k]
    torch.testing.assert_close(got[0][0], want, rtol=0, atol=1e-6)
    pointed = logits.log_softmax(1)[got[1][0].long(), got[2][0].long()]
    torch.testing.assert_close(got[0][0], pointed, rtol=0, atol=1e-6)
    few = ops.beam_prune(logits[:4], cum[:4], indptr(2, 2), 65536)
    for group in range(2):
        exact = ops.beam_prune(logits[2 * group :][:2], cum[:2], indptr(2), 6)
        assert torch.equal(few[0][group, :6], exact[0][0])
        assert torch.equal(few[1][group, :6] - 2 * group, exact[1][0])
        assert torch.equal(few[2][group, :6], exact[2][0])
        assert (few[1][group, 6:] == -1).all()


def test_logits_that_are_denormals(isa):
    """Denormal logits are ranked as any others, also around the best of a block, which sets the threshold."""
    tiny = torch.finfo(torch.float32).tiny
    logits = torch.tensor([0.0, tiny / 2, -tiny / 2, tiny / 4, -tiny, tiny]).repeat(1000)[None]
    logits = logits[:, torch.randperm(6000, generator=torch.Generator().manual_seed(0))]
    for k in (5, 1500, 2800):
        _, _, token, _ = ops.beam_prune(logits, torch.zeros(1), indptr(1), k, is_logprobs=True)
        assert torch.equal(token[0].long(), logits[0].sort(descending=True, stable=True).indices[:k])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 1500, 3002])
def test_bad_row_is_named(column, bad, isa):
    logits = make_logits("normal", 5, 3003)
    logits[3, column] = bad
    for is_logprobs in (False, True):
        with pytest.raises(ValueError, match=r"logits: expected numbers below \+inf, got NaN or \+inf in row 3"):
            ops.beam_prune(logits, torch.zeros(5), indptr(5), 4, is_logprobs=is_logprobs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(5)}, ValueError, r"logits: expected shape \[rows, vocab\]"),
        ({"logits": torch.zeros(5, 9, dtype=torch.float64)}, TypeError, "logits: expected dtype float32, bfloat16"),
        ({"cum_logprobs": torch.zeros(4)}, ValueError, r"cum_logprobs: expected shape \[rows\] = \[5\], got \[4\]"),
        ({"cum_logprobs": torch.zeros(5).double()}, TypeError, "cum_logprobs: expected dtype float32, got float64"),
        ({"cum_logprobs": torch.tensor([0, 0, math.nan, 0, 0])}, ValueError, "cum_logprobs: .* got nan in row 2"),
        ({"cum_logprobs": torch.tensor([0, math.inf, 0, 0, 0])}, ValueError, "cum_logprobs: .* got inf in row 1"),
        ({"group_indptr": indptr(4)}, ValueError, "group_indptr: expected offsets from 0 to rows = 5"),
        ({"group_indptr": torch.tensor([0, 4, 2, 5], dtype=torch.int32)}, ValueError, "got 2 after 4 at index 2"),
        ({"group_indptr": torch.tensor([0, 5])}, TypeError, "group_indptr: expected dtype int32, got int64"),
        ({"num_candidates": 0}, ValueError, "num_candidates: expected 1 to 65536, got 0"),
        ({"token_mask": torch.ones(5, 2, dtype=torch.int32)}, ValueError, r"token_mask: expected shape .* \[5, 1\]"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "logits": torch.zeros(5, 9),
        "cum_logprobs": torch.zeros(5),
        "group_indptr": indptr(2, 3),
        "num_candidates": 4,
    }
    with pytest.raises(error, match=message):
        ops.beam_prune(**arguments | change)


def test_opcheck():
    args = (torch.randn(3, 40), torch.zeros(3), indptr(1, 2), 5)
    torch.library.opcheck(torch.ops.treedecode.beam_prune, (*args, None, False))
    torch.library.opcheck(torch.ops.treedecode.beam_prune, (*args, torch.full((3, 2), -1, dtype=torch.int32), True))

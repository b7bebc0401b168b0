"""The CUDA kernels of beam_prune, run on the host, with the checks of the CPU kernel."""

import itertools
import math

import pytest
import torch
from support import cuda_library
from support.beam_prune_cases import assert_pruned_right, indptr
from support.logits_cases import DTYPES, KINDS, make_logits, pack
from support.logits_kernels import beam_prune
from support.simt_kernels import SEEDS

from treedecode import ops


@pytest.mark.parametrize("k", [1, 16, 100, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(kind, k):
    cum = torch.tensor([-1.0, -2.5, -2.5, 0.0, -math.inf, -7.0])
    groups = indptr(1, 3, 0, 2)
    for seed, dtype in enumerate(DTYPES):
        logits = make_logits(kind, 6, 1003).to(dtype)
        got = beam_prune(logits, cum, groups, k, chunk_len=(256, None, 512)[seed], seed=seed, resident_blocks=3)
        assert_pruned_right(logits, cum, groups, k, got)


@pytest.mark.parametrize("vocab", [1, 2, 15, 17, 63, 1025])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_vocab_and_alignment(dtype, vocab):
    storage = torch.full((4, vocab + 3), math.nan, dtype=dtype)
    logits = storage[:, 1 : vocab + 1]
    logits.copy_(make_logits("peaked", 4, vocab))
    cum = -torch.rand(4, generator=torch.Generator().manual_seed(0))
    assert_pruned_right(logits, cum, indptr(4), 8, beam_prune(logits, cum, indptr(4), 8))


@pytest.mark.parametrize("kind", ["normal", "ascending", "equal"])
@pytest.mark.parametrize("k", [1024, 3000])
def test_many_candidates(kind, k):
    """1024 candidates are sorted in shared memory, 3000 in global memory."""
    logits, cum = make_logits(kind, 2, 4001).to(torch.bfloat16), torch.tensor([-0.5, 0.0])
    assert_pruned_right(logits, cum, indptr(2), k, beam_prune(logits, cum, indptr(2), k, chunk_len=2048, seed=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_several_chunks(dtype):
    logits, cum = make_logits("normal", 2, 17003).to(dtype), torch.zeros(2)
    for k in (16, 200):
        assert_pruned_right(logits, cum, indptr(2), k, beam_prune(logits, cum, indptr(2), k))


def test_more_candidates_than_tokens():
    """Scratch memory depends on the number of tokens of a row, not on the number of candidates asked for."""
    logits, cum = make_logits("normal", 100, 3), torch.zeros(100)
    assert_pruned_right(logits, cum, indptr(99, 1), 2500, beam_prune(logits, cum, indptr(99, 1), 2500))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(dtype):
    rows, vocab = 5, 1501
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator).to(dtype)
    allowed = torch.rand(rows, vocab, generator=generator) < torch.tensor([0.5, 0.01, 0.0, 1.0, 0.9])[:, None]
    logits[~allowed] += 8
    mask, cum, groups = pack(allowed), torch.zeros(rows), indptr(1, 1, 1, 2)
    for k in (4, 40):
        got = beam_prune(logits, cum, groups, k, token_mask=mask, chunk_len=512)
        exists = got[1] >= 0
        assert allowed[got[1][exists].long(), got[2][exists].long()].all()
        assert (got[1][2] == -1).all()
        assert_pruned_right(logits, cum, groups, k, got, token_mask=mask)


def test_log_probabilities_are_used_as_they_are():
    x = make_logits("impossible", 4, 1000).log_softmax(1) - 3.0
    cum, groups = -torch.arange(4.0), indptr(2, 2)
    want = ops.beam_prune(x, cum, groups, 9, is_logprobs=True)
    for a, b in zip(beam_prune(x, cum, groups, 9, is_logprobs=True, chunk_len=256), want, strict=True):
        assert torch.equal(a, b)


def test_ties():
    logits = torch.zeros(3, 40)
    logits[:, [7, 30]] = 1.0
    logits[:, 5] = -0.0
    for seed in SEEDS:
        _, parent, token, _ = beam_prune(logits, torch.zeros(3), indptr(3), 8, chunk_len=32, seed=seed)
        assert parent.tolist() == [[0, 0, 1, 1, 2, 2, 0, 0]]
        assert token.tolist() == [[7, 30, 7, 30, 7, 30, 0, 1]]


def test_logits_that_only_rounding_makes_equal_scores_keep_their_order():
    logits = torch.tensor([[0.0, 2.0**-22, 2.0**-23, -1.0]])
    scores, _, token, _ = beam_prune(logits, torch.tensor([-1000.0]), indptr(1), 3)
    assert scores[0].unique().numel() == 1
    assert token.tolist() == [[1, 2, 0]]


def test_far_apart_values():
    logits = torch.full((3, 3000), -300.0)
    logits[0, 2500] = 500.0
    logits[1, :1000] = -math.inf
    logits[2] = torch.finfo(torch.float32).min
    logits[2, 1500] = torch.finfo(torch.float32).max
    for chunk_len in (None, 512):
        got = beam_prune(logits, torch.zeros(3), indptr(1, 1, 1), 2, chunk_len=chunk_len)
        assert got[3].tolist() == [500.0, pytest.approx(math.log(2000) - 300, abs=1e-4), torch.finfo(torch.float32).max]
        assert got[2][:, 0].tolist() == [2500, 1000, 1500]


@pytest.mark.parametrize("dtype", DTYPES)
def test_schedule_and_batch_do_not_matter(dtype):
    """Rows of 1001 tokens have every alignment, which must not change the order of a sum."""
    logits = make_logits("normal", 6, 1001).to(dtype)
    cum, groups = torch.linspace(-3, 0, 6), indptr(2, 3, 1)
    whole = beam_prune(logits, cum, groups, 20, chunk_len=512)
    for seed in SEEDS[1:]:
        again = beam_prune(logits, cum, groups, 20, chunk_len=512, seed=seed, resident_blocks=4)
        assert all(map(torch.equal, again, whole))
    part = beam_prune(logits[2:5].clone(), cum[2:5].clone(), indptr(3), 20, chunk_len=512)
    for i, (got, want) in enumerate(zip(part, whole, strict=True)):
        assert torch.equal(got[0] if i < 3 else got, want[1] - 2 * (i == 1) if i < 3 else want[2:5])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("is_logprobs", [False, True])
def test_bad_logits_are_marked(is_logprobs, bad):
    logits, cum = make_logits("normal", 5, 1003), torch.zeros(5)
    want = beam_prune(logits, cum, indptr(2, 2, 1), 4, is_logprobs=is_logprobs)
    logits[3, 700] = bad
    got = beam_prune(logits, cum, indptr(2, 2, 1), 4, is_logprobs=is_logprobs, chunk_len=256, resident_blocks=2)
    assert got[3].isnan().tolist() == [False, False, False, True, False]
    assert got[0][1].isnan().all()
    assert (got[1][1] == -1).all()
    assert (got[2][1] == -1).all()
    for a, b in zip(got[1:3], want[1:3], strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_cumulative_logprobs_are_marked(bad):
    logits, cum = make_logits("normal", 4, 100), torch.zeros(4)
    want = beam_prune(logits, cum, indptr(2, 2), 4)
    cum[1] = bad
    got = beam_prune(logits, cum, indptr(2, 2), 4)
    assert got[0][0].isnan().all()
    assert (got[1][0] == -1).all()
    assert torch.equal(got[3], want[3])
    assert torch.equal(got[0][1], want[0][1])


@pytest.mark.parametrize(
    "offsets",
    [[0, 4, 2, 5], [0, 4], [1, 5], [0, -3, 5], [0, 7, 5], [0, 2**31 - 1, 5], [-1, 5], [0, 5, 0, 5], [5, 0], [0]],
)
def test_invalid_offsets(offsets):
    """With bad offsets only groups that own their rows alone may have results, and no write is out of bounds."""
    logits, cum = make_logits("normal", 5, 50), torch.zeros(5)
    groups = torch.tensor(offsets, dtype=torch.int32)
    scores, parent, token, lse = beam_prune(logits, cum, groups, 3, resident_blocks=3)
    assert not lse.isnan().any()
    sound = offsets[0] == 0 and offsets[-1] == 5
    for group, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if not scores[group].isnan().any():
            assert sound
            assert begin == end or ((begin <= parent[group]) & (parent[group] < end)).all()
        else:
            assert (parent[group] == -1).all()
            assert (token[group] == -1).all()


def test_no_rows_and_no_groups():
    empty = torch.empty(0, 40)
    scores, parent, token, lse = beam_prune(empty, torch.empty(0), indptr(0, 0), 3)
    assert (scores == -math.inf).all()
    assert parent.tolist() == token.tolist() == [[-1] * 3] * 2
    assert lse.shape == (0,)
    assert beam_prune(empty, torch.empty(0), indptr(), 3)[0].shape == (0, 3)


@cuda_library.needs_library
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, ValueError, "logits: expected a CUDA tensor, got cpu"),
        ({"logits": torch.zeros(5)}, ValueError, r"logits: expected shape \[rows, vocab\]"),
        ({"logits": torch.zeros(5, 9, dtype=torch.float64)}, TypeError, "logits: expected dtype float32, bfloat16"),
        ({"cum_logprobs": torch.zeros(4)}, ValueError, r"cum_logprobs: expected shape \[rows\] = \[5\], got \[4\]"),
        ({"cum_logprobs": torch.zeros(5).double()}, TypeError, "cum_logprobs: expected dtype float32, got float64"),
        ({"group_indptr": torch.tensor([0, 5])}, TypeError, "group_indptr: expected dtype int32, got int64"),
        ({"group_indptr": torch.zeros(0).int()}, ValueError, "group_indptr: expected offsets from 0 to rows = 5"),
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
        "token_mask": None,
        "is_logprobs": False,
    }
    with pytest.raises(error, match=message):
        cuda_library.call("beam_prune", *(arguments | change).values())

"""Triton kernel of beam_update: a program per group."""

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from treedecode.triton_kernels import check

# Added to the score and never assigned: the order of such beams after rounding is part of the semantics.
_BANNED = tl.constexpr(-1.0e9)


@triton.jit
def _power(base, exponent):
    """Returns base ** exponent for an integer base, in fp64, then rounded to fp32."""
    x = tl.exp2(exponent * tl.log2(base.to(tl.float64)))
    # The last digits of x are not exact. That matters where x is half-way between two fp32 numbers, and a power of an
    # integer can be there only if it is whole.
    whole = tl.floor(x + 0.5)
    return tl.where(tl.abs(x - whole) <= 1e-12 * x, whole, x).to(tl.float32)


@triton.jit
def _num_before(scores_ptr, n, added, divisor, score, position, steps):
    """Returns how many of `n` descending scores, each (score + added) / divisor, come before `score` at `position`.

    These are the higher ones, and equal ones with a lower index.
    """
    low = tl.zeros(score.shape, tl.int32)
    high = low + n
    for _ in range(steps):
        middle = (low + high) // 2
        inside = low < high
        other = tl.div_rn(tl.load(scores_ptr + middle, mask=inside, other=0.0) + added, divisor)
        before = inside & ((other > score) | ((other == score) & (middle < position)))
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["num_groups", "num_pool", "penalty_bits", "steps"])
def _beam_update_kernel(
    running_scores_ptr, running_parent_ptr, running_token_ptr,  # [num_pool] fp32, int32, int32 out
    pool_scores_ptr, pool_lens_ptr, pool_parents_ptr, pool_tokens_ptr,  # [num_pool] fp32, int32, int32, int32
    done_ptr,  # [num_groups] bool
    scores_ptr, parent_ptr, token_ptr,  # [num_groups, num_candidates] fp32, int32, int32
    stop_ptr,  # [num_groups, num_candidates] bool; may be null
    row_indptr_ptr, beam_indptr_ptr,  # [num_groups + 1] int32
    gen_lens_ptr, max_new_tokens_ptr,  # [num_groups] int32
    eos_ids_ptr,  # [num_eos] int32
    num_hits_ptr,  # [num_groups, num_candidates + 1] int32 scratch: hits before each rank
    old_scores_ptr,  # [num_pool] fp32 scratch: pool_scores before this step
    num_groups, num_pool, num_candidates, num_eos,
    penalty_bits,  # the bits of the length penalty as fp64; a floating-point argument would be rounded to fp32
    steps,  # of a binary search in any of the rows
    EARLY_STOPPING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    penalty = penalty_bits.to(tl.int64).to(tl.float64, bitcast=True)

    # With invalid offsets groups could write to each other's beams, so then all groups are refused.
    invalid = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_groups, BLOCK):
        g = start + lane
        for indptr_ptr in tl.static_range(2):
            offsets_ptr = row_indptr_ptr if indptr_ptr == 0 else beam_indptr_ptr
            begin = tl.load(offsets_ptr + g, mask=g < num_groups, other=0)
            end = tl.load(offsets_ptr + g + 1, mask=g < num_groups, other=0)
            invalid |= ((g < num_groups) & ((begin >= end) | ((g == 0) & (begin != 0)))).to(tl.int32)
    broken = (tl.max(invalid, 0) != 0) | (tl.load(beam_indptr_ptr + num_groups) != num_pool)
    share = (num_pool + num_groups - 1) // num_groups
    first_beam = tl.where(broken, tl.minimum(group * share, num_pool), tl.load(beam_indptr_ptr + group))
    end_beam = tl.where(broken, tl.minimum(first_beam + share, num_pool), tl.load(beam_indptr_ptr + group + 1))
    first_row = tl.where(broken, 0, tl.load(row_indptr_ptr + group))
    end_row = tl.where(broken, 1, tl.load(row_indptr_ptr + group + 1))
    num_beams = (end_beam - first_beam).to(tl.int32)
    running_scores_ptr += first_beam
    running_parent_ptr += first_beam
    running_token_ptr += first_beam
    pool_scores_ptr += first_beam
    pool_lens_ptr += first_beam
    pool_parents_ptr += first_beam
    pool_tokens_ptr += first_beam
    old_scores_ptr += first_beam
    scores_ptr += group * num_candidates
    parent_ptr += group * num_candidates
    token_ptr += group * num_candidates
    num_hits_ptr += group * (num_candidates + 1)

    done = tl.load(done_ptr + group) != 0
    new_len, max_len = tl.load(gen_lens_ptr + group) + 1, tl.load(max_new_tokens_ptr + group)
    limit = tl.where(num_eos < 1, 2, 1 + num_eos) * num_beams
    bad = broken | ((done == 0) & ((limit > num_candidates) | (new_len < 1) | (new_len > max_len)))
    limit = tl.where(bad | done, 0, limit)

    invalid = tl.zeros([BLOCK], tl.int32)
    num_hits, num_present = 0, 0  # absent candidates come last
    for start in range(0, limit, BLOCK):
        rank = start + lane
        mask = rank < limit
        score = tl.load(scores_ptr + rank, mask=mask, other=-float("inf"))
        last_score = tl.load(scores_ptr + rank - 1, mask=mask & (rank > 0), other=float("inf"))
        parent = tl.load(parent_ptr + rank, mask=mask, other=-1)
        last_parent = tl.load(parent_ptr + rank - 1, mask=mask & (rank > 0), other=0)
        token = tl.load(token_ptr + rank, mask=mask, other=0)
        in_rows = (parent >= first_row) & (parent < end_row)
        present = parent >= 0
        valid = (last_score >= score) & ((parent == -1) | in_rows) & ((last_parent >= 0) | (present == 0))
        invalid |= (mask & (valid == 0)).to(tl.int32)
        hit = tl.full([BLOCK], new_len, tl.int32) >= max_len
        if stop_ptr is not None:
            hit |= tl.load(stop_ptr + group * num_candidates + rank, mask=mask, other=0) != 0
        for e in range(num_eos):
            hit |= token == tl.load(eos_ids_ptr + e)
        hit = (hit & present).to(tl.int32)
        tl.store(num_hits_ptr + rank, num_hits + tl.cumsum(hit, 0) - hit, mask=mask)
        num_hits += tl.sum(hit, 0)
        num_present += tl.sum(present.to(tl.int32), 0)
    tl.store(num_hits_ptr + limit, num_hits)
    for start in range(0, num_beams, BLOCK):
        i = start + lane
        tl.store(old_scores_ptr + i, tl.load(pool_scores_ptr + i, mask=i < num_beams), mask=i < num_beams)
    bad |= tl.max(invalid, 0) != 0
    accepted = (bad == 0) & (done == 0)
    num_present = tl.where(accepted, num_present, 0)
    tl.debug_barrier()

    # Merge two descending sequences: candidates that go on, and candidates that hit an end, with _BANNED added. A
    # candidate's beam is its rank in its own sequence plus, by a search, the number of others that come before it.
    for start in range(0, num_present, BLOCK):
        rank = start + lane
        mask = rank < num_present
        score = tl.load(scores_ptr + rank, mask=mask, other=0.0)
        hits_before = tl.load(num_hits_ptr + rank, mask=mask, other=0)
        hit = tl.load(num_hits_ptr + rank + 1, mask=mask, other=0) != hits_before
        score = tl.where(hit, score + _BANNED, score)
        before = _num_before(scores_ptr, num_present, tl.where(hit, 0.0, _BANNED), 1.0, score, rank, steps)
        others_before = tl.load(num_hits_ptr + before, mask=mask, other=0)
        beam = tl.where(hit, hits_before + before - others_before, rank - hits_before + others_before)
        mask &= beam < num_beams
        tl.store(running_scores_ptr + beam, score, mask=mask)
        tl.store(running_parent_ptr + beam, tl.load(parent_ptr + rank, mask=mask), mask=mask)
        tl.store(running_token_ptr + beam, tl.load(token_ptr + rank, mask=mask), mask=mask)
    for start in range(num_present, num_beams, BLOCK):
        i = start + lane
        row = tl.where((accepted == 0) & (first_row + i < end_row), first_row + i, first_row)
        no_score = tl.where(bad, float("nan"), -float("inf"))
        tl.store(running_scores_ptr + i, no_score + tl.zeros([BLOCK], tl.float32), mask=i < num_beams)
        tl.store(running_parent_ptr + i, row, mask=i < num_beams)
        tl.store(running_token_ptr + i, 0, mask=i < num_beams)

    # Merge hits among the first num_beams candidates into the pool. Old entries move down: from the last block to the
    # first, each read before it is overwritten.
    num_eligible = tl.minimum(num_beams, num_present)
    divisor = _power(tl.where(accepted, new_len, 1), penalty)
    num_blocks = tl.where(
        tl.load(num_hits_ptr + num_eligible, mask=accepted, other=0) > 0, tl.cdiv(num_beams, BLOCK), 0
    )
    for block in range(0, num_blocks):
        i = (num_blocks - 1 - block) * BLOCK + lane
        mask = i < num_beams
        score = tl.load(old_scores_ptr + i, mask=mask, other=0.0)
        before = _num_before(scores_ptr, num_eligible, 0.0, divisor, score, 0, steps)
        entry = i + tl.load(num_hits_ptr + before, mask=mask, other=0)
        mask &= entry < num_beams
        len = tl.load(pool_lens_ptr + i, mask=mask)
        parent = tl.load(pool_parents_ptr + i, mask=mask)
        token = tl.load(pool_tokens_ptr + i, mask=mask)
        tl.debug_barrier()
        tl.store(pool_scores_ptr + entry, score, mask=mask)
        tl.store(pool_lens_ptr + entry, len, mask=mask)
        tl.store(pool_parents_ptr + entry, parent, mask=mask)
        tl.store(pool_tokens_ptr + entry, token, mask=mask)
    tl.debug_barrier()
    for start in range(0, tl.where(num_blocks > 0, num_eligible, 0), BLOCK):
        rank = start + lane
        mask = rank < num_eligible
        hits_before = tl.load(num_hits_ptr + rank, mask=mask, other=0)
        mask &= tl.load(num_hits_ptr + rank + 1, mask=mask, other=0) != hits_before
        score = tl.div_rn(tl.load(scores_ptr + rank, mask=mask, other=0.0), divisor)
        entry = hits_before + _num_before(old_scores_ptr, num_beams, 0.0, 1.0, score, num_beams, steps)
        mask &= entry < num_beams
        tl.store(pool_scores_ptr + entry, score, mask=mask)
        tl.store(pool_lens_ptr + entry, new_len, mask=mask)
        tl.store(pool_parents_ptr + entry, tl.load(parent_ptr + rank, mask=mask) - first_row, mask=mask)
        tl.store(pool_tokens_ptr + entry, tl.load(token_ptr + rank, mask=mask), mask=mask)
    tl.debug_barrier()

    free = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_beams, BLOCK):
        i = start + lane
        free |= (tl.load(pool_lens_ptr + i, mask=i < num_beams, other=1) <= 0).to(tl.int32)
    full = tl.max(free, 0) == 0
    if EARLY_STOPPING == 2:
        divisor = _power(tl.where(penalty > 0.0, max_len, new_len), penalty)
    best = tl.div_rn(tl.load(running_scores_ptr, mask=accepted, other=0.0), divisor)
    worst = tl.where(full, tl.load(pool_scores_ptr + num_beams - 1, mask=accepted, other=0.0), _BANNED)
    final = (num_hits == num_present) | ((best > worst) == 0)
    if EARLY_STOPPING == 1:
        final |= full
    tl.store(done_ptr + group, final, mask=accepted)


def _check_vector(t: Tensor, name: str, text: str, size: int, dtype: torch.dtype) -> None:
    check.tensor(t, name, text, (size,), dtype, contiguous=True)


def beam_update(
    scores: Tensor, parent: Tensor, token: Tensor, row_indptr: Tensor, beam_indptr: Tensor, pool_scores: Tensor,
    pool_lens: Tensor, pool_parents: Tensor, pool_tokens: Tensor, done: Tensor, gen_lens: Tensor,
    max_new_tokens: Tensor, eos_ids: Tensor, length_penalty: float, early_stopping: int, stop: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches `treedecode.ops.beam_update`.

    A group with a bad value stays as it is, and its running scores are NaN. With bad offsets in `row_indptr` or
    `beam_indptr`, this holds for all groups.
    """
    check.tensor(scores, "scores", "[num_groups, num_candidates]", (-1, -1), torch.float32, contiguous=True)
    for t, name, dtype in ((parent, "parent", torch.int32), (token, "token", torch.int32), (stop, "stop", torch.bool)):
        if t is not None:
            check.tensor(t, name, "the shape of scores", tuple(scores.shape), dtype, contiguous=True)
    num_groups, num_candidates = scores.shape
    _check_vector(row_indptr, "row_indptr", "[num_groups + 1]", num_groups + 1, torch.int32)
    _check_vector(beam_indptr, "beam_indptr", "[num_groups + 1]", num_groups + 1, torch.int32)
    _check_vector(pool_scores, "pool_scores", "[num_beams]", -1, torch.float32)
    num_pool = pool_scores.shape[0]
    for t, name in ((pool_lens, "pool_lens"), (pool_parents, "pool_parents"), (pool_tokens, "pool_tokens")):
        _check_vector(t, name, "the shape of pool_scores", num_pool, torch.int32)
    _check_vector(done, "done", "[num_groups]", num_groups, torch.bool)
    _check_vector(gen_lens, "gen_lens", "[num_groups]", num_groups, torch.int32)
    _check_vector(max_new_tokens, "max_new_tokens", "[num_groups]", num_groups, torch.int32)
    _check_vector(eos_ids, "eos_ids", "[num_eos]", -1, torch.int32)
    check.value(0 <= early_stopping <= 2, "early_stopping", "0, 1 or 2", early_stopping)
    check.value(math.isfinite(length_penalty), "length_penalty", "a finite number", length_penalty)
    if num_groups == 0 and num_pool:
        raise ValueError(f"beam_indptr: expected to end at {num_pool}, the size of the pool, got 0")

    running_scores, old_scores = torch.empty_like(pool_scores), torch.empty_like(pool_scores)
    running_parent, running_token = torch.empty_like(pool_lens), torch.empty_like(pool_lens)
    if num_groups:
        num_hits = parent.new_empty(num_groups, num_candidates + 1)
        _beam_update_kernel[(num_groups,)](
            running_scores, running_parent, running_token, pool_scores, pool_lens, pool_parents, pool_tokens, done,
            scores, parent, token, stop, row_indptr, beam_indptr, gen_lens, max_new_tokens, eos_ids, num_hits,
            old_scores, num_groups, num_pool, num_candidates, eos_ids.shape[0],
            struct.unpack("q", struct.pack("d", length_penalty))[0], max(num_candidates, num_pool).bit_length(),
            EARLY_STOPPING=early_stopping, BLOCK=min(512, max(64, triton.next_power_of_2(num_candidates))), num_warps=4,
        )  # fmt: skip
    return running_scores, running_parent, running_token

"""Triton kernels of beam_prune.

scan     a program per (row, chunk): sum of exponentials, and the chunk's best candidates or maxima
collect  a program per (row, chunk), for many candidates: those above the row's threshold
rank     a program per row: lse, and the row's candidates in order
merge    a program per group: the best of its rows
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from treedecode.triton_kernels import check
from treedecode.triton_kernels.candidates import (
    LOWEST,
    NO_KEY,
    allowed,
    best_keys,
    best_of,
    collect,
    index_of,
    keys_of,
    load_logits,
    maxima_of,
    merge_best,
    ordered,
    threshold_of,
    value_of,
    values_of,
)

# Tokens of one program. A constant, so that a row's sums do not depend on the batch.
CHUNK = 4096
# Up to so many candidates, the best of each chunk are few enough for one program to merge. For more of them, the maxima
# of all chunks give the row's threshold first, and the logits are read again, from the cache.
MAX_LOCAL = 64
# Up to so many candidates, one program sorts them; PyTorch sorts more of them.
MAX_SORTED = 1024
# Keys that a program loads at once.
BLOCK = 1024


@triton.jit
def _beam_prune_scan_kernel(
    refs_ptr, sums_ptr,  # [rows, num_chunks] fp32: sum of exp(x - ref)
    keys_ptr,  # [rows, num_chunks, SLOTS] int64: the chunk's best, or None
    maxima_ptr,  # [rows, num_chunks, SETS] int32: maxima of disjoint sets of the chunk's candidates, where keys is None
    counts_ptr,  # [rows] int32, set to 0 there
    logits_ptr,  # [rows, vocab] with stride (row)
    mask_ptr,  # [rows, ceil(vocab / 32)] int32 with stride (row), or None
    logits_stride, mask_stride, vocab, num_chunks, k,
    CHUNK: tl.constexpr, SETS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    item = row * num_chunks + chunk
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(logits_ptr + row * logits_stride, tokens, vocab)
    good = tl.min((x < float("inf")).to(tl.int32)) == 1
    ref = tl.max(x)
    # (-inf) - (-inf) would be NaN
    total = tl.sum(tl.exp(x - tl.where(ref == -float("inf"), 0.0, ref)))
    tl.store(refs_ptr + item, tl.where(good, ref, float("nan")))
    tl.store(sums_ptr + item, total)
    if mask_ptr is not None:
        mask_ptr += row * mask_stride
    x = allowed(x, mask_ptr, tokens, vocab)
    values = values_of(x)
    maxima = maxima_of(values, SETS)
    if keys_ptr is None:
        tl.store(maxima_ptr + item * SETS + tl.arange(0, SETS), maxima)
        if chunk == 0:
            tl.store(counts_ptr + row, 0)
    else:
        threshold, _ = threshold_of(maxima, LOWEST + 1, k, k + k // 8)
        keep = best_of(values, threshold, k, SLOTS)
        slots = tl.cumsum(keep.to(tl.int32)) - 1
        keys_ptr += item * SLOTS
        tl.store(keys_ptr + slots, keys_of(values, tokens), mask=keep)
        slots = tl.arange(0, SLOTS)
        tl.store(keys_ptr + slots, tl.full([SLOTS], NO_KEY, tl.int64), mask=slots >= tl.sum(keep.to(tl.int32)))


@triton.jit
def _beam_prune_collect_kernel(
    keys_ptr,  # [rows, num_chunks * SLOTS] int64: keys that may be among the row's best, in any order
    counts_ptr,  # [rows] int32: number of these keys
    maxima_ptr,  # [rows, num_maxima] int32
    logits_ptr,  # [rows, vocab] with stride (row)
    mask_ptr,  # [rows, ceil(vocab / 32)] int32 with stride (row), or None
    logits_stride, mask_stride, vocab, num_chunks, num_maxima, k,
    CHUNK: tl.constexpr, SLOTS: tl.constexpr, BLOCK_MAXIMA: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    if mask_ptr is not None:
        mask_ptr += row * mask_stride
    x = allowed(load_logits(logits_ptr + row * logits_stride, tokens, vocab), mask_ptr, tokens, vocab)
    keys_ptr += row * num_chunks * SLOTS
    collect(
        keys_ptr,
        counts_ptr + row,
        maxima_ptr + row * num_maxima,
        num_maxima,
        values_of(x),
        tokens,
        k,
        SLOTS,
        BLOCK_MAXIMA,
    )


@triton.jit
def _beam_prune_rank_kernel(
    scores_ptr, tokens_ptr,  # [rows, num_ranks] fp32 and int32: the row's candidates, the best first
    lse_ptr,  # [rows] fp32
    keys_ptr,  # [rows, num_keys] int64
    counts_ptr,  # [rows] int32: number of these keys, or None: all
    refs_ptr, sums_ptr,  # [rows, num_chunks] fp32
    cum_ptr,  # [rows] fp32
    num_keys, num_ranks, num_chunks,
    IS_LOGPROBS: tl.constexpr, SORTED: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHUNKS)
    refs = tl.load(refs_ptr + row * num_chunks + c, mask=c < num_chunks, other=-float("inf"))
    sums = tl.load(sums_ptr + row * num_chunks + c, mask=c < num_chunks, other=0.0).to(tl.float64)
    good = tl.max((refs != refs).to(tl.int32)) == 0
    ref = tl.max(refs).to(tl.float64)
    if IS_LOGPROBS:
        lse = tl.where(good, 0.0, float("nan")).to(tl.float64)
    else:
        sums *= tl.where(refs == -float("inf"), 0.0, tl.exp(refs.to(tl.float64) - ref))
        lse = tl.where(good, ref + tl.log(tl.sum(sums)), float("nan"))
        lse = tl.where(good & (ref == -float("inf")), -float("inf"), lse)
    tl.store(lse_ptr + row, lse.to(tl.float32))

    keys_ptr += row * num_keys
    ranks = tl.program_id(1) * RANKS + RANKS - 1 - tl.arange(0, RANKS)
    if SORTED:
        best = tl.load(keys_ptr + ranks, mask=ranks < num_keys, other=NO_KEY)
    else:
        count = num_keys
        if counts_ptr is not None:
            count = tl.load(counts_ptr + row)
        best = best_keys(keys_ptr, count, RANKS, BLOCK)
    cum = tl.load(cum_ptr + row)
    score = (cum.to(tl.float64) + (value_of(best).to(tl.float64) - lse)).to(tl.float32)
    score = tl.where(best == NO_KEY, -float("inf"), score)
    score = tl.where(good & (cum < float("inf")), score, float("nan"))  # the group checks for NaN
    tl.store(scores_ptr + row * num_ranks + ranks, score, mask=ranks < num_ranks)
    tl.store(tokens_ptr + row * num_ranks + ranks, index_of(best), mask=ranks < num_ranks)


@triton.jit
def _beam_prune_merge_kernel(
    out_scores_ptr, out_parent_ptr, out_token_ptr,  # [num_groups, k] fp32, int32, int32
    scores_ptr, tokens_ptr,  # [rows, RANKS] fp32, int32
    indptr_ptr,  # [num_groups + 1] int32
    rows, k,
    RANKS: tl.constexpr, BEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    # offsets are not checked on the host: only rows that exist are read
    first = tl.maximum(tl.load(indptr_ptr + group), 0)
    count = tl.maximum(tl.minimum(tl.load(indptr_ptr + group + 1), rows) - first, 0) * RANKS
    scores_ptr += first.to(tl.int64) * RANKS
    tokens_ptr += first.to(tl.int64) * RANKS
    best = tl.full([BEST], NO_KEY, tl.int64)
    bad = 0
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        scores = tl.load(scores_ptr + i, mask=i < count, other=-float("inf"))
        bad = tl.maximum(bad, tl.max((scores != scores).to(tl.int32)))
        values = tl.where(scores > -float("inf"), ordered(scores), LOWEST)
        keys = keys_of(values, i)
        if tl.max(keys) > tl.min(best):
            best = merge_best(best, keys, BLOCK == RANKS and BLOCK == BEST)
    ranks = BEST - 1 - tl.arange(0, BEST)
    is_candidate = (best != NO_KEY) & (tl.full([BEST], 0, tl.int32) == bad)
    i = index_of(best)
    token = tl.load(tokens_ptr + i, mask=is_candidate, other=-1)
    out = group * k + ranks
    score = tl.where(bad == 1, float("nan"), value_of(best))
    tl.store(out_scores_ptr + out, score, mask=ranks < k)
    tl.store(out_parent_ptr + out, tl.where(is_candidate, first + i // RANKS, -1), mask=ranks < k)
    tl.store(out_token_ptr + out, token, mask=ranks < k)


def _merge_wide(scores: Tensor, tokens: Tensor, group_indptr: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Does the work of `_beam_prune_merge_kernel` for more candidates than one program sorts."""
    rows, num_ranks = scores.shape
    offsets = group_indptr.long().clamp(0, rows)[:, None] * num_ranks
    row = torch.arange(rows, dtype=torch.int32, device=scores.device)
    group = torch.searchsorted(group_indptr[1:], row, right=True)
    # stable: equal scores are in the order of rows, then of ranks; NaN comes before all others
    order = scores.flatten().sort(descending=True, stable=True).indices
    order = order[group[order // num_ranks].sort(stable=True).indices]
    positions = offsets[:-1] + torch.arange(k, device=scores.device)
    picked = order[positions.clamp(max=order.shape[0] - 1)]
    best = torch.where(positions < offsets[1:], scores.flatten()[picked], -torch.inf)
    best = torch.where(best[:, :1].isnan(), torch.nan, best)
    is_candidate = best > -torch.inf
    parent = torch.where(is_candidate, (picked // num_ranks).int(), -1)
    return best, parent, torch.where(is_candidate, tokens.flatten()[picked], -1)


def beam_prune(
    logits: Tensor,
    cum_logprobs: Tensor,
    group_indptr: Tensor,
    num_candidates: int,
    token_mask: Tensor | None,
    is_logprobs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches `treedecode.ops.beam_prune`. The host reads no values."""
    check.logits(logits, None)
    rows, vocab = logits.shape
    check.tensor(cum_logprobs, "cum_logprobs", "[rows]", (rows,), torch.float32, contiguous=True)
    check.tensor(group_indptr, "group_indptr", "[num_groups + 1]", (-1,), torch.int32, contiguous=True)
    k = num_candidates
    check.value(1 <= k <= 65536, "num_candidates", "1 to 65536", k)
    if group_indptr.shape[0] == 0:
        raise ValueError(f"group_indptr: expected offsets from 0 to rows = {rows}")
    check.logits(logits, token_mask)
    num_groups, row_k = group_indptr.shape[0] - 1, min(k, vocab)
    ranks = max(16, triton.next_power_of_2(row_k))
    check.value(rows * ranks < 2**31, "num_candidates", "rows * min(num_candidates, vocab) below 2^31", rows * ranks)

    scores = logits.new_full((num_groups, k), -torch.inf, dtype=torch.float32)
    parent = logits.new_full((num_groups, k), -1, dtype=torch.int32)
    token = torch.full_like(parent, -1)
    lse = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return scores, parent, token, lse

    chunk = min(CHUNK, max(16, triton.next_power_of_2(vocab)))
    num_chunks = triton.cdiv(vocab, chunk)
    refs, sums = logits.new_empty(2, rows, num_chunks, dtype=torch.float32)
    keys = counts = maxima = None
    if row_k > MAX_SORTED:
        sets, slots = 1, chunk
    elif row_k > MAX_LOCAL:
        sets, slots = min(chunk, triton.next_power_of_2(triton.cdiv(2 * row_k, num_chunks))), min(chunk, ranks)
        maxima = logits.new_empty(rows, num_chunks * sets, dtype=torch.int32)
        counts = logits.new_empty(rows, dtype=torch.int32)
    else:
        sets, slots = min(chunk, 4 * ranks), min(chunk, 2 * ranks)
    keys = logits.new_empty(rows, num_chunks * slots, dtype=torch.int64)
    source = logits, token_mask, logits.stride(0), 0 if token_mask is None else token_mask.stride(0), vocab, num_chunks
    _beam_prune_scan_kernel[(rows, num_chunks)](
        refs, sums, keys if maxima is None else None, maxima, counts, *source, row_k,
        CHUNK=chunk, SETS=sets, SLOTS=slots, num_warps=8,
    )  # fmt: skip
    if maxima is not None:
        _beam_prune_collect_kernel[(rows, num_chunks)](
            keys, counts, maxima, *source, maxima.shape[1], row_k,
            CHUNK=chunk, SLOTS=slots, BLOCK_MAXIMA=triton.next_power_of_2(maxima.shape[1]), num_warps=8,
        )  # fmt: skip
    wide = row_k > MAX_SORTED
    if wide:
        keys = keys.topk(row_k, dim=1).values
    num_ranks, per_program = (row_k, BLOCK) if wide else (ranks, ranks)
    row_scores = logits.new_empty(rows, num_ranks, dtype=torch.float32)
    row_tokens = logits.new_empty(rows, num_ranks, dtype=torch.int32)
    _beam_prune_rank_kernel[(rows, triton.cdiv(num_ranks, per_program))](
        row_scores, row_tokens, lse, keys, counts, refs, sums, cum_logprobs, keys.shape[1], num_ranks, num_chunks,
        IS_LOGPROBS=is_logprobs, SORTED=wide, RANKS=per_program, BLOCK=max(BLOCK, per_program),
        CHUNKS=triton.next_power_of_2(num_chunks), num_warps=4,
    )  # fmt: skip
    if k > MAX_SORTED:
        return *_merge_wide(row_scores, row_tokens, group_indptr, k), lse
    if num_groups:
        best = max(16, triton.next_power_of_2(k))
        # Long lists of rows are sorted already, so they are merged one by one.
        block = best if best == ranks and best >= 256 else max(BLOCK, best)
        _beam_prune_merge_kernel[(num_groups,)](
            scores, parent, token, row_scores, row_tokens, group_indptr, rows, k,
            RANKS=ranks, BEST=best, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return scores, parent, token, lse

"""Triton kernels of sample.

scan     a program per (row, chunk): sums of exponentials, the best token, and maxima of rows with a filter
collect  a program per (row, chunk) of rows with a filter: the tokens that may be among the row's best
draw     a program per row: the token, its log-probability and the entropy
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from treedecode.triton_kernels import check
from treedecode.triton_kernels.candidates import (
    NO_KEY,
    best_keys,
    collect,
    index_of,
    keys_of,
    maxima_of,
    value_of,
    values_of,
)
from treedecode.triton_kernels.draw import (
    LOG2_E,
    draw_from_all,
    draw_from_best,
    load_chunk,
    scale_of,
    uniform_of,
    weights_of,
)

# Tokens of one program, and of one step along a row. A constant, so that a row's sums do not depend on the batch.
CHUNK = 4096
# The filters use so many of a row's best tokens, and all tokens only where these are not enough.
FEW = 1024
# The chunk has a NaN or +inf: above every key.
BAD_KEY = tl.constexpr(2**63 - 1)


@triton.jit
def _settings(
    row, vocab,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, temperature_stride, top_k_stride, top_p_stride, min_p_stride,
):  # fmt: skip
    """Loads (temperature, top_k, top_p, min_p, filtered); filtered: a filter leaves several tokens, but not all."""
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    top_k = tl.load(top_k_ptr + row * top_k_stride)
    top_p = tl.load(top_p_ptr + row * top_p_stride)
    min_p = tl.load(min_p_ptr + row * min_p_stride)
    top_k = tl.where(top_k < vocab, top_k, 0)
    filtered = (temperature > 0) & (top_k != 1) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    return temperature, top_k, top_p, min_p, filtered


@triton.jit
def _sample_scan_kernel(
    keys_ptr,  # [rows, num_chunks] int64: the best token
    sums_ptr, log_sums_ptr,  # [rows, num_chunks] fp32: of w = exp(x - chunk's best), of w * (x - chunk's best)
    masses_ptr,  # [rows, num_chunks] fp32: of w ** (1 / temperature)
    maxima_ptr,  # [rows, num_chunks, SETS] int32: maxima of disjoint sets of the chunk's tokens; of filtered rows
    counts_ptr,  # [rows] int32, set to 0
    logits_ptr,  # [rows, vocab] with stride (row)
    mask_ptr,  # [rows, ceil(vocab / 32)] int32 with stride (row), or None
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,  # [rows] fp32, int32, fp32, fp32 with strides
    logits_stride, mask_stride, temperature_stride, top_k_stride, top_p_stride, min_p_stride, vocab, num_chunks,
    CHUNK: tl.constexpr, SETS: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    item = row * num_chunks + chunk
    if mask_ptr is not None:
        mask_ptr += row * mask_stride
    temperature, _, _, _, filtered = _settings(
        row, vocab, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, temperature_stride, top_k_stride, top_p_stride,
        min_p_stride,
    )  # fmt: skip
    x, tokens = load_chunk(logits_ptr + row * logits_stride, mask_ptr, chunk, vocab, CHUNK)
    good = tl.min((x < float("inf")).to(tl.int32)) == 1
    x = tl.where(x < float("inf"), x, -float("inf"))
    values = values_of(x)
    key = tl.max(keys_of(values, tokens))
    max_logit = value_of(key)
    w = weights_of(x, max_logit, LOG2_E)
    tl.store(keys_ptr + item, tl.where(good, key, BAD_KEY))
    tl.store(sums_ptr + item, tl.sum(w))
    tl.store(log_sums_ptr + item, tl.sum(w * tl.where(w > 0, x - max_logit, 0.0)))
    tl.store(masses_ptr + item, tl.sum(weights_of(x, max_logit, scale_of(temperature))))
    if filtered:
        tl.store(maxima_ptr + item * SETS + tl.arange(0, SETS), maxima_of(values, SETS))
        if chunk == 0:
            tl.store(counts_ptr + row, 0)


@triton.jit
def _sample_collect_kernel(
    best_ptr,  # [rows, num_chunks * SLOTS] int64: keys that may be among the row's best, in any order
    counts_ptr,  # [rows] int32: number of these keys
    maxima_ptr,  # [rows, num_maxima] int32
    logits_ptr,  # [rows, vocab] with stride (row)
    mask_ptr,  # [rows, ceil(vocab / 32)] int32 with stride (row), or None
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,  # [rows] fp32, int32, fp32, fp32 with strides
    logits_stride, mask_stride, temperature_stride, top_k_stride, top_p_stride, min_p_stride, vocab, num_chunks,
    num_maxima,
    CHUNK: tl.constexpr, SLOTS: tl.constexpr, BLOCK_MAXIMA: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, top_k, _, _, filtered = _settings(
        row, vocab, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, temperature_stride, top_k_stride, top_p_stride,
        min_p_stride,
    )  # fmt: skip
    if filtered & (top_k <= FEW):
        if mask_ptr is not None:
            mask_ptr += row * mask_stride
        x, tokens = load_chunk(logits_ptr + row * logits_stride, mask_ptr, chunk, vocab, CHUNK)
        best_ptr += row * num_chunks * SLOTS
        k = tl.where(top_k > 0, top_k, FEW)
        collect(
            best_ptr,
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
def _sample_draw_kernel(
    token_ptr, logprob_ptr, entropy_ptr,  # [rows] int32, fp32, fp32
    keys_ptr, sums_ptr, log_sums_ptr, masses_ptr,  # [rows, num_chunks] int64, fp32
    best_ptr, counts_ptr,  # [rows, num_best] int64 and [rows] int32, of filtered rows with a top_k up to FEW
    logits_ptr,  # [rows, vocab] with stride (row)
    mask_ptr,  # [rows, ceil(vocab / 32)] int32 with stride (row), or None
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,  # [rows] fp32, int32, fp32, fp32 with strides
    seed_ptr, position_ptr,  # [rows] int64 with strides
    logits_stride, mask_stride, temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride,
    position_stride, vocab, num_chunks, num_best,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    if mask_ptr is not None:
        mask_ptr += row * mask_stride
    temperature, top_k, top_p, min_p, filtered = _settings(
        row, vocab, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, temperature_stride, top_k_stride, top_p_stride,
        min_p_stride,
    )  # fmt: skip
    c = tl.arange(0, CHUNKS)
    item = row * num_chunks + c
    keys = tl.load(keys_ptr + item, mask=c < num_chunks, other=NO_KEY)
    key = tl.max(keys)
    good = (key != NO_KEY) & (key != BAD_KEY)
    good &= (temperature >= 0) & (temperature < float("inf")) & (top_k >= 0)
    good &= (top_p >= 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)

    token = index_of(key)
    logprob = float("nan")
    entropy = float("nan")
    if good:
        max_logit = value_of(key)
        possible = keys != NO_KEY
        # The sums of a chunk are relative to its own best token.
        gap = tl.where(possible, value_of(keys).to(tl.float64) - max_logit.to(tl.float64), 0.0)
        factor = tl.where(possible, tl.exp(gap), 0.0)
        sums = factor * tl.load(sums_ptr + item, mask=c < num_chunks, other=0.0).to(tl.float64)
        log_sums = factor * tl.load(log_sums_ptr + item, mask=c < num_chunks, other=0.0).to(tl.float64)
        total = tl.sum(sums)
        log_total = tl.log(total)
        entropy = tl.maximum(log_total - tl.sum(log_sums + sums * gap) / total, 0.0).to(tl.float32)
        if (temperature > 0) & (top_k != 1):
            scale = scale_of(temperature)
            uniform = uniform_of(tl.load(seed_ptr + row * seed_stride), tl.load(position_ptr + row * position_stride))
            masses = tl.load(masses_ptr + item, mask=c < num_chunks, other=0.0).to(tl.float64)
            masses = tl.where(possible, masses * tl.exp2(gap * scale.to(tl.float64)), 0.0)
            drawn = False
            if filtered & (top_k <= FEW):
                best = best_keys(best_ptr + row * num_best, tl.load(counts_ptr + row), FEW, FEW)
                token, drawn = draw_from_best(
                    best, max_logit, scale, tl.sum(masses), temperature, top_k, top_p, min_p, uniform
                )
            if not drawn:
                token = draw_from_all(
                    logits_ptr, mask_ptr, vocab, max_logit, scale, masses, temperature, top_k, top_p, min_p, filtered,
                    uniform, index_of(key), SHIFT, CHUNK,
                )  # fmt: skip
        logprob = (tl.load(logits_ptr + token).to(tl.float64) - max_logit.to(tl.float64) - log_total).to(tl.float32)
    tl.store(token_ptr + row, tl.where(good, token, -1))
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    token_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches `treedecode.ops.sample`. The host reads no values."""
    check.logits(logits, None)
    rows, vocab = logits.shape
    settings = {
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int32),
        "top_p": (top_p, torch.float32),
        "min_p": (min_p, torch.float32),
        "seed": (seed, torch.int64),
        "position": (position, torch.int64),
    }
    for name, (setting, dtype) in settings.items():
        check.per_row(setting, name, rows, dtype)
    check.logits(logits, token_mask)

    token = logits.new_empty(rows, dtype=torch.int32)
    logprob, entropy = logits.new_empty(2, rows, dtype=torch.float32)
    if rows == 0:
        return token, logprob, entropy
    chunk = min(CHUNK, max(16, triton.next_power_of_2(vocab)))
    num_chunks = triton.cdiv(vocab, chunk)
    keys = logits.new_empty(rows, num_chunks, dtype=torch.int64)
    sums = logits.new_empty(3, rows, num_chunks, dtype=torch.float32)
    few = min(FEW, max(16, triton.next_power_of_2(vocab)))
    sets = min(chunk, triton.next_power_of_2(triton.cdiv(2 * few, num_chunks)))
    slots = min(chunk, few)
    maxima = logits.new_empty(rows, num_chunks * sets, dtype=torch.int32)
    counts = torch.empty_like(token)
    best = logits.new_empty(rows, num_chunks * slots, dtype=torch.int64)
    values = [setting for setting, _ in settings.values()]
    strides = [0 if setting.shape[0] == 1 else setting.stride(0) for setting in values]
    row_strides = logits.stride(0), 0 if token_mask is None else token_mask.stride(0)
    filters = *values[:4], *row_strides, *strides[:4]  # without seed and position
    _sample_scan_kernel[(rows, num_chunks)](
        keys,
        *sums,
        maxima,
        counts,
        logits,
        token_mask,
        *filters,
        vocab,
        num_chunks,
        CHUNK=chunk,
        SETS=sets,
        num_warps=8,
    )
    _sample_collect_kernel[(rows, num_chunks)](
        best, counts, maxima, logits, token_mask, *filters, vocab, num_chunks, maxima.shape[1],
        CHUNK=chunk, SLOTS=slots, BLOCK_MAXIMA=triton.next_power_of_2(maxima.shape[1]), FEW=few, num_warps=8,
    )  # fmt: skip
    _sample_draw_kernel[(rows,)](
        token, logprob, entropy, keys, *sums, best, counts, logits, token_mask, *values, *row_strides, *strides,
        vocab, num_chunks, best.shape[1],
        SHIFT={torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}[logits.dtype], CHUNK=chunk,
        CHUNKS=triton.next_power_of_2(num_chunks), FEW=few, num_warps=16,
    )  # fmt: skip
    return token, logprob, entropy

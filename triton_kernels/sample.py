import torch
import triton
import triton.language as tl
from torch import Tensor

from treedecode.triton_kernels import check
from treedecode.triton_kernels.candidates import (
    LOWEST,
    NO_KEY,
    allowed,
    index_of,
    keys_of,
    load_logits,
    ordered,
    unordered,
    value_of,
)

# Tokens of one program, and of one step along a row. It depends on nothing, so that a row's sums do not depend on the
# batch.
CHUNK = 4096
# Better than every key: the chunk has a NaN or +inf.
BAD_KEY = tl.constexpr(2**63 - 1)
MAX_TIES = tl.constexpr(2**31 - 1)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scale(temperature):
    """What turns a difference of logits into the base-2 logarithm of a ratio of weights."""
    return LOG2_E / tl.maximum(temperature, 1e-30)


@triton.jit
def _weights(x, top, scale):
    # at any temperature: 0 * -inf would be NaN
    return tl.where(x > -float("inf"), tl.exp2((x - top) * scale), 0.0)


@triton.jit
def _load(logits_ptr, mask_ptr, chunk, vocab, CHUNK: tl.constexpr):
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    return allowed(load_logits(logits_ptr, tokens, vocab), mask_ptr, tokens, vocab), tokens


@triton.jit
def _ranks(x, SHIFT: tl.constexpr):
    """Integers that order like the logits, without the bits that are zero in all of them."""
    return tl.where(x > -float("inf"), ordered(x), LOWEST) >> SHIFT


@triton.jit
def _sample_scan_kernel(
    keys_ptr,  # [rows, num_chunks] int64: the best token
    sums_ptr, log_sums_ptr,  # [rows, num_chunks] fp32: of w = exp(x - chunk's best), of w * (x - chunk's best)
    masses_ptr,  # [rows, num_chunks] fp32: of w ** (1 / temperature)
    logits_ptr,  # [rows, vocab] with stride (row)
    mask_ptr,  # [rows, ceil(vocab / 32)] int32 with stride (row), or None
    temperature_ptr,  # [rows] fp32 with stride
    logits_stride, mask_stride, temperature_stride, vocab, num_chunks,
    CHUNK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if mask_ptr is not None:
        mask_ptr += row * mask_stride
    x, tokens = _load(logits_ptr + row * logits_stride, mask_ptr, chunk, vocab, CHUNK)
    good = tl.min((x < float("inf")).to(tl.int32)) == 1
    x = tl.where(x < float("inf"), x, -float("inf"))
    key = tl.max(keys_of(tl.where(x > -float("inf"), ordered(x), LOWEST), tokens))
    top = value_of(key)
    w = _weights(x, top, LOG2_E)
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    item = row * num_chunks + chunk
    tl.store(keys_ptr + item, tl.where(good, key, BAD_KEY))
    tl.store(sums_ptr + item, tl.sum(w))
    tl.store(log_sums_ptr + item, tl.sum(w * tl.where(w > 0, x - top, 0.0)))
    tl.store(masses_ptr + item, tl.sum(_weights(x, top, _scale(temperature))))


@triton.jit
def _border(
    logits_ptr, mask_ptr, vocab, top, scale, target, lo, hi,
    COUNT: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(border, what is above it): the largest rank that tokens of weight `target` reach. Eight-way search.

    Tokens of that weight reach `lo`, fewer reach `hi`. COUNT: a token weighs 1, else what it does in the draw.
    """
    above = target * 0.0
    eighths = tl.arange(0, 8) + 1
    while lo + 1 < hi:
        splits = lo + (((hi.to(tl.int64) - lo) * eighths) >> 3).to(tl.int32)
        weight = tl.zeros([CHUNK, 8], tl.float32)
        for chunk in range(0, tl.cdiv(vocab, CHUNK)):
            x, _ = _load(logits_ptr, mask_ptr, chunk, vocab, CHUNK)
            w = 1.0
            if not COUNT:
                w = _weights(x, top, scale)[:, None]
            weight += tl.where(_ranks(x, SHIFT)[:, None] >= splits[None, :], w, 0.0)
        weights = tl.sum(weight.to(tl.float64), axis=0)
        reached = weights >= target
        lo = tl.max(tl.where(reached, splits, lo))
        hi = tl.min(tl.where(reached, hi, splits))
        above = tl.max(tl.where(reached, 0.0, weights))
    return lo, above


@triton.jit
def _kept(ranks, border, ties):
    """(which tokens of a block the filters keep, how many are at the border): what is above it and the first `ties`."""
    equal = ranks == border
    num_equal = tl.sum(equal.to(tl.int32))
    kept = ranks > border
    if num_equal > ties:
        kept |= equal & (tl.cumsum(equal.to(tl.int32)) <= ties)
    else:
        kept |= equal
    return kept, num_equal


@triton.jit
def _uniform(seed, position):
    """The number in [0, 1) with 53 random bits that belongs to (seed, position): Philox4x32-10."""
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    low, high, _, _ = tl.philox(seed, low, high, low ^ low, low ^ low)
    return (((high.to(tl.uint64) << 32) | low) >> 11).to(tl.float64) * 2.0**-53


@triton.jit
def _filter(
    logits_ptr, mask_ptr, vocab, top, scale, mass, temperature, top_k, top_p, min_p,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(border, ties): the filters keep every token whose rank is above the border and the first `ties` at it."""
    best = ordered(top) >> SHIFT
    border = best * 0 + (LOWEST >> SHIFT)  # keeps all that is possible
    ties = border * 0
    if (top_k > 0) & (top_k < vocab):
        border, above = _border(
            logits_ptr, mask_ptr, vocab, top, scale, top_k.to(tl.float64), border, best + 1, True, SHIFT, CHUNK
        )
        ties = top_k - above.to(tl.int32)
        if top_p < 1:
            mass *= 0.0
            left = ties
            for chunk in range(0, tl.cdiv(vocab, CHUNK)):
                x, _ = _load(logits_ptr, mask_ptr, chunk, vocab, CHUNK)
                ranks = _ranks(x, SHIFT)
                kept, num_equal = _kept(ranks, border, left)
                mass += tl.sum(tl.where(kept, _weights(x, top, scale), 0.0)).to(tl.float64)
                left = tl.maximum(left - num_equal, 0)
    if top_p < 1:
        # The best token is always kept: a target of 0 would be reached above it.
        target = tl.maximum(top_p.to(tl.float64) * mass, 1e-300)
        before = border
        border, above = _border(
            logits_ptr, mask_ptr, vocab, top, scale, target, before, best + 1, False, SHIFT, CHUNK
        )
        if border > (LOWEST >> SHIFT):  # else top_p is so near 1 that rounding has eaten the rest
            weight = tl.exp2((unordered(border << SHIFT) - top) * scale).to(tl.float64)
            wanted = tl.maximum(tl.ceil((target - above) / weight), 1.0)
            wanted = tl.where(wanted < MAX_TIES, wanted, MAX_TIES).to(tl.int32)
            ties = tl.where(border == before, tl.minimum(ties, wanted), wanted)
    if min_p > 0:
        # The least logit that is allowed, rounded up.
        bound = top.to(tl.float64) + temperature.to(tl.float64) * tl.log(min_p.to(tl.float64))
        least = bound.to(tl.float32)
        least = ordered(least) + (least.to(tl.float64) < bound).to(tl.int32)
        if (least - 1) >> SHIFT >= border:
            border = (least - 1) >> SHIFT
            ties *= 0
    return border, ties


@triton.jit
def _sample_draw_kernel(
    token_ptr, logprob_ptr, entropy_ptr,  # [rows] int32, fp32, fp32
    keys_ptr, sums_ptr, log_sums_ptr, masses_ptr,  # [rows, num_chunks]
    logits_ptr,  # [rows, vocab] with stride (row)
    mask_ptr,  # [rows, ceil(vocab / 32)] int32 with stride (row), or None
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,  # [rows] fp32, int32, fp32, fp32 with strides
    seed_ptr, position_ptr,  # [rows] int64 with strides
    logits_stride, mask_stride, temperature_stride, top_k_stride, top_p_stride, min_p_stride, seed_stride,
    position_stride, vocab, num_chunks,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    if mask_ptr is not None:
        mask_ptr += row * mask_stride
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    top_k = tl.load(top_k_ptr + row * top_k_stride)
    top_p = tl.load(top_p_ptr + row * top_p_stride)
    min_p = tl.load(min_p_ptr + row * min_p_stride)
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
        top = value_of(key)
        tops = value_of(keys)
        possible = keys != NO_KEY
        # A chunk's sums are relative to its own best token.
        gap = tl.where(possible, tops.to(tl.float64) - top.to(tl.float64), 0.0)
        factor = tl.where(possible, tl.exp(gap), 0.0)
        sums = factor * tl.load(sums_ptr + item, mask=c < num_chunks, other=0.0).to(tl.float64)
        log_sums = factor * tl.load(log_sums_ptr + item, mask=c < num_chunks, other=0.0).to(tl.float64)
        total = tl.sum(sums)
        log_total = tl.log(total)
        logprob = (-log_total).to(tl.float32)
        entropy = tl.maximum(log_total - tl.sum(log_sums + sums * gap) / total, 0.0).to(tl.float32)

        if (temperature > 0) & (top_k != 1):
            scale = _scale(temperature)
            masses = tl.load(masses_ptr + item, mask=c < num_chunks, other=0.0).to(tl.float64)
            masses = tl.where(possible, masses * tl.exp2(gap * scale.to(tl.float64)), 0.0)
            lefts = tl.zeros([CHUNKS], tl.int32)
            border = tl.max(lefts) + (LOWEST >> SHIFT)
            if ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0):
                border, left = _filter(
                    logits_ptr, mask_ptr, vocab, top, scale, tl.sum(masses), temperature, top_k, top_p, min_p,
                    SHIFT, CHUNK,
                )  # fmt: skip
                for chunk in range(0, num_chunks):
                    x, _ = _load(logits_ptr, mask_ptr, chunk, vocab, CHUNK)
                    kept, num_equal = _kept(_ranks(x, SHIFT), border, left)
                    mass = tl.sum(tl.where(kept, _weights(x, top, scale), 0.0)).to(tl.float64)
                    masses = tl.where(c == chunk, mass, masses)
                    lefts = tl.where(c == chunk, left, lefts)
                    left = tl.maximum(left - num_equal, 0)
            # The first token at which the kept weights, added up in token order, exceed their sum's share.
            cum = tl.cumsum(masses)
            target = _uniform(tl.load(seed_ptr + row * seed_stride), tl.load(position_ptr + row * position_stride))
            target *= tl.sum(masses)
            last = tl.max(tl.where(masses > 0, c, 0))  # the product may round up to the sum
            chunk = tl.minimum(tl.min(tl.where(cum > target, c, CHUNKS)), last)
            x, tokens = _load(logits_ptr, mask_ptr, chunk, vocab, CHUNK)
            kept, _ = _kept(_ranks(x, SHIFT), border, tl.max(tl.where(c == chunk, lefts, 0)))
            w = tl.where(kept, _weights(x, top, scale), 0.0)
            cum = tl.cumsum(w.to(tl.float64)) + tl.sum(tl.where(c < chunk, masses, 0.0))
            first = tl.min(tl.where((cum > target) & (w > 0), tokens, vocab))
            last = tl.max(tl.where(w > 0, tokens, -1))
            # weights that round to 0 here and not in the chunk's sum leave the best token
            token = tl.where(last < 0, token, tl.minimum(first, last))
            drawn = tl.load(logits_ptr + token).to(tl.float64)
            logprob = (drawn - top.to(tl.float64) - log_total).to(tl.float32)
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
    """See `treedecode.ops.sample`; values are not looked at on the host."""
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
    values = [setting for setting, _ in settings.values()]
    strides = [0 if setting.shape[0] == 1 else setting.stride(0) for setting in values]
    source = logits.stride(0), 0 if token_mask is None else token_mask.stride(0)
    _sample_scan_kernel[(rows, num_chunks)](
        keys, *sums, logits, token_mask, temperature, *source, strides[0], vocab, num_chunks, CHUNK=chunk, num_warps=8
    )
    _sample_draw_kernel[(rows,)](
        token, logprob, entropy, keys, *sums, logits, token_mask, *values, *source, *strides, vocab, num_chunks,
        SHIFT={torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}[logits.dtype], CHUNK=chunk,
        CHUNKS=triton.next_power_of_2(num_chunks), num_warps=16,
    )  # fmt: skip
    return token, logprob, entropy

"""Device functions of sample: the filters top-k, top-p and min-p of a row, and its draw."""

import triton
import triton.language as tl

from treedecode.triton_kernels.candidates import (
    LOWEST,
    MAX_INDEX,
    NO_KEY,
    allowed,
    index_of,
    load_logits,
    ordered,
    unordered,
    value_of,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scale_of(temperature):
    """Returns the factor that turns a difference of logits into the base-2 logarithm of a ratio of weights."""
    return LOG2_E / tl.maximum(temperature, 1e-30)


@triton.jit
def weights_of(x, max_logit, scale):
    # for high temperatures, whose scale is 0: 0 * -inf would be NaN
    return tl.where(x > -float("inf"), tl.exp2((x - max_logit) * scale), 0.0)


@triton.jit
def load_chunk(logits_ptr, mask_ptr, chunk, vocab, CHUNK: tl.constexpr):
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    return allowed(load_logits(logits_ptr, tokens, vocab), mask_ptr, tokens, vocab), tokens


@triton.jit
def _ranks(x, SHIFT: tl.constexpr):
    """Returns integers that order like the logits, without the bits that are zero in all of them."""
    return tl.where(x > -float("inf"), ordered(x), LOWEST) >> SHIFT


@triton.jit
def _border(
    logits_ptr, mask_ptr, vocab, max_logit, scale, target, lo, hi,
    COUNT: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Returns (border, weight of the tokens above it): the largest rank that tokens of weight `target` reach.

    An eight-way search. Tokens of weight `target` reach `lo`, but not `hi`. COUNT: every token has weight 1, instead of
    its weight in the draw.
    """
    above = target * 0.0
    eighths = tl.arange(0, 8) + 1
    while lo + 1 < hi:
        splits = lo + (((hi.to(tl.int64) - lo) * eighths) >> 3).to(tl.int32)
        weight = tl.zeros([8, CHUNK], tl.float32)
        for chunk in range(0, tl.cdiv(vocab, CHUNK)):
            x, _ = load_chunk(logits_ptr, mask_ptr, chunk, vocab, CHUNK)
            w = 1.0
            if not COUNT:
                w = weights_of(x, max_logit, scale)[None, :]
            weight += tl.where(_ranks(x, SHIFT)[None, :] >= splits[:, None], w, 0.0)
        weights = tl.sum(weight.to(tl.float64), axis=1)
        reached = weights >= target
        lo = tl.max(tl.where(reached, splits, lo))
        hi = tl.min(tl.where(reached, hi, splits))
        above = tl.max(tl.where(reached, 0.0, weights))
    return lo, above


@triton.jit
def _kept(ranks, border, ties):
    """Returns (kept, num_equal): tokens of a block above the border and the first `ties` at it; the number at it."""
    equal = ranks == border
    num_equal = tl.sum(equal.to(tl.int32))
    kept = ranks > border
    if num_equal > ties:
        kept |= equal & (tl.cumsum(equal.to(tl.int32)) <= ties)
    else:
        kept |= equal
    return kept, num_equal


@triton.jit
def uniform_of(seed, position):
    """Returns a number in [0, 1) with 53 random bits, a function of (seed, position) alone: Philox4x32-10."""
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    low, high, _, _ = tl.philox(seed, low, high, low ^ low, low ^ low)
    return (((high.to(tl.uint64) << 32) | low) >> 11).to(tl.float64) * 2.0**-53


@triton.jit
def _min_p_threshold(max_logit, temperature, min_p):
    """Returns the value of the smallest logit that min_p keeps: the exact bound, rounded up to fp32."""
    bound = max_logit.to(tl.float64) + temperature.to(tl.float64) * tl.log(min_p.to(tl.float64))
    rounded = bound.to(tl.float32)
    return ordered(rounded) + (rounded.to(tl.float64) < bound).to(tl.int32)


@triton.jit
def draw_from_best(best, max_logit, scale, mass, temperature, top_k, top_p, min_p, uniform):
    """Returns (token, is_complete): a draw from a row's best tokens (ascending), and whether these are enough for it.

    They are if top_k is among them, or if the filters drop the last one of them: then no better token is missing.
    """
    value = value_of(best)
    ranks = best.shape[0] - 1 - tl.arange(0, best.shape[0])
    kept = (best != NO_KEY) & (ranks < tl.where(top_k > 0, top_k, best.shape[0]))
    w = tl.where(kept, weights_of(value, max_logit, scale), 0.0)
    exact = w.to(tl.float64)
    mass = tl.where(top_k > 0, tl.sum(exact), mass)
    target = tl.where(top_p < 1, top_p.to(tl.float64) * mass, float("inf"))
    kept &= (tl.sum(exact) - tl.cumsum(exact) < target) | (ranks == 0)
    if min_p > 0:
        kept &= ordered(value) >= _min_p_threshold(max_logit, temperature, min_p)
    is_complete = (top_k > 0) | (tl.max(tl.where(ranks == best.shape[0] - 1, kept.to(tl.int32), 0)) == 0)
    # in token order, each with its weight
    w = tl.where(kept, w, 0.0)
    by_token = tl.sort((index_of(best).to(tl.int64) << 32) | w.to(tl.int32, bitcast=True))
    w = by_token.to(tl.int32).to(tl.float32, bitcast=True)
    tokens = (by_token >> 32).to(tl.int32)
    exact = w.to(tl.float64)
    first = tl.min(tl.where((tl.cumsum(exact) > uniform * tl.sum(exact)) & (w > 0), tokens, MAX_INDEX))
    return tl.minimum(first, tl.max(tl.where(w > 0, tokens, 0))), is_complete


@triton.jit
def _filter(
    logits_ptr, mask_ptr, vocab, max_logit, scale, mass, temperature, top_k, top_p, min_p,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Returns (border, ties): the filters keep the tokens whose rank is above the border and the first `ties` at it."""
    best = ordered(max_logit) >> SHIFT
    border = best * 0 + (LOWEST >> SHIFT)  # keeps all tokens above -inf
    ties = border * 0
    if top_k > 0:
        border, above = _border(
            logits_ptr,
            mask_ptr,
            vocab,
            max_logit,
            scale,
            top_k.to(tl.float64),
            border,
            best + 1,
            True,
            SHIFT,
            CHUNK // 2,
        )
        ties = top_k - above.to(tl.int32)
        if top_p < 1:
            mass *= 0.0
            remaining_ties = ties
            for chunk in range(0, tl.cdiv(vocab, CHUNK)):
                x, _ = load_chunk(logits_ptr, mask_ptr, chunk, vocab, CHUNK)
                ranks = _ranks(x, SHIFT)
                kept, num_equal = _kept(ranks, border, remaining_ties)
                mass += tl.sum(tl.where(kept, weights_of(x, max_logit, scale), 0.0)).to(tl.float64)
                remaining_ties = tl.maximum(remaining_ties - num_equal, 0)
    if top_p < 1:
        # A positive target, so that the best token is always kept.
        target = tl.maximum(top_p.to(tl.float64) * mass, 1e-300)
        before = border
        border, above = _border(
            logits_ptr, mask_ptr, vocab, max_logit, scale, target, before, best + 1, False, SHIFT, CHUNK // 2
        )
        if border > (LOWEST >> SHIFT):  # else top_p is so near 1 that, rounded, all tokens are kept
            weight = tl.exp2((unordered(border << SHIFT) - max_logit) * scale).to(tl.float64)
            wanted = tl.maximum(tl.ceil((target - above) / weight), 1.0)
            wanted = tl.where(wanted < MAX_INDEX, wanted, MAX_INDEX).to(tl.int32)
            ties = tl.where(border == before, tl.minimum(ties, wanted), wanted)
    if min_p > 0:
        below = (_min_p_threshold(max_logit, temperature, min_p) - 1) >> SHIFT
        if below >= border:
            border = below
            ties *= 0
    return border, ties


@triton.jit
def draw_from_all(
    logits_ptr, mask_ptr, vocab, max_logit, scale, masses, temperature, top_k, top_p, min_p, filtered, uniform, token,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Draws a token from a row; `masses` are the weights of its chunks, and `token` is its best token."""
    c = tl.arange(0, masses.shape[0])
    chunk_ties = tl.zeros([masses.shape[0]], tl.int32)
    border = tl.max(chunk_ties) + (LOWEST >> SHIFT)
    if filtered:
        border, ties = _filter(
            logits_ptr,
            mask_ptr,
            vocab,
            max_logit,
            scale,
            tl.sum(masses),
            temperature,
            top_k,
            top_p,
            min_p,
            SHIFT,
            CHUNK,
        )
        for chunk in range(0, tl.cdiv(vocab, CHUNK)):
            x, _ = load_chunk(logits_ptr, mask_ptr, chunk, vocab, CHUNK)
            kept, num_equal = _kept(_ranks(x, SHIFT), border, ties)
            mass = tl.sum(tl.where(kept, weights_of(x, max_logit, scale), 0.0)).to(tl.float64)
            masses = tl.where(c == chunk, mass, masses)
            chunk_ties = tl.where(c == chunk, ties, chunk_ties)
            ties = tl.maximum(ties - num_equal, 0)
    # Draw the first token at which the kept weights, added up in token order, exceed `uniform` of their sum.
    target = uniform * tl.sum(masses)
    last = tl.max(tl.where(masses > 0, c, 0))  # the product may round up to the sum
    chunk = tl.minimum(tl.min(tl.where(tl.cumsum(masses) > target, c, masses.shape[0])), last)
    x, tokens = load_chunk(logits_ptr, mask_ptr, chunk, vocab, CHUNK)
    kept, _ = _kept(_ranks(x, SHIFT), border, tl.max(tl.where(c == chunk, chunk_ties, 0)))
    w = tl.where(kept, weights_of(x, max_logit, scale), 0.0)
    cum = tl.cumsum(w.to(tl.float64)) + tl.sum(tl.where(c < chunk, masses, 0.0))
    first = tl.min(tl.where((cum > target) & (w > 0), tokens, vocab))
    last = tl.max(tl.where(w > 0, tokens, -1))
    # the best token if all weights round to 0 here, though not in the sum of the chunk
    return tl.where(last < 0, token, tl.minimum(first, last))

"""A row's filters and its draw, on the device: top-k, top-p and min-p as `treedecode.ops.sample` defines them."""

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
    """What turns a difference of logits into the base-2 logarithm of a ratio of weights."""
    return LOG2_E / tl.maximum(temperature, 1e-30)


@triton.jit
def weights_of(x, top, scale):
    # at any temperature: 0 * -inf would be NaN
    return tl.where(x > -float("inf"), tl.exp2((x - top) * scale), 0.0)


@triton.jit
def load_chunk(logits_ptr, mask_ptr, chunk, vocab, CHUNK: tl.constexpr):
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    return allowed(load_logits(logits_ptr, tokens, vocab), mask_ptr, tokens, vocab), tokens


@triton.jit
def _ranks(x, SHIFT: tl.constexpr):
    """Integers that order like the logits, without the bits that are zero in all of them."""
    return tl.where(x > -float("inf"), ordered(x), LOWEST) >> SHIFT


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
        weight = tl.zeros([8, CHUNK], tl.float32)
        for chunk in range(0, tl.cdiv(vocab, CHUNK)):
            x, _ = load_chunk(logits_ptr, mask_ptr, chunk, vocab, CHUNK)
            w = 1.0
            if not COUNT:
                w = weights_of(x, top, scale)[None, :]
            weight += tl.where(_ranks(x, SHIFT)[None, :] >= splits[:, None], w, 0.0)
        weights = tl.sum(weight.to(tl.float64), axis=1)
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
def uniform_of(seed, position):
    """The number in [0, 1) with 53 random bits that belongs to (seed, position): Philox4x32-10."""
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    low, high, _, _ = tl.philox(seed, low, high, low ^ low, low ^ low)
    return (((high.to(tl.uint64) << 32) | low) >> 11).to(tl.float64) * 2.0**-53


@triton.jit
def _least(top, temperature, min_p):
    """The least value that min_p allows: the logit is rounded up."""
    bound = top.to(tl.float64) + temperature.to(tl.float64) * tl.log(min_p.to(tl.float64))
    least = bound.to(tl.float32)
    return ordered(least) + (least.to(tl.float64) < bound).to(tl.int32)


@triton.jit
def draw_from_best(best, top, scale, mass, temperature, top_k, top_p, min_p, uniform):
    """(token, whether it is the draw) from a row's best tokens (ascending), or from all where top_k says how many.

    The filters keep the first tokens of the ranking: where they drop the last of the best, none is missing.
    """
    value = value_of(best)
    ranks = best.shape[0] - 1 - tl.arange(0, best.shape[0])
    kept = (best != NO_KEY) & (ranks < tl.where(top_k > 0, top_k, best.shape[0]))
    w = tl.where(kept, weights_of(value, top, scale), 0.0)
    exact = w.to(tl.float64)
    mass = tl.where(top_k > 0, tl.sum(exact), mass)
    most = tl.where(top_p < 1, top_p.to(tl.float64) * mass, float("inf"))
    kept &= (tl.sum(exact) - tl.cumsum(exact) < most) | (ranks == 0)
    if min_p > 0:
        kept &= ordered(value) >= _least(top, temperature, min_p)
    whole = (top_k > 0) | (tl.max(tl.where(ranks == best.shape[0] - 1, kept.to(tl.int32), 0)) == 0)
    # in token order, each with its weight
    w = tl.where(kept, w, 0.0)
    by_token = tl.sort((index_of(best).to(tl.int64) << 32) | w.to(tl.int32, bitcast=True))
    w = by_token.to(tl.int32).to(tl.float32, bitcast=True)
    tokens = (by_token >> 32).to(tl.int32)
    exact = w.to(tl.float64)
    first = tl.min(tl.where((tl.cumsum(exact) > uniform * tl.sum(exact)) & (w > 0), tokens, MAX_INDEX))
    return tl.minimum(first, tl.max(tl.where(w > 0, tokens, 0))), whole


@triton.jit
def _filter(
    logits_ptr, mask_ptr, vocab, top, scale, mass, temperature, top_k, top_p, min_p,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(border, ties): the filters keep every token whose rank is above the border and the first `ties` at it."""
    best = ordered(top) >> SHIFT
    border = best * 0 + (LOWEST >> SHIFT)  # keeps all that is possible
    ties = border * 0
    if top_k > 0:
        border, above = _border(
            logits_ptr, mask_ptr, vocab, top, scale, top_k.to(tl.float64), border, best + 1, True, SHIFT, CHUNK // 2
        )
        ties = top_k - above.to(tl.int32)
        if top_p < 1:
            mass *= 0.0
            left = ties
            for chunk in range(0, tl.cdiv(vocab, CHUNK)):
                x, _ = load_chunk(logits_ptr, mask_ptr, chunk, vocab, CHUNK)
                ranks = _ranks(x, SHIFT)
                kept, num_equal = _kept(ranks, border, left)
                mass += tl.sum(tl.where(kept, weights_of(x, top, scale), 0.0)).to(tl.float64)
                left = tl.maximum(left - num_equal, 0)
    if top_p < 1:
        # The best token is always kept: a target of 0 would be reached above it.
        target = tl.maximum(top_p.to(tl.float64) * mass, 1e-300)
        before = border
        border, above = _border(
            logits_ptr, mask_ptr, vocab, top, scale, target, before, best + 1, False, SHIFT, CHUNK // 2
        )
        if border > (LOWEST >> SHIFT):  # else top_p is so near 1 that rounding has eaten the rest
            weight = tl.exp2((unordered(border << SHIFT) - top) * scale).to(tl.float64)
            wanted = tl.maximum(tl.ceil((target - above) / weight), 1.0)
            wanted = tl.where(wanted < MAX_INDEX, wanted, MAX_INDEX).to(tl.int32)
            ties = tl.where(border == before, tl.minimum(ties, wanted), wanted)
    if min_p > 0:
        below = (_least(top, temperature, min_p) - 1) >> SHIFT
        if below >= border:
            border = below
            ties *= 0
    return border, ties


@triton.jit
def draw_from_all(
    logits_ptr, mask_ptr, vocab, top, scale, masses, temperature, top_k, top_p, min_p, filtered, uniform, token,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The draw from a row, of which `masses` are what its chunks weigh; `token` is its best."""
    c = tl.arange(0, masses.shape[0])
    lefts = tl.zeros([masses.shape[0]], tl.int32)
    border = tl.max(lefts) + (LOWEST >> SHIFT)
    if filtered:
        border, left = _filter(
            logits_ptr, mask_ptr, vocab, top, scale, tl.sum(masses), temperature, top_k, top_p, min_p, SHIFT, CHUNK
        )
        for chunk in range(0, tl.cdiv(vocab, CHUNK)):
            x, _ = load_chunk(logits_ptr, mask_ptr, chunk, vocab, CHUNK)
            kept, num_equal = _kept(_ranks(x, SHIFT), border, left)
            mass = tl.sum(tl.where(kept, weights_of(x, top, scale), 0.0)).to(tl.float64)
            masses = tl.where(c == chunk, mass, masses)
            lefts = tl.where(c == chunk, left, lefts)
            left = tl.maximum(left - num_equal, 0)
    # The first token at which the kept weights, added up in token order, exceed their sum's share.
    target = uniform * tl.sum(masses)
    last = tl.max(tl.where(masses > 0, c, 0))  # the product may round up to the sum
    chunk = tl.minimum(tl.min(tl.where(tl.cumsum(masses) > target, c, masses.shape[0])), last)
    x, tokens = load_chunk(logits_ptr, mask_ptr, chunk, vocab, CHUNK)
    kept, _ = _kept(_ranks(x, SHIFT), border, tl.max(tl.where(c == chunk, lefts, 0)))
    w = tl.where(kept, weights_of(x, top, scale), 0.0)
    cum = tl.cumsum(w.to(tl.float64)) + tl.sum(tl.where(c < chunk, masses, 0.0))
    first = tl.min(tl.where((cum > target) & (w > 0), tokens, vocab))
    last = tl.max(tl.where(w > 0, tokens, -1))
    # weights that round to 0 here and not in the chunk's sum leave the best token
    return tl.where(last < 0, token, tl.minimum(first, last))

"""What beam_prune and sample share on the device: logits as integers that order like them, and the best of a block."""

import triton
import triton.language as tl

# Below the integer of every float: no candidate.
LOWEST = tl.constexpr(-(2**31))
# The key of no candidate.
NO_KEY = tl.constexpr(-(2**63))
MAX_INDEX = tl.constexpr(2**31 - 1)  # i ^ MAX_INDEX counts down where i counts up


@triton.jit
def ordered(x):
    """fp32 as int32 that orders like it; -0 and +0 are one value, and zero bits at the end of a float stay zero."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def unordered(i):
    """The fp32 that `ordered` made i of."""
    return tl.where(i < 0, -i | LOWEST, i).to(tl.float32, bitcast=True)


@triton.jit
def keys_of(i, index):
    """int64 keys; the larger one is the better: value descending, then index ascending. Keys of two indices differ."""
    return tl.where(i == LOWEST, NO_KEY, (i.to(tl.int64) << 32) | (index ^ MAX_INDEX))


@triton.jit
def value_of(keys):
    return tl.where(keys == NO_KEY, -float("inf"), unordered((keys >> 32).to(tl.int32)))


@triton.jit
def index_of(keys):
    return (keys & MAX_INDEX).to(tl.int32) ^ MAX_INDEX


@triton.jit
def load_logits(logits_ptr, tokens, vocab):
    """Logits as fp32; past the end, -inf."""
    return tl.load(logits_ptr + tokens, mask=tokens < vocab, other=-float("inf")).to(tl.float32)


@triton.jit
def allowed(x, mask_ptr, tokens, vocab):
    """Logits with -inf where the mask forbids a token; the mask may be None."""
    if mask_ptr is not None:
        words = tl.load(mask_ptr + tokens // 32, mask=tokens < vocab, other=0)
        x = tl.where((words >> (tokens % 32)) & 1 == 1, x, -float("inf"))
    return x


@triton.jit
def values_of(x):
    """Candidates' values; what is impossible, or refused, is none."""
    return tl.where((x > -float("inf")) & (x < float("inf")), ordered(x), LOWEST)


@triton.jit
def bar_of(values, lo, least, most):
    """(bar, number of values that reach it): at least `least` and, where equal values allow it, at most `most` do.

    `least` values reach `lo`, or `lo` is below all: then it may be fewer.
    """
    count = tl.sum((values >= lo).to(tl.int32))
    lo, hi = tl.where(count < least, lo, tl.maximum(tl.min(values), lo)), tl.max(values) + 1
    while (count > most) & (lo + 1 < hi):
        middle = (lo & hi) + ((lo ^ hi) >> 1)  # hi - lo may not fit an int32
        reach = tl.sum((values >= middle).to(tl.int32))
        if reach >= least:
            lo = middle
            count = reach
        else:
            hi = middle
    return lo, count


@triton.jit
def best_of(values, lo, least, most):
    """Which `values` (in token order) to keep so that at most `most` are and none of the best `least` is missing."""
    bar, count = bar_of(values, lo, least, most)
    keep = values >= bar
    if count > most:
        equal = values == bar
        above = values > bar
        left = most - tl.sum(above.to(tl.int32))
        keep = above | (equal & (tl.cumsum(equal.to(tl.int32)) <= left))
    return keep


@triton.jit
def maxima_of(values, SETS: tl.constexpr):
    """Maxima of SETS disjoint sets of values: at least k values reach what k of these do."""
    return tl.max(tl.reshape(values, [values.shape[0] // SETS, SETS]), axis=0)


@triton.jit
def collect(
    keys_ptr,  # [num_chunks * SLOTS] int64 of the row
    count_ptr,  # int32 of the row: how many keys there are so far
    tops_ptr,  # [num_tops] int32: maxima of disjoint sets of the row's values
    num_tops, values, tokens, k,
    SLOTS: tl.constexpr, TOPS: tl.constexpr,
):  # fmt: skip
    """Appends to the row's keys, in any order, those of a chunk's values that may be among the row's best k."""
    i = tl.arange(0, TOPS)
    tops = tl.load(tops_ptr + i, mask=i < num_tops, other=LOWEST)
    bar, _ = bar_of(tops, LOWEST + 1, k, k + k // 8)
    keep = best_of(values, bar, k, SLOTS)
    # Which chunk comes first is left to chance: keys are sorted before anybody looks at them.
    first = tl.atomic_add(count_ptr, tl.sum(keep.to(tl.int32)))
    slots = first + tl.cumsum(keep.to(tl.int32)) - 1
    tl.store(keys_ptr + slots, keys_of(values, tokens), mask=keep)


@triton.jit
def merge_best(best, keys, SORTED: tl.constexpr):
    """The largest of `best` (ascending) and `keys`, as many as `best` has and again ascending.

    SORTED: `keys` are as many as `best`, and descending.
    """
    if not SORTED:
        keys = tl.topk(keys, best.shape[0])
    # up, then down: the larger of each pair are the largest of all, and in bitonic order
    return tl.bitonic_merge(tl.maximum(best, keys))


@triton.jit
def best_keys(keys_ptr, count, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """The best RANKS of `count` keys, ascending."""
    best = tl.full([RANKS], NO_KEY, tl.int64)
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        keys = tl.load(keys_ptr + i, mask=i < count, other=NO_KEY)
        if tl.max(keys) > tl.min(best):
            best = merge_best(best, keys, False)
    return best

"""Device functions of beam_prune and sample: integers that order like logits, and the best tokens of a block."""

import triton
import triton.language as tl

# No candidate: below the integers of all floats.
LOWEST = tl.constexpr(-(2**31))
# The key of no candidate.
NO_KEY = tl.constexpr(-(2**63))
MAX_INDEX = tl.constexpr(2**31 - 1)  # i ^ MAX_INDEX counts down where i counts up


@triton.jit
def ordered(x):
    """Maps fp32 to int32 of the same order; -0 and +0 are one value, and zero bits at the end of a float stay zero."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def unordered(i):
    """The inverse of `ordered`."""
    return tl.where(i < 0, -i | LOWEST, i).to(tl.float32, bitcast=True)


@triton.jit
def keys_of(i, index):
    """Returns int64 keys, the larger the better: value descending, then index ascending. Keys of two indices differ."""
    return tl.where(i == LOWEST, NO_KEY, (i.to(tl.int64) << 32) | (index ^ MAX_INDEX))


@triton.jit
def value_of(keys):
    return tl.where(keys == NO_KEY, -float("inf"), unordered((keys >> 32).to(tl.int32)))


@triton.jit
def index_of(keys):
    return (keys & MAX_INDEX).to(tl.int32) ^ MAX_INDEX


@triton.jit
def load_logits(logits_ptr, tokens, vocab):
    """Loads logits as fp32; -inf past the end."""
    return tl.load(logits_ptr + tokens, mask=tokens < vocab, other=-float("inf")).to(tl.float32)


@triton.jit
def allowed(x, mask_ptr, tokens, vocab):
    """Sets logits to -inf where the mask forbids a token; the mask may be None."""
    if mask_ptr is not None:
        words = tl.load(mask_ptr + tokens // 32, mask=tokens < vocab, other=0)
        x = tl.where((words >> (tokens % 32)) & 1 == 1, x, -float("inf"))
    return x


@triton.jit
def values_of(x):
    """Maps logits to the values of candidates; -inf, +inf and NaN are no candidates."""
    return tl.where((x > -float("inf")) & (x < float("inf")), ordered(x), LOWEST)


@triton.jit
def threshold_of(values, lo, min_count, max_count):
    """Returns a threshold and how many values reach it: at least min_count, at most max_count unless many are equal.

    min_count values reach `lo`, or `lo` is below all values; then fewer may reach the threshold.
    """
    count = tl.sum((values >= lo).to(tl.int32))
    lo, hi = tl.where(count < min_count, lo, tl.maximum(tl.min(values), lo)), tl.max(values) + 1
    while (count > max_count) & (lo + 1 < hi):
        middle = (lo & hi) + ((lo ^ hi) >> 1)  # hi - lo may not fit an int32
        num_reaching = tl.sum((values >= middle).to(tl.int32))
        if num_reaching >= min_count:
            lo = middle
            count = num_reaching
        else:
            hi = middle
    return lo, count


@triton.jit
def best_of(values, lo, min_count, max_count):
    """Selects at most max_count of `values` (in token order), the best min_count among them."""
    threshold, count = threshold_of(values, lo, min_count, max_count)
    keep = values >= threshold
    if count > max_count:
        equal = values == threshold
        above = values > threshold
        num_equal = max_count - tl.sum(above.to(tl.int32))
        keep = above | (equal & (tl.cumsum(equal.to(tl.int32)) <= num_equal))
    return keep


@triton.jit
def maxima_of(values, SETS: tl.constexpr):
    """Returns the maxima of SETS disjoint sets of values: if k maxima reach a threshold, at least k values do."""
    return tl.max(tl.reshape(values, [values.shape[0] // SETS, SETS]), axis=0)


@triton.jit
def collect(
    keys_ptr,  # [num_chunks * SLOTS] int64 of the row
    count_ptr,  # int32 of the row: number of keys so far
    maxima_ptr,  # [num_maxima] int32: maxima of disjoint sets of the row's values
    num_maxima, values, tokens, k,
    SLOTS: tl.constexpr, BLOCK_MAXIMA: tl.constexpr,
):  # fmt: skip
    """Appends the keys of a chunk's values that may be among the row's best k to the row's keys, in any order."""
    i = tl.arange(0, BLOCK_MAXIMA)
    maxima = tl.load(maxima_ptr + i, mask=i < num_maxima, other=LOWEST)
    threshold, _ = threshold_of(maxima, LOWEST + 1, k, k + k // 8)
    keep = best_of(values, threshold, k, SLOTS)
    # Chunks append their keys in any order: the keys are sorted later.
    first = tl.atomic_add(count_ptr, tl.sum(keep.to(tl.int32)))
    slots = first + tl.cumsum(keep.to(tl.int32)) - 1
    tl.store(keys_ptr + slots, keys_of(values, tokens), mask=keep)


@triton.jit
def merge_best(best, keys, SORTED: tl.constexpr):
    """Returns the largest of `best` (ascending) and `keys`, as many as `best` has and again ascending.

    SORTED: `keys` are as many as `best`, and descending.
    """
    if not SORTED:
        keys = tl.topk(keys, best.shape[0])
    # best ascends and keys descend, so the larger of each pair are the largest of all, in bitonic order
    return tl.bitonic_merge(tl.maximum(best, keys))


@triton.jit
def best_keys(keys_ptr, count, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the best RANKS of `count` keys, ascending."""
    best = tl.full([RANKS], NO_KEY, tl.int64)
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        keys = tl.load(keys_ptr + i, mask=i < count, other=NO_KEY)
        if tl.max(keys) > tl.min(best):
            best = merge_best(best, keys, False)
    return best

"""Columns of a flat plan's `counts` and `chunks`, as csrc/cpu/plan_tree.h lays them out, and searches in a plan."""

import triton
import triton.language as tl

NUM_CHUNKS, NUM_PARTS, UNIQUE_TOKENS, PATH_TOKENS, PAGE_SIZE, NUM_TILES = (tl.constexpr(i) for i in range(6))
NUM_COUNTS = 6

ROW_BEGIN, ROW_END, TOKEN_BEGIN, TOKEN_END, PART, TILE_BEGIN = (tl.constexpr(i) for i in range(6))
COLUMNS = tl.constexpr(6)

TILE_ROWS = tl.constexpr(128)  # the most packed rows of a work tile


@triton.jit
def chunk_of(
    chunks_ptr,  # [max_chunks, 6]
    num_chunks, tile,
    FANOUT: tl.constexpr,
):  # fmt: skip
    """Returns the chunk of work tile `tile`, by a FANOUT-way search, since each of its steps waits for memory."""
    chunk = 0
    i = tl.arange(0, FANOUT)
    while num_chunks > 1:
        step = tl.cdiv(num_chunks, FANOUT)
        probed = i * step < num_chunks
        begins = tl.load(chunks_ptr + (chunk + i * step) * COLUMNS + TILE_BEGIN, mask=probed, other=0)
        passed = (tl.sum((probed & (begins <= tile)).to(tl.int32)) - 1) * step
        chunk += passed
        num_chunks = tl.minimum(step, num_chunks - passed)
    return chunk


@triton.jit
def row_of(
    indptr_ptr,  # [num_branches + 1], offsets of the query tokens of rows, or of branches
    token, begin, end, typical_len,
):  # fmt: skip
    """Returns the row among [begin, end) that each query token of a block belongs to.

    The first guess is right for all tokens when rows have typical_len queries each, as in decode.
    """
    first = tl.load(indptr_ptr + begin)
    guess = tl.minimum(begin + (token - first) // typical_len, end - 1)
    first_row = tl.where(tl.load(indptr_ptr + guess) <= token, guess, begin)
    end_row = tl.where(tl.load(indptr_ptr + guess + 1) > token, guess + 1, end)
    while tl.max(end_row - first_row) > 1:
        middle = (first_row + end_row) // 2
        begun = tl.load(indptr_ptr + middle) <= token
        first_row = tl.where(begun, middle, first_row)
        end_row = tl.where(begun, end_row, middle)
    return first_row

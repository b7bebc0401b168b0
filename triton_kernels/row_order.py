"""Triton kernels that order the rows of plan_tree by their page ids, so that rows that share pages are neighbours."""

import torch
import triton
import triton.language as tl
from torch import Tensor

HASH_PAGES = tl.constexpr(16)  # page ids that one hash covers

_NO_ROW = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _num_pages_of(seq_lens_ptr, branch, mask, capacity, page_size):
    seq_len = tl.load(seq_lens_ptr + branch, mask=mask, other=0).to(tl.int64)
    return tl.cdiv(tl.maximum(tl.minimum(seq_len, capacity), 0), page_size).to(tl.int32)


@triton.jit
def _hash_of(page, column):
    x = ((page.to(tl.uint32).to(tl.uint64) << 32) | column.to(tl.uint64)) + 1
    x *= 0x9E3779B97F4A7C15
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93
    return x ^ (x >> 32)


@triton.jit
def _hash_pages_kernel(
    hashes_ptr, ranked_ptr,  # [B, num_segments], [B] out
    page_table_ptr,  # [B, max_pages], stride (row)
    seq_lens_ptr,  # [B]
    table_stride, num_segments, capacity, page_size, hash_mask,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the hashes of a branch's pages, up to the end of each full segment.

    Sums are equal where two branches begin with the same pages. Other branches have equal sums once in 2^64.
    """
    branch = tl.program_id(0)
    tl.store(ranked_ptr + branch, -1)
    row_ptr = page_table_ptr + branch.to(tl.int64) * table_stride
    num_full = tl.sum(_num_pages_of(seq_lens_ptr, branch + tl.arange(0, 1), True, capacity, page_size)) // HASH_PAGES
    before = tl.zeros([1], tl.int64)
    first = 0
    while first < num_full:
        segment = first + tl.arange(0, BLOCK)
        column = segment[:, None] * HASH_PAGES + tl.arange(0, HASH_PAGES)[None, :]
        pages = tl.load(row_ptr + column, mask=(segment < num_full)[:, None], other=0)
        sums = tl.cumsum(tl.sum(_hash_of(pages, column).to(tl.int64), 1), 0)
        out_ptr = hashes_ptr + branch.to(tl.int64) * num_segments + segment
        tl.store(out_ptr, (before + sums) & hash_mask, mask=segment < num_full)
        before += tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, sums, 0))
        first += BLOCK


@triton.jit
def _order_rows_kernel(
    ranked_ptr,  # [B] in: -1; out: the branches in order; where hashes collide, an entry may stay -1
    hashes_ptr,  # [B, num_segments]
    page_table_ptr,  # [B, max_pages], stride (row)
    seq_lens_ptr,  # [B]
    B, table_stride, num_segments, capacity, page_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts the branches that come before one of them. Hashes tell how far two are equal, up to a segment."""
    branch = tl.program_id(0)
    own_pages = tl.sum(_num_pages_of(seq_lens_ptr, branch + tl.arange(0, 1), True, capacity, page_size))
    own_hashes_ptr = hashes_ptr + branch.to(tl.int64) * num_segments
    own_ptr = page_table_ptr + branch.to(tl.int64) * table_stride
    rank = 0
    for first in range(0, B, BLOCK):
        other = first + tl.arange(0, BLOCK)
        mask = (other < B) & (other != branch)
        pages = _num_pages_of(seq_lens_ptr, other, mask, capacity, page_size)
        both = tl.minimum(pages, own_pages)
        equal = tl.zeros([BLOCK], tl.int32)
        end = both // HASH_PAGES
        while tl.max(end - equal) > 0:
            is_open = mask & (equal < end)
            middle = equal + (end - equal) // 2
            hashes = tl.load(hashes_ptr + other.to(tl.int64) * num_segments + middle, mask=is_open, other=0)
            is_equal = hashes == tl.load(own_hashes_ptr + middle, mask=is_open, other=0)
            equal = tl.where(is_open & is_equal, middle + 1, equal)
            end = tl.where(is_open & (is_equal == 0), middle, tl.where(is_open, end, equal))
        is_before = (pages < own_pages) | ((pages == own_pages) & (other < branch))
        is_decided = tl.zeros([BLOCK], tl.int1)
        other_ptr = page_table_ptr + other.to(tl.int64) * table_stride
        for i in tl.static_range(HASH_PAGES):
            column = equal * HASH_PAGES + i
            is_open = mask & (column < both)
            page = tl.load(other_ptr + column, mask=is_open, other=0)
            own = tl.load(own_ptr + column, mask=is_open, other=0)
            differs = is_open & (page != own) & (is_decided == 0)
            is_before = tl.where(differs, page < own, is_before)
            is_decided |= differs
        rank += tl.sum((mask & is_before).to(tl.int32))
    tl.store(ranked_ptr + rank, branch)


@triton.jit
def _common_pages_kernel(
    shared_ptr, order_ptr,  # [B] out: leading pages that a row shares with the row before; the branch of each row
    ranked_ptr,  # [B]
    page_table_ptr,  # [B, max_pages], stride (row)
    seq_lens_ptr,  # [B]
    B, table_stride, capacity, page_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compares a row with the row before. An order that misses a branch is none: nothing is shared then."""
    row = tl.program_id(0)
    least = 0
    for first in range(0, B, BLOCK):
        i = first + tl.arange(0, BLOCK)
        least = tl.minimum(least, tl.min(tl.load(ranked_ptr + i, mask=i < B, other=0)))
    branch = tl.where(least < 0, row, tl.load(ranked_ptr + row))
    before = tl.where(least < 0, row, tl.load(ranked_ptr + tl.maximum(row - 1, 0)))
    tl.store(order_ptr + row, branch)
    pair = tl.where(tl.arange(0, 2) == 0, before, branch)
    used = tl.min(_num_pages_of(seq_lens_ptr, pair, True, capacity, page_size))
    used = tl.where((row > 0) & (least == 0), used, 0)
    a_ptr = page_table_ptr + before.to(tl.int64) * table_stride
    b_ptr = page_table_ptr + branch.to(tl.int64) * table_stride
    common = used
    first = 0
    while first < common:
        i = first + tl.arange(0, BLOCK)
        a, b = tl.load(a_ptr + i, mask=i < used, other=0), tl.load(b_ptr + i, mask=i < used, other=0)
        common = tl.minimum(common, tl.min(tl.where(a != b, i, _NO_ROW)))
        first += BLOCK
    # An even number of tokens, as in csrc/cpu/plan_tree.cpp.
    tl.store(shared_ptr + row, common - common * (page_size % 2) % 2)


def order_rows(
    order: Tensor, shared: Tensor, page_table: Tensor, seq_lens: Tensor, page_size: int, hash_mask: int = -1
) -> None:
    """Sets `order` and `shared` (`[num_branches]` int32): the branch of a row, and the pages it shares with the last.

    Args:
        hash_mask: bits of hashes that count; tests take fewer, to see what collisions do.
    """
    num_rows, max_pages = page_table.shape
    num_segments = max_pages // HASH_PAGES.value
    hashes = seq_lens.new_empty(num_rows, num_segments, dtype=torch.int64)
    ranked = torch.empty_like(order)
    grid, stride, capacity = (num_rows,), page_table.stride(0), max_pages * page_size
    table = page_table, seq_lens
    _hash_pages_kernel[grid](
        hashes, ranked, *table, stride, num_segments, capacity, page_size, hash_mask, BLOCK=64, num_warps=4
    )
    block = min(256, max(16, triton.next_power_of_2(num_rows)))
    _order_rows_kernel[grid](
        ranked, hashes, *table, num_rows, stride, num_segments, capacity, page_size, BLOCK=block, num_warps=4
    )
    _common_pages_kernel[grid](
        shared, order, ranked, *table, num_rows, stride, capacity, page_size, BLOCK=512, num_warps=4
    )

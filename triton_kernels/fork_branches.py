"""Triton kernels of fork_branches: four launches of a program per row.

Each launch needs the results of all programs of the one before: which rows are refused, how often each page is
referred to and which row drops it last, and how many pages each row frees.
"""

import triton
import triton.language as tl
from torch import Tensor, int64

from treedecode.triton_kernels import page_state
from treedecode.triton_kernels.page_state import BAD_ARGUMENT, ERROR, NUM_FREE, OK, pages_of


@triton.jit(do_not_specialize=["n"])
def _fork_branches_check_kernel(
    ok_ptr,  # [n] int32 out: this row is not refused
    last_drop_ptr,  # [num_pages] int64 out: -1 for the pages that may be dropped
    page_table_ptr, seq_lens_ptr, status_ptr,  # [max_branches, max_pages], [max_branches], [4]
    src_ptr, dst_ptr, lens_ptr,  # [n] int32; lens may be null
    num_pages, max_branches, max_pages, page_size, capacity, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    src, dst, num_free = tl.load(src_ptr + i), tl.load(dst_ptr + i), tl.load(status_ptr + NUM_FREE)
    ok = (src >= 0) & (src < max_branches) & (dst >= 0) & (dst < max_branches)
    src_len = tl.load(seq_lens_ptr + src, mask=ok, other=-1)
    dst_len = tl.load(seq_lens_ptr + dst, mask=ok, other=-1)
    new_len = src_len
    if lens_ptr is not None:
        new_len = tl.load(lens_ptr + i)
    ok &= (src_len <= capacity) & (dst_len >= 0) & (dst_len <= capacity) & (new_len >= 0) & (new_len <= src_len)
    num_new, num_old = tl.where(ok, pages_of(new_len, page_size), 0), tl.where(ok, pages_of(dst_len, page_size), 0)
    src_row = page_table_ptr + tl.where(ok, src, 0).to(tl.int64) * max_pages
    dst_row = page_table_ptr + tl.where(ok, dst, 0).to(tl.int64) * max_pages
    lane = tl.arange(0, BLOCK)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, tl.maximum(num_new, num_old), BLOCK):
        j = start + lane
        new = tl.load(src_row + j, mask=j < num_new, other=0)
        old = tl.load(dst_row + j, mask=j < num_old, other=0)
        in_range = (old >= 0) & (old < num_pages)
        bad |= ((j < num_new) & ((new < 0) | (new >= num_pages))).to(tl.int32)
        bad |= ((j < num_old) & (in_range == 0)).to(tl.int32)
        tl.store(last_drop_ptr + old, -1, mask=(j < num_old) & in_range)
    for start in range(0, n, BLOCK):
        k = start + lane
        bad |= ((tl.load(dst_ptr + k, mask=k < n, other=-1) == dst) & (k != i)).to(tl.int32)
    ok &= (tl.max(bad, 0) == 0) & (num_free >= 0) & (num_free <= num_pages)
    tl.store(ok_ptr + i, ok.to(tl.int32))


@triton.jit(do_not_specialize=["n"])
def _fork_branches_count_kernel(
    new_table_ptr, new_lens_ptr,  # [n, max_pages], [n] int32 out: the new rows, read before any row is written
    last_drop_ptr,  # [num_pages] int64: -1 in, position of the page's last drop in the order of drops out
    refcount_ptr, page_table_ptr, seq_lens_ptr, status_ptr,
    src_ptr, dst_ptr, lens_ptr, ok_ptr,  # [n] int32; lens may be null
    max_pages, page_size, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    error = tl.load(status_ptr + ERROR)
    lane = tl.arange(0, BLOCK)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        bad |= (tl.load(ok_ptr + start + lane, mask=start + lane < n, other=1) == 0).to(tl.int32)
    refused = tl.max(bad, 0) != 0
    # Another program may have stored BAD_ARGUMENT already, for the same flags.
    accepted = (error == OK) & (refused == 0)
    src = tl.load(src_ptr + i, mask=accepted, other=0).to(tl.int64)
    dst = tl.load(dst_ptr + i, mask=accepted, other=0).to(tl.int64)
    new_len = tl.load(seq_lens_ptr + src, mask=accepted, other=0)
    if lens_ptr is not None:
        new_len = tl.load(lens_ptr + i, mask=accepted, other=0)
    num_new = pages_of(new_len, page_size)
    num_old = pages_of(tl.load(seq_lens_ptr + dst, mask=accepted, other=0), page_size)
    tl.store(new_lens_ptr + i, new_len)
    for start in range(0, tl.maximum(num_new, num_old), BLOCK):
        j = start + lane
        new = tl.load(page_table_ptr + src * max_pages + j, mask=j < num_new, other=-1)
        old = tl.load(page_table_ptr + dst * max_pages + j, mask=j < num_old, other=-1)
        tl.store(new_table_ptr + i * max_pages + j, new, mask=j < num_new)
        # Entries that stay as they are (a common prefix, when beams are reordered) need no reference counting.
        tl.atomic_add(refcount_ptr + new, 1, mask=(j < num_new) & (new != old), sem="relaxed")
        dropped = (j < num_old) & (new != old)
        tl.atomic_add(refcount_ptr + old, -1, mask=dropped, sem="relaxed")
        # A row drops its last page first.
        tl.atomic_max(last_drop_ptr + old, i * max_pages + (num_old - 1 - j), mask=dropped, sem="relaxed")
    tl.debug_barrier()
    if (i == 0) & (error == OK) & refused:
        tl.store(status_ptr + ERROR, BAD_ARGUMENT)


@triton.jit(do_not_specialize=["n"])
def _fork_branches_free_kernel(
    freed_ptr, num_freed_ptr,  # [n, max_pages], [n + 1] int32 out: each row's freed pages; at the end: num_free
    new_table_ptr, new_lens_ptr,  # [n, max_pages], [n]
    last_drop_ptr,  # [num_pages] int64
    refcount_ptr, page_table_ptr, seq_lens_ptr, status_ptr,
    dst_ptr,  # [n] int32
    max_pages, page_size, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    accepted = tl.load(status_ptr + ERROR) == OK
    dst = tl.load(dst_ptr + i, mask=accepted, other=0).to(tl.int64)
    num_new = pages_of(tl.load(new_lens_ptr + i), page_size)
    num_old = pages_of(tl.load(seq_lens_ptr + dst, mask=accepted, other=0), page_size)
    num_freed = 0
    for start in range(0, num_old, BLOCK):
        rank = start + tl.arange(0, BLOCK)
        j = num_old - 1 - rank
        old = tl.load(page_table_ptr + dst * max_pages + j, mask=j >= 0, other=-1)
        new = tl.load(new_table_ptr + i * max_pages + j, mask=(j >= 0) & (j < num_new), other=-1)
        dropped = (j >= 0) & (old != new)
        # The page has no reference any more, and this is its last drop in this call.
        freed = dropped & (tl.load(refcount_ptr + old, mask=dropped, other=1) == 0)
        freed &= tl.load(last_drop_ptr + old, mask=dropped, other=-1) == i * max_pages + rank
        count = freed.to(tl.int32)
        to = num_freed + tl.cumsum(count, 0) - count
        tl.store(freed_ptr + i * max_pages + to, old, mask=freed)
        num_freed += tl.sum(count, 0)
    tl.store(num_freed_ptr + i, num_freed)
    if i == 0:
        tl.store(num_freed_ptr + n, tl.load(status_ptr + NUM_FREE))


@triton.jit(do_not_specialize=["n"])
def _fork_branches_commit_kernel(
    free_pages_ptr,  # [num_pages]
    page_table_ptr, seq_lens_ptr, status_ptr,
    freed_ptr, num_freed_ptr,  # [n, max_pages], [n + 1] int32
    new_table_ptr, new_lens_ptr,  # [n, max_pages], [n]
    dst_ptr,  # [n] int32
    num_pages, max_pages, page_size, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    accepted = tl.load(status_ptr + ERROR) == OK
    dst = tl.load(dst_ptr + i, mask=accepted, other=0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, i, BLOCK):
        before += tl.load(num_freed_ptr + start + lane, mask=start + lane < i, other=0)
    base = tl.load(num_freed_ptr + n) + tl.sum(before, 0)
    num_freed = tl.where(accepted, tl.load(num_freed_ptr + i), 0)
    for start in range(0, num_freed, BLOCK):
        k = start + lane
        page = tl.load(freed_ptr + i * max_pages + k, mask=k < num_freed)
        tl.store(free_pages_ptr + base + k, page, mask=(k < num_freed) & (base + k < num_pages))
    new_len = tl.load(new_lens_ptr + i)
    num_new = tl.where(accepted, pages_of(new_len, page_size), 0)
    for start in range(0, num_new, BLOCK):
        j = start + lane
        page = tl.load(new_table_ptr + i * max_pages + j, mask=j < num_new)
        tl.store(page_table_ptr + dst * max_pages + j, page, mask=j < num_new)
    tl.store(seq_lens_ptr + dst, new_len, mask=accepted)
    if i == n - 1:
        tl.store(status_ptr + NUM_FREE, tl.minimum(base + num_freed, num_pages), mask=accepted)


def fork_branches(
    refcount: Tensor, free_pages: Tensor, page_table: Tensor, seq_lens: Tensor, status: Tensor, src: Tensor,
    dst: Tensor, lens: Tensor | None, page_size: int,
) -> None:  # fmt: skip
    """Launches `treedecode.ops.fork_branches`. Bad values set the status to BAD_ARGUMENT."""
    page_state.check_pool(refcount, status, page_size, free_pages)
    page_state.check_rows(page_table, seq_lens)
    page_state.check_indices(src, "src")
    page_state.check_indices(dst, "dst", src, "src")
    if lens is not None:
        page_state.check_indices(lens, "lens", src, "src")
    num_pages, (max_branches, max_pages), n = refcount.shape[0], page_table.shape, src.shape[0]
    if n == 0:
        return
    new_table, freed = src.new_empty(2, n, max_pages)
    ok, new_lens = src.new_empty(2, n)
    num_freed = src.new_empty(n + 1)
    last_drop = src.new_empty(num_pages, dtype=int64)
    options = {"BLOCK": min(1024, max(64, triton.next_power_of_2(max_pages))), "num_warps": 4}
    _fork_branches_check_kernel[(n,)](
        ok, last_drop, page_table, seq_lens, status, src, dst, lens,
        num_pages, max_branches, max_pages, page_size, page_state.capacity(page_table, page_size), n, **options,
    )  # fmt: skip
    _fork_branches_count_kernel[(n,)](
        new_table, new_lens, last_drop, refcount, page_table, seq_lens, status, src, dst, lens, ok,
        max_pages, page_size, n, **options,
    )  # fmt: skip
    _fork_branches_free_kernel[(n,)](
        freed, num_freed, new_table, new_lens, last_drop, refcount, page_table, seq_lens, status, dst,
        max_pages, page_size, n, **options,
    )  # fmt: skip
    _fork_branches_commit_kernel[(n,)](
        free_pages, page_table, seq_lens, status, freed, num_freed, new_table, new_lens, dst,
        num_pages, max_pages, page_size, n, **options,
    )  # fmt: skip

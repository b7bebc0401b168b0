"""Triton kernels of append_slots: one program plans the call, then programs over slots fill the rows."""

import triton
import triton.language as tl
from torch import Tensor, int64

from treedecode.triton_kernels import check, copy_pages, page_state
from treedecode.triton_kernels.page_state import (
    BAD_ARGUMENT,
    ERROR,
    NUM_FREE,
    NUM_NEEDED,
    OK,
    OUT_OF_PAGES,
    PEAK_USED,
    pages_of,
)

NUM_COPIES, OLD_NUM_FREE = (tl.constexpr(i) for i in range(2))


@triton.jit
def _load_rows(
    rows_ptr, q_lens_ptr, page_table_ptr, seq_lens_ptr,
    i, num_pages, max_branches, max_pages, page_size, capacity, n,
):  # fmt: skip
    """Loads (row, length, new tokens, partial last page that is written to or -1, whether refused) of rows `i`."""
    row = tl.load(rows_ptr + i, mask=i < n, other=0)
    ok = (i < n) & (row >= 0) & (row < max_branches)
    row = tl.where(ok, row, 0).to(tl.int64)
    len = tl.load(seq_lens_ptr + row, mask=ok, other=0)
    q_len = tl.full(i.shape, 1, tl.int32)
    if q_lens_ptr is not None:
        q_len = tl.load(q_lens_ptr + i, mask=i < n, other=0)
    ok &= (len >= 0) & (len <= capacity) & (q_len >= 0) & (q_len <= capacity - len)
    partial = ok & (q_len > 0) & (len % page_size != 0)
    page = tl.load(page_table_ptr + row * max_pages + len // page_size, mask=partial, other=-1)
    ok &= (partial == 0) | ((page >= 0) & (page < num_pages))
    page = tl.where(ok, page, -1)
    return row, tl.where(ok, len, 0), tl.where(ok, q_len, 0), page, (i < n) & (ok == 0)


@triton.jit(do_not_specialize=["n", "num_slots"])
def _append_slots_plan_kernel(
    refcount_ptr, free_pages_ptr,  # [num_pages]
    page_table_ptr, seq_lens_ptr, status_ptr,  # [max_branches, max_pages], [max_branches], [4]
    first_slot_ptr,  # [n + 1] int64 out: offsets of the rows in slots
    len_ptr, taken_ptr,  # [n] int32 out: old length; pages taken for earlier rows and for the copy of this one
    first_page_ptr, source_ptr,  # [n] int32 out: the partial page to write to, and its original; -1 = none
    copy_src_ptr, copy_dst_ptr, copy_len_ptr, totals_ptr,  # [n] int32 out; [2] int32 out: NUM_COPIES, OLD_NUM_FREE
    rows_ptr, q_lens_ptr,  # [n] int32; q_lens may be null
    owner_ptr, sharers_ptr, last_sharer_ptr,  # [max_branches], [num_pages], [num_pages] int32 scratch
    num_pages, max_branches, max_pages, page_size, capacity, n, num_slots,
    BLOCK: tl.constexpr,
):  # fmt: skip
    error, num_free = tl.load(status_ptr + ERROR), tl.load(status_ptr + NUM_FREE)
    peak = tl.load(status_ptr + PEAK_USED)
    lane = tl.arange(0, BLOCK)
    refused = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        i = start + lane
        row, len, q_len, page, bad = _load_rows(
            rows_ptr, q_lens_ptr, page_table_ptr, seq_lens_ptr,
            i, num_pages, max_branches, max_pages, page_size, capacity, n,
        )  # fmt: skip
        refused |= bad.to(tl.int32)
        tl.store(owner_ptr + row, -1, mask=(i < n) & (bad == 0))
        tl.store(sharers_ptr + page, 0, mask=page >= 0)
        tl.store(last_sharer_ptr + page, -1, mask=page >= 0)
    tl.debug_barrier()
    for start in range(0, n, BLOCK):
        i = start + lane
        row, len, q_len, page, bad = _load_rows(
            rows_ptr, q_lens_ptr, page_table_ptr, seq_lens_ptr,
            i, num_pages, max_branches, max_pages, page_size, capacity, n,
        )  # fmt: skip
        tl.atomic_max(owner_ptr + row, i, mask=(i < n) & (bad == 0), sem="relaxed")
        tl.atomic_add(sharers_ptr + page, 1, mask=page >= 0, sem="relaxed")
        tl.atomic_max(last_sharer_ptr + page, i, mask=page >= 0, sem="relaxed")
    tl.debug_barrier()

    total_slots, total_taken = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    num_copies = 0
    for start in range(0, n, BLOCK):
        i = start + lane
        row, len, q_len, page, bad = _load_rows(
            rows_ptr, q_lens_ptr, page_table_ptr, seq_lens_ptr,
            i, num_pages, max_branches, max_pages, page_size, capacity, n,
        )  # fmt: skip
        is_row = (i < n) & (bad == 0)
        is_repeated = is_row & (tl.load(owner_ptr + row, mask=is_row, other=0) != i)
        refused |= is_repeated.to(tl.int32)
        # All sharers copy the page, except the last one if all references are in this call: it writes in place.
        shared = page >= 0
        earlier = tl.load(sharers_ptr + page, mask=shared, other=0)
        earlier -= (tl.load(last_sharer_ptr + page, mask=shared, other=-1) != i).to(tl.int32)
        copied = shared & (tl.load(refcount_ptr + page, mask=shared, other=0) > earlier)
        copy = copied.to(tl.int32)
        takes = (pages_of(len + q_len, page_size) - pages_of(len, page_size) + copy).to(tl.int64)
        taken = total_taken + tl.cumsum(takes, 0) - takes
        slot = q_len.to(tl.int64)
        tl.store(first_slot_ptr + i, total_slots + tl.cumsum(slot, 0) - slot, mask=i < n)
        from_top = num_free - 1 - taken
        in_stack = copied & (from_top >= 0) & (from_top < num_pages)
        new_page = tl.load(free_pages_ptr + from_top, mask=in_stack, other=-1)
        to = num_copies + tl.cumsum(copy, 0) - copy
        tl.store(copy_src_ptr + to, page, mask=copied)
        tl.store(copy_dst_ptr + to, new_page, mask=copied)
        tl.store(copy_len_ptr + to, len % page_size, mask=copied)
        tl.store(len_ptr + i, len, mask=i < n)
        tl.store(taken_ptr + i, (taken + copy).to(tl.int32), mask=i < n)
        tl.store(first_page_ptr + i, tl.where(copied, new_page, page), mask=i < n)
        tl.store(source_ptr + i, tl.where(copied, page, -1), mask=i < n)
        total_slots += tl.sum(slot, 0)
        total_taken += tl.sum(takes, 0)
        num_copies += tl.sum(copy, 0)

    fits = (num_free >= 0) & (num_free <= num_pages) & (total_slots <= num_slots) & (tl.max(refused, 0) == 0)
    short = fits & (total_taken > num_free)
    num_taken = tl.where(fits & (short == 0), total_taken, 0).to(tl.int32)
    for start in range(0, num_taken, BLOCK):
        k = start + lane
        page = tl.load(free_pages_ptr + num_free - 1 - k, mask=k < num_taken, other=0)
        refused |= ((k < num_taken) & ((page < 0) | (page >= num_pages))).to(tl.int32)
    fits &= tl.max(refused, 0) == 0
    accepted = (error == OK) & fits & (short == 0)
    tl.debug_barrier()  # all reads above come before the writes below

    tl.store(first_slot_ptr + n, total_slots)
    tl.store(totals_ptr + NUM_COPIES, tl.where(accepted, num_copies, 0))
    tl.store(totals_ptr + OLD_NUM_FREE, num_free)
    for start in range(0, tl.where(accepted, n, 0), BLOCK):
        i = start + lane
        row = tl.load(rows_ptr + i, mask=i < n, other=0).to(tl.int64)
        len = tl.load(len_ptr + i, mask=i < n, other=0)
        q_len = tl.full([BLOCK], 1, tl.int32)
        if q_lens_ptr is not None:
            q_len = tl.load(q_lens_ptr + i, mask=i < n, other=0)
        page = tl.load(first_page_ptr + i, mask=i < n, other=-1)
        source = tl.load(source_ptr + i, mask=i < n, other=-1)
        tl.store(seq_lens_ptr + row, len + q_len, mask=i < n)
        tl.store(page_table_ptr + row * max_pages + len // page_size, page, mask=source >= 0)
        tl.store(refcount_ptr + page, 1, mask=source >= 0)
        tl.atomic_add(refcount_ptr + source, -1, mask=source >= 0, sem="relaxed")
    if error == OK:
        if accepted:
            tl.store(status_ptr + NUM_FREE, num_free - num_taken)
            tl.store(status_ptr + PEAK_USED, tl.maximum(peak, num_pages - num_free + num_taken))
        elif short:
            tl.store(status_ptr + ERROR, OUT_OF_PAGES)
            tl.store(status_ptr + NUM_NEEDED, tl.minimum(total_taken, 0x7FFFFFFF).to(tl.int32))
        else:
            tl.store(status_ptr + ERROR, BAD_ARGUMENT)


@triton.jit(do_not_specialize=["n", "num_slots", "steps"])
def _append_slots_fill_kernel(
    slots_ptr,  # [num_slots] int64 out
    refcount_ptr, free_pages_ptr, page_table_ptr, status_ptr,
    first_slot_ptr,  # [n + 1] int64
    len_ptr, taken_ptr, first_page_ptr, totals_ptr,  # as the plan kernel writes them
    rows_ptr,  # [n] int32
    max_pages, page_size, n, num_slots, steps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    accepted = tl.load(status_ptr + ERROR) == OK
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = slot < tl.where(accepted, tl.load(first_slot_ptr + n), 0)
    tl.store(slots_ptr + slot, -1, mask=(slot < num_slots) & (mask == 0))
    # Find the last row that begins at or before the slot. Rows without new tokens begin where the next row does.
    low, high = tl.zeros([BLOCK], tl.int32), tl.full([BLOCK], n, tl.int32)
    for _ in range(steps):
        middle = (low + high) // 2
        begun = tl.load(first_slot_ptr + middle, mask=mask & (middle < n), other=0) <= slot
        low, high = tl.where(begun, middle, low), tl.where(begun, high, middle)
    row = tl.load(rows_ptr + low, mask=mask, other=0).to(tl.int64)
    len = tl.load(len_ptr + low, mask=mask, other=0)
    pos = len + (slot - tl.load(first_slot_ptr + low, mask=mask, other=0)).to(tl.int32)
    j, offset = pos // page_size, pos % page_size
    new = j - pages_of(len, page_size)  # -1: the partial page that the row ends in
    from_top = tl.load(totals_ptr + OLD_NUM_FREE) - 1 - tl.load(taken_ptr + low, mask=mask, other=0) - new
    page = tl.load(free_pages_ptr + from_top, mask=mask & (new >= 0), other=0)
    page = tl.where(new >= 0, page, tl.load(first_page_ptr + low, mask=mask, other=0))
    tl.store(slots_ptr + slot, page.to(tl.int64) * page_size + offset, mask=mask)
    tl.store(page_table_ptr + row * max_pages + j, page, mask=mask & (offset == 0))
    tl.store(refcount_ptr + page, 1, mask=mask & (offset == 0))


def append_slots(
    refcount: Tensor, free_pages: Tensor, page_table: Tensor, seq_lens: Tensor, status: Tensor, kv: Tensor,
    slots: Tensor, rows: Tensor, q_lens: Tensor | None, page_size: int,
) -> None:  # fmt: skip
    """Launches `treedecode.ops.append_slots`. Bad values set the status to BAD_ARGUMENT, and all slots to -1."""
    page_state.check_pool(refcount, status, page_size, free_pages)
    page_state.check_rows(page_table, seq_lens)
    copy_pages.check_kv(kv, page_size)
    num_pages, (max_branches, max_pages) = refcount.shape[0], page_table.shape
    if kv.shape[2] != num_pages:
        raise ValueError(f"kv: expected num_pages = {num_pages}, got {kv.shape[2]}")
    check.tensor(slots, "slots", "[num_slots]", (-1,), int64, contiguous=True)
    page_state.check_indices(rows, "rows")
    if q_lens is not None:
        page_state.check_indices(q_lens, "q_lens", rows, "rows")
    n, num_slots = rows.shape[0], slots.shape[0]
    first_slot = slots.new_empty(n + 1)
    lens, taken, first_page, source, *copies = rows.new_empty(7, n)
    totals, owner = rows.new_empty(2), rows.new_empty(max_branches)
    sharers, last_sharer = rows.new_empty(2, num_pages)
    _append_slots_plan_kernel[(1,)](
        refcount, free_pages, page_table, seq_lens, status, first_slot, lens, taken, first_page, source, *copies,
        totals, rows, q_lens, owner, sharers, last_sharer, num_pages, max_branches, max_pages, page_size,
        page_state.capacity(page_table, page_size), n, num_slots,
        BLOCK=min(512, max(64, triton.next_power_of_2(n))), num_warps=4,
    )  # fmt: skip
    if num_slots:
        block = min(256, max(64, triton.next_power_of_2(num_slots)))
        _append_slots_fill_kernel[(triton.cdiv(num_slots, block),)](
            slots, refcount, free_pages, page_table, status, first_slot, lens, taken, first_page, totals, rows,
            max_pages, page_size, n, num_slots, n.bit_length(), BLOCK=block, num_warps=4,
        )  # fmt: skip
    copy_pages.launch(kv, *copies, totals)

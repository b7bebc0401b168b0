"""Triton kernel of hold_pages."""

import triton
import triton.language as tl
from torch import Tensor

from treedecode.triton_kernels import page_state
from treedecode.triton_kernels.page_state import BAD_ARGUMENT, ERROR, NUM_FREE, OK


@triton.jit(do_not_specialize=["n"])
def _hold_pages_kernel(
    refcount_ptr, free_pages_ptr,  # [num_pages]
    status_ptr,  # [4]
    pages_ptr,  # [n] int32
    drops_ptr, last_drop_ptr,  # [num_pages] int32 scratch: drops in this call; index in `pages` of the last one
    num_pages, n,
    HOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    error, num_free = tl.load(status_ptr + ERROR), tl.load(status_ptr + NUM_FREE)
    lane = tl.arange(0, BLOCK)
    refused = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        i = start + lane
        page = tl.load(pages_ptr + i, mask=i < n, other=0)
        in_range = (i < n) & (page >= 0) & (page < num_pages)
        refcount = tl.load(refcount_ptr + page, mask=in_range, other=0)
        refused |= ((i < n) & (refcount < 1)).to(tl.int32)
        if not HOLD:  # initialise the scratch of the pages of this call, which are few
            tl.store(drops_ptr + page, 0, mask=in_range)
            tl.store(last_drop_ptr + page, -1, mask=in_range)
    if not HOLD:
        tl.debug_barrier()
        for start in range(0, n, BLOCK):
            i = start + lane
            page = tl.load(pages_ptr + i, mask=i < n, other=0)
            in_range = (i < n) & (page >= 0) & (page < num_pages)
            tl.atomic_add(drops_ptr + page, 1, mask=in_range, sem="relaxed")
            tl.atomic_max(last_drop_ptr + page, i, mask=in_range, sem="relaxed")
        tl.debug_barrier()
        for start in range(0, n, BLOCK):
            i = start + lane
            page = tl.load(pages_ptr + i, mask=i < n, other=0)
            in_range = (i < n) & (page >= 0) & (page < num_pages)
            refcount = tl.load(refcount_ptr + page, mask=in_range, other=0)
            refused |= (tl.load(drops_ptr + page, mask=in_range, other=0) > refcount).to(tl.int32)
    bad = (tl.max(refused, 0) != 0) | (num_free < 0) | (num_free > num_pages)
    tl.debug_barrier()  # all reads above come before the writes below

    num_freed = 0
    for start in range(0, tl.where((error == OK) & (bad == 0), n, 0), BLOCK):
        i = start + lane
        page = tl.load(pages_ptr + i, mask=i < n, other=0)
        if HOLD:
            tl.atomic_add(refcount_ptr + page, 1, mask=i < n, sem="relaxed")
        else:
            # The last entry of a page drops all its references, so freed pages are in the order of their last entries.
            last = (i < n) & (tl.load(last_drop_ptr + page, mask=i < n, other=-1) == i)
            remaining = tl.load(refcount_ptr + page, mask=last, other=1) - tl.load(drops_ptr + page, mask=last, other=0)
            tl.store(refcount_ptr + page, remaining, mask=last)
            freed = (last & (remaining == 0)).to(tl.int32)
            to = num_free + num_freed + tl.cumsum(freed, 0) - freed
            tl.store(free_pages_ptr + to, page, mask=(freed != 0) & (to < num_pages))
            num_freed += tl.sum(freed, 0)
    if error == OK:
        if bad:
            tl.store(status_ptr + ERROR, BAD_ARGUMENT)
        elif not HOLD:
            tl.store(status_ptr + NUM_FREE, tl.minimum(num_free + num_freed, num_pages))


def hold_pages(refcount: Tensor, free_pages: Tensor, status: Tensor, pages: Tensor, hold: bool) -> None:
    """Launches `treedecode.ops.hold_pages`.

    Pages that are out of range, free or dropped too often set the status to BAD_ARGUMENT.
    """
    page_state.check_pool(refcount, status, free_pages=free_pages)
    page_state.check_indices(pages, "pages")
    num_pages, n = refcount.shape[0], pages.shape[0]
    drops, last_drop = refcount.new_empty(2, 0 if hold else num_pages)
    _hold_pages_kernel[(1,)](
        refcount, free_pages, status, pages, drops, last_drop, num_pages, n,
        HOLD=hold, BLOCK=min(1024, max(32, triton.next_power_of_2(n))), num_warps=4,
    )  # fmt: skip

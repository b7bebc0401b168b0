"""Triton kernel of adopt_pages."""

import triton
import triton.language as tl
from torch import Tensor

from treedecode.triton_kernels import page_state
from treedecode.triton_kernels.page_state import BAD_ARGUMENT, ERROR, NUM_FREE, OK


@triton.jit(do_not_specialize=["n", "num_tokens"])
def _adopt_pages_kernel(
    refcount_ptr,  # [num_pages]
    row_ptr,  # [max_pages] the row of the page table
    seq_len_ptr,  # [1] the row's length
    status_ptr,  # [4]
    pages_ptr,  # [n] int32
    num_pages, n, num_tokens,
    BLOCK: tl.constexpr,
):  # fmt: skip
    error, num_free = tl.load(status_ptr + ERROR), tl.load(status_ptr + NUM_FREE)
    seq_len = tl.load(seq_len_ptr)
    lane = tl.arange(0, BLOCK)
    refused = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        i = start + lane
        page = tl.load(pages_ptr + i, mask=i < n, other=0)
        in_range = (i < n) & (page >= 0) & (page < num_pages)
        refcount = tl.load(refcount_ptr + page, mask=in_range, other=0)
        refused |= ((i < n) & (refcount < 1)).to(tl.int32)
    bad = (tl.max(refused, 0) != 0) | (seq_len != 0) | (num_free < 0) | (num_free > num_pages)
    tl.debug_barrier()  # all reads above come before the writes below

    for start in range(0, tl.where((error == OK) & (bad == 0), n, 0), BLOCK):
        i = start + lane
        page = tl.load(pages_ptr + i, mask=i < n, other=0)
        tl.atomic_add(refcount_ptr + page, 1, mask=i < n, sem="relaxed")
        tl.store(row_ptr + i, page, mask=i < n)
    if error == OK:
        if bad:
            tl.store(status_ptr + ERROR, BAD_ARGUMENT)
        else:
            tl.store(seq_len_ptr, num_tokens)


def adopt_pages(
    refcount: Tensor, page_table: Tensor, seq_lens: Tensor, status: Tensor, pages: Tensor, row: int, num_tokens: int,
    page_size: int,
) -> None:  # fmt: skip
    """Launches `treedecode.ops.adopt_pages`.

    A row that is not empty, and a page that is out of range or free, set the status to BAD_ARGUMENT.
    """
    page_state.check_pool(refcount, status, page_size)
    page_state.check_rows(page_table, seq_lens)
    page_state.check_indices(pages, "pages")
    (max_branches, max_pages), n = page_table.shape, pages.shape[0]
    if not 0 <= row < max_branches:
        raise ValueError(f"row: expected a row in 0 .. {max_branches - 1}, got {row}")
    if n > max_pages:
        raise ValueError(f"pages: expected at most as many as a row holds, {max_pages}, got {n}")
    if num_tokens < 0 or triton.cdiv(num_tokens, page_size) != n:
        expected = f"a length that ends in the last page, at most {n * page_size}"
        raise ValueError(f"num_tokens: expected {expected}, got {num_tokens}")
    _adopt_pages_kernel[(1,)](
        refcount, page_table[row], seq_lens[row:], status, pages, refcount.shape[0], n, num_tokens,
        BLOCK=min(1024, max(32, triton.next_power_of_2(n))), num_warps=4,
    )  # fmt: skip

"""Page ops: they allocate, share and free pages of a paged cache. `treedecode.cache.page_pool.PagePool` owns a pool.

Every op checks, counts, then commits; an op that is refused has written nothing. Running out of pages raises no
exception. It sets the status to `OUT_OF_PAGES`, so that a device needs no host sync. The error stays until the owner
resets it; until then the page ops do nothing, and append_slots returns slots of -1, which `append_kv` skips. On a GPU
the host does not read values: a value that raises a ValueError on the CPU sets the status to `BAD_ARGUMENT` there.

Order of page ids: pages are taken from the top of the free stack, row by row in the order of `rows`, each row's in
ascending position. Pages go back on the stack row by row in the order of `dst`, each row's last page first, when their
last reference is dropped. So page ids are a function of the calls alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call, register_fake
from treedecode.reference.pages import (
    BAD_ARGUMENT,
    OK,
    OUT_OF_PAGES,
    STATUS_ERROR,
    STATUS_NUM_FREE,
    STATUS_NUM_NEEDED,
    STATUS_PEAK_USED,
)

__all__ = [
    "BAD_ARGUMENT",
    "OK",
    "OUT_OF_PAGES",
    "STATUS_ERROR",
    "STATUS_NUM_FREE",
    "STATUS_NUM_NEEDED",
    "STATUS_PEAK_USED",
    "PageState",
    "adopt_pages",
    "append_slots",
    "copy_pages",
    "fork_branches",
    "hold_pages",
]


class PageState(NamedTuple):
    """The page table, the reference counts and the free pages of a pool; the page ops change them in place.

    Lengths, page ids and the number of free pages are checked against the sizes of the tensors before anything is
    written. Other values are trusted, such as the reference counts.

    refcount: `[num_pages]` int32, references from page-table rows and from holders such as a prefix index.
    free_pages: `[num_pages]` int32, a stack of `num_free` page ids; entries above it are undefined.
    page_table: `[max_branches, max_pages]` int32; entries from `ceil(seq_len / page_size)` on are undefined.
    seq_lens: `[max_branches]` int32, tokens per row.
    status: `[4]` int32: error (`OK`, `OUT_OF_PAGES` or `BAD_ARGUMENT`; sticky), num_free, pages the refused call
        needed, the most pages ever used at once.
    page_size: tokens per page.
    """

    refcount: Tensor
    free_pages: Tensor
    page_table: Tensor
    seq_lens: Tensor
    status: Tensor
    page_size: int


def fork_branches(state: PageState, src: Tensor, dst: Tensor, lens: Tensor | None = None) -> None:
    """Makes rows `dst` copies of rows `src`, all at once. It copies references, no keys or values.

    The old pages of the dst rows are dropped. src and dst may overlap in any way, src may repeat rows: a beam reorder
    is `src = parents, dst = rows`. With `src = dst`, `lens` truncates the rows, and lens of 0 release them.

    Args:
        src, dst: `[n]` int32 row ids; each row at most once in dst.
        lens: `[n]` int32 new lengths, at most the source's; None = the whole source.

    Raises:
        ValueError: an argument's shape or value is out of range; nothing is written.
        TypeError: an argument's dtype is wrong; nothing is written.
    """
    if USE_REFERENCE:
        return reference.fork_branches(state, src, dst, lens)
    call(torch.ops.treedecode.fork_branches.default, *state[:5], src, dst, lens, state.page_size)
    return None


def append_slots(state: PageState, kv: Tensor, slots: Tensor, rows: Tensor, q_lens: Tensor | None = None) -> None:
    """Lengthens rows by their new tokens and returns the slots of these in `slots`.

    A row whose partial last page is shared gets a copy of it first (the tokens in it, all layers), unless every other
    sharer copied earlier in the same call: then it writes in place. Rows that share a page copy in the order of `rows`.
    So only one row refers to a page that is written to.

    Out of pages: the status is set, the slots are -1 and nothing else is written.

    Args:
        kv: `[num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]`, any dtype, each page contiguous.
        slots: `[num_slots]` int64, written: `page * page_size + offset` of each new token, in the order of rows, and -1
            beyond the sum of q_lens. So one buffer serves any number of rows, which CUDA graphs need.
        rows: `[n]` int32 row ids, each at most once.
        q_lens: `[n]` int32 new tokens per row, 0 allowed; None = 1 each.

    Raises:
        ValueError: an argument's shape or value is out of range, or a row is longer than its page table; nothing is
            written.
        TypeError: an argument's dtype is wrong; nothing is written.
    """
    if USE_REFERENCE:
        return reference.append_slots(state, kv, slots, rows, q_lens)
    call(torch.ops.treedecode.append_slots.default, *state[:5], kv, slots, rows, q_lens, state.page_size)
    return None


def hold_pages(state: PageState, pages: Tensor, hold: bool = True) -> None:
    """Adds (or with `hold=False` drops) one reference per entry of `pages`, for a holder outside of the page table.

    Args:
        pages: `[n]` int32 page ids, all in use; pages whose last reference is dropped go on the free stack in order.

    Raises:
        ValueError: a page is free or dropped more often than it is referred to; nothing is written.
        TypeError: a dtype is wrong; nothing is written.
    """
    if USE_REFERENCE:
        return reference.hold_pages(state, pages, hold)
    call(torch.ops.treedecode.hold_pages.default, state.refcount, state.free_pages, state.status, pages, hold)
    return None


def adopt_pages(state: PageState, pages: Tensor, row: int, num_tokens: int) -> None:
    """Gives an empty row existing pages, which get one reference each.

    Args:
        pages: `[ceil(num_tokens / page_size)]` int32 page ids in ascending position, all in use.
        row: a row of length 0.
        num_tokens: the row's new length.

    Raises:
        ValueError: the row is not empty, a page is free, or the counts do not fit; nothing is written.
        TypeError: a dtype is wrong; nothing is written.
    """
    if USE_REFERENCE:
        return reference.adopt_pages(state, pages, row, num_tokens)
    args = (state.refcount, state.page_table, state.seq_lens, state.status, pages, row, num_tokens, state.page_size)
    call(torch.ops.treedecode.adopt_pages.default, *args)
    return None


def copy_pages(kv: Tensor, src: Tensor, dst: Tensor, num_tokens: Tensor | None = None) -> None:
    """Copies pages within the cache, K and V of all layers in one call.

    Args:
        kv: `[num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]`, any dtype, each page contiguous.
        src, dst: `[n]` int32 page ids; a negative dst is skipped. No dst may also be a src or appear twice:
            then its content is undefined, and this is not checked.
        num_tokens: `[n]` int32, how many of a page's first tokens to copy; None = whole pages.

    Raises:
        ValueError: an argument's shape or value is out of range; nothing is written.
        TypeError: an argument's dtype is wrong; nothing is written.
    """
    if USE_REFERENCE:
        return reference.copy_pages(kv, src, dst, num_tokens)
    call(torch.ops.treedecode.copy_pages.default, kv, src, dst, num_tokens)
    return None


@register_fake("fork_branches", "append_slots", "hold_pages", "adopt_pages", "copy_pages")
def _(*args: object) -> None:
    """Returns nothing: the page ops only write to their arguments."""

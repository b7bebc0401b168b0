"""Shared by the page ops: argument checks of the page state, and names of the entries and values of its status."""

import triton
import triton.language as tl
from torch import Tensor, int32

from treedecode.triton_kernels import check

# As in treedecode.ops.pages, which cannot be imported here because it loads the launchers.
OK = tl.constexpr(0)
OUT_OF_PAGES = tl.constexpr(1)
BAD_ARGUMENT = tl.constexpr(2)
ERROR, NUM_FREE, NUM_NEEDED, PEAK_USED = (tl.constexpr(i) for i in range(4))

INT32_MAX = 2**31 - 1


@triton.jit
def pages_of(num_tokens, page_size):
    """Returns how many pages the tokens take. Unlike (num_tokens + page_size - 1) // page_size it cannot overflow."""
    return num_tokens // page_size + (num_tokens % page_size != 0).to(tl.int32)


def check_pool(refcount: Tensor, status: Tensor, page_size: int = 1, free_pages: Tensor | None = None) -> None:
    """Checks the tensors of the pool.

    Raises:
        ValueError: a shape or a number is wrong; the message names the argument.
        TypeError: a dtype is wrong; the message names the argument.
    """
    check.tensor(refcount, "refcount", "[num_pages]", (-1,), int32, contiguous=True)
    check.tensor(status, "status", "[4]", (4,), int32, contiguous=True)
    check.value(1 <= page_size <= INT32_MAX, "page_size", "1 to 2^31 - 1", page_size)
    if free_pages is not None:
        check.tensor(free_pages, "free_pages", "[num_pages]", tuple(refcount.shape), int32, contiguous=True)


def check_rows(page_table: Tensor, seq_lens: Tensor) -> None:
    """Checks the page table and the lengths of its rows.

    Raises:
        ValueError: a shape is wrong; the message names the argument.
        TypeError: a dtype is wrong; the message names the argument.
    """
    check.tensor(page_table, "page_table", "[max_branches, max_pages]", (-1, -1), int32, contiguous=True)
    check.tensor(seq_lens, "seq_lens", "[max_branches]", tuple(page_table.shape[:1]), int32, contiguous=True)


def check_indices(t: Tensor, name: str, like: Tensor | None = None, like_name: str = "") -> None:
    """Checks a vector of int32, as long as `like` where there is one.

    Raises:
        ValueError: another shape; the message names the argument.
        TypeError: another dtype; the message names the argument.
    """
    text, shape = ("[n]", (-1,)) if like is None else (f"the shape of {like_name}", tuple(like.shape))
    check.tensor(t, name, text, shape, int32, contiguous=True)


def capacity(page_table: Tensor, page_size: int) -> int:
    """Returns the most tokens that a row can hold, which is at most the largest int32."""
    return min(page_table.shape[1] * page_size, INT32_MAX)

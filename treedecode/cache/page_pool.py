"""PagePool: the paged memory of keys and values, and the page table of the branches that share it."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treedecode import ops
from treedecode.cache.memory import lazy_zeros
from treedecode.ops.pages import (
    BAD_ARGUMENT,
    OK,
    STATUS_ERROR,
    STATUS_NUM_FREE,
    STATUS_NUM_NEEDED,
    STATUS_PEAK_USED,
)

Int32Array = NDArray[np.int32]
_INT32, _LIMITS = np.dtype(np.int32), np.iinfo(np.int32)
IntArrayLike = Tensor | Int32Array | Sequence[int]  # integers that a caller may give in any form


class OutOfPages(RuntimeError):
    """The pool has too few free pages for the call; nothing was changed.

    Attributes:
        num_needed: pages that the call needs.
        num_free: pages that are free.
    """

    def __init__(self, num_needed: int, num_free: int) -> None:
        super().__init__(f"out of pages: {num_needed} needed, {num_free} free")
        self.num_needed = num_needed
        self.num_free = num_free


class OutOfBranches(RuntimeError):
    """The pool has too few free rows for the call; nothing was changed."""


class PagePool:
    """Keeps keys and values of many branches in shared pages, and the page table of all branches.

    A branch is a row of the page table. `allocate_rows` hands rows out and `release` takes them back; in between a row
    may be empty. Forking shares pages; a shared page is copied when a branch writes to it, which only ever happens to a
    partial last page. Not thread-safe. Calls that raise have changed nothing.

    Args:
        num_layers, num_kv_heads, head_dim, dtype: of the model; K and V alike.
        num_pages: pages in the pool; one page is `page_size` tokens of all layers.
        page_size: tokens per page.
        max_branches: rows of the page table.
        max_pages_per_branch: columns of the page table.
        device: where the memory and the page state live.

    Raises:
        ValueError: a size is below 1 (`num_layers`: below 0).
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int = 16,
        max_branches: int,
        max_pages_per_branch: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = {
            "num_kv_heads": num_kv_heads, "head_dim": head_dim, "num_pages": num_pages, "page_size": page_size,
            "max_branches": max_branches, "max_pages_per_branch": max_pages_per_branch,
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if num_layers < 0:
            raise ValueError(f"num_layers: expected at least 0, got {num_layers}")
        self.page_size = page_size
        self.num_pages = num_pages
        self.device = torch.device(device)
        # Zeros: masked-out positions of a page must not hold NaN for kernels that multiply before they mask.
        shape = (num_layers, 2, num_pages, num_kv_heads, page_size, head_dim)
        self.kv = lazy_zeros(shape, dtype, self.device)
        self._layers = [(kv[0].transpose(1, 2), kv[1].transpose(1, 2)) for kv in self.kv]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.refcount = zeros(num_pages)
        # Popped from the end: pages are handed out in ascending order at first.
        self.free_pages = torch.arange(num_pages - 1, -1, -1, dtype=torch.int32, device=device)
        self.page_table = zeros(max_branches, max_pages_per_branch)
        self.seq_lens = zeros(max_branches)
        self.status = torch.tensor([0, num_pages, 0, 0], dtype=torch.int32, device=device)
        self.state = ops.PageState(
            self.refcount, self.free_pages, self.page_table, self.seq_lens, self.status, page_size
        )
        # On the CPU a view: reading an element costs nanoseconds instead of a tensor op.
        self._status = self.status.numpy() if self.device.type == "cpu" else None
        self._allocated = np.zeros(max_branches, dtype=np.bool_)

    # -- rows --

    @property
    def max_branches(self) -> int:
        """Rows of the page table."""
        return len(self._allocated)

    @property
    def num_free_rows(self) -> int:
        """Rows `allocate_rows` can hand out."""
        return int(self.max_branches - np.count_nonzero(self._allocated))

    def allocate_rows(self, n: int) -> Int32Array:
        """Hands out the `n` lowest free rows, `[n]` int32 ascending; they are empty.

        Raises:
            OutOfBranches: fewer than `n` rows are free.
        """
        rows = np.flatnonzero(~self._allocated)[:n].astype(np.int32)
        if len(rows) < n:
            raise OutOfBranches(f"out of branches: {n} rows needed, {len(rows)} of {self.max_branches} free")
        self._allocated[rows] = True
        return rows

    # -- branches --

    def fork(self, src_rows: IntArrayLike, dst_rows: IntArrayLike, lens: IntArrayLike | None = None) -> None:
        """Makes rows `dst_rows` copies of `src_rows`, all at once; their old pages are dropped, and no KV is copied.

        src and dst may overlap in any way, which makes a beam reorder one call: `fork(parents, rows)`.

        Args:
            src_rows, dst_rows: `[n]` row ids; each dst row once.
            lens: `[n]` tokens to keep, at most the source's; None = all.

        Raises:
            ValueError: a row is not allocated, a dst row appears twice, a length is too large.
        """
        src = self._tensor(self._rows(src_rows, "src_rows"))
        dst = self._tensor(self._rows(dst_rows, "dst_rows"))
        ops.fork_branches(self.state, src, dst, None if lens is None else self._tensor(_int32(lens)))

    def append(self, rows: IntArrayLike, q_lens: IntArrayLike | None = None) -> Tensor:
        """Lengthens rows by new tokens; pages are allocated, and shared partial last pages copied, as needed.

        Args:
            rows: `[n]` row ids, each once.
            q_lens: `[n]` new tokens per row; None = 1 each.

        Returns:
            `[sum of q_lens]` int64 slots for `ops.append_kv`, in the order of rows. The KV there is undefined until
            written.

        Raises:
            OutOfPages: nothing was changed.
            ValueError: a row is not allocated, appears twice, or would be longer than the page table is wide.
        """
        ids = self._rows(rows, "rows")
        if q_lens is None:
            lens, num_slots = None, ids.size
        else:
            new = _int32(q_lens)
            # A negative length is refused by the op; the buffer must not be what fails.
            lens, num_slots = self._tensor(new), max(int(np.add.reduce(new)), 0)
        slots = torch.empty(num_slots, dtype=torch.int64, device=self.device)
        ops.append_slots(self.state, self.kv, slots, self._tensor(ids), lens)
        if self._read_status(STATUS_ERROR) != OK:
            self._raise_refusal()
        return slots

    def truncate(self, rows: IntArrayLike, lens: IntArrayLike) -> None:
        """Shortens rows to `lens` tokens, `[n]`.

        Raises:
            ValueError: a row is not allocated or appears twice, or a length is larger than the row's.
        """
        self.fork(rows, rows, lens)

    def clear(self, rows: IntArrayLike) -> None:
        """Drops all pages of the rows, which stay allocated."""
        ids = self._rows(rows, "rows")
        self._drop_all(ids)

    def release(self, rows: IntArrayLike) -> None:
        """Drops all pages of the rows and gives the rows back.

        Raises:
            ValueError: a row is not allocated (released twice) or appears twice.
        """
        ids = self._rows(rows, "rows")
        self._drop_all(ids)
        self._allocated[ids] = False

    # -- pages referred to from outside of the page table --

    def adopt(self, row: int, pages: IntArrayLike, num_tokens: int) -> None:
        """Starts an empty row on existing pages, such as those that a prefix index found.

        Args:
            row: row id.
            pages: `[ceil(num_tokens / page_size)]` page ids in order. When the last one is partly used, the row copies
                it before it writes.
            num_tokens: the row's new length.

        Raises:
            ValueError: the row is not allocated or not empty, a page is free, or the counts do not fit.
        """
        self._rows([row], "row")
        ops.adopt_pages(self.state, self._tensor(_int32(pages)), int(row), int(num_tokens))

    def retain(self, pages: IntArrayLike) -> None:
        """Adds a reference to each page (`[n]` ids, all in use), held outside of the page table.

        Raises:
            ValueError: a page is free.
        """
        ops.hold_pages(self.state, self._tensor(_int32(pages)), True)

    def drop(self, pages: IntArrayLike) -> None:
        """Drops a reference of `retain` from each page (`[n]` ids).

        Raises:
            ValueError: a page has fewer references than are dropped.
        """
        ops.hold_pages(self.state, self._tensor(_int32(pages)), False)

    def pages(self, row: int) -> Int32Array:
        """Returns a copy of a row's page ids in order, `[ceil(seq_len / page_size)]`."""
        num_pages = -(-int(self.seq_lens[row]) // self.page_size)
        return self.page_table[row, :num_pages].numpy(force=True).copy()

    # -- memory --

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """Returns `(k_pages, v_pages)` of a layer.

        Both are `[num_pages, page_size, num_kv_heads, head_dim]` views of HND memory.
        """
        return self._layers[i]

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self._layers)

    @property
    def num_free_pages(self) -> int:
        """Pages without references."""
        return self._read_status(STATUS_NUM_FREE)

    @property
    def peak_used_pages(self) -> int:
        """The most pages that were ever in use at once."""
        return self._read_status(STATUS_PEAK_USED)

    def reset_status(self) -> None:
        """Lets page ops work again after one was refused for lack of pages."""
        self.status[STATUS_ERROR] = OK
        self.status[STATUS_NUM_NEEDED] = 0

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: K and V, all layers."""
        return self.kv.numel() // self.num_pages * self.kv.element_size()

    def check_integrity(self, held: Iterable[int] = ()) -> None:
        """Checks every invariant of the page state.

        Args:
            held: page ids retained outside of the page table, once per reference.

        Raises:
            AssertionError: names the broken invariant. (No assert statement, so `python -O` checks too.)
        """

        def require(ok: bool, message: str) -> None:
            if not ok:
                raise AssertionError(f"PagePool: {message}")

        status = self.status.tolist()
        refcount, seq_lens = self.refcount.tolist(), self.seq_lens.tolist()
        num_free = status[STATUS_NUM_FREE]
        require(status[STATUS_ERROR] == OK, f"status has error {status[STATUS_ERROR]}")
        require(0 <= num_free <= self.num_pages, f"{num_free} free pages of {self.num_pages}")
        free = self.free_pages[:num_free].tolist()
        expected = Counter(int(page) for page in held)
        for row, length in enumerate(seq_lens):
            require(0 <= length <= self.page_table.shape[1] * self.page_size, f"row {row} has length {length}")
            require(length == 0 or bool(self._allocated[row]), f"row {row} is free but has {length} tokens")
            pages = self.pages(row).tolist()
            require(len(set(pages)) == len(pages), f"row {row} has a page twice: {pages}")
            require(all(0 <= page < self.num_pages for page in pages), f"row {row} has a page out of range: {pages}")
            expected.update(pages)
        for page, count in enumerate(refcount):
            require(count == expected[page], f"page {page} has refcount {count} but {expected[page]} references")
        require(max(expected, default=0) < self.num_pages, "a held page is out of range")
        require(len(set(free)) == len(free), "a page is on the free stack twice")
        require(
            set(free) == {page for page, count in enumerate(refcount) if count == 0},
            "the free stack is not the set of pages without references",
        )
        require(status[STATUS_PEAK_USED] >= self.num_pages - num_free, "the peak is below the pages in use")

    # -- helpers: the per-step path, where each tensor or numpy call saved is a microsecond --

    def _rows(self, rows: IntArrayLike, name: str) -> Int32Array:
        """Converts to `[n]` row ids, and refuses those that are not allocated; the op refuses ids out of range."""
        ids = _int32(rows)
        allocated = self._allocated.take(ids, mode="clip")
        if not allocated.all():
            raise ValueError(f"{name}: row {ids[~allocated][0]} is not allocated")
        return ids

    def _tensor(self, array: Int32Array) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._status is not None else tensor.to(self.device)

    def _drop_all(self, rows: Int32Array) -> None:
        ids = self._tensor(rows)
        ops.fork_branches(self.state, ids, ids, torch.zeros_like(ids))

    def _read_status(self, i: int) -> int:
        return int(self.status[i] if self._status is None else self._status[i])

    def _raise_refusal(self) -> None:
        error, needed = self._read_status(STATUS_ERROR), self._read_status(STATUS_NUM_NEEDED)
        self.reset_status()
        if error == BAD_ARGUMENT:  # by this call, or by one before it that nobody waited for
            raise ValueError(f"PagePool: a page op on {self.device} was given rows, lengths or pages out of range")
        raise OutOfPages(needed, self.num_free_pages)


def _int32(values: IntArrayLike) -> Int32Array:
    """Converts to a contiguous writable int32 array, without a copy where it is one already."""
    if type(values) is np.ndarray and values.dtype == _INT32 and values.flags.forc and values.flags.writeable:
        return values
    if isinstance(values, Tensor):
        values = values.numpy(force=True)
    array = np.array(values)
    if array.size == 0:
        return np.zeros(array.shape, np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"expected integers, got {array.dtype}")
    if array.min() < _LIMITS.min or array.max() > _LIMITS.max:
        raise ValueError(f"expected 32-bit integers, got {array.tolist()}")
    return np.ascontiguousarray(array, dtype=np.int32)

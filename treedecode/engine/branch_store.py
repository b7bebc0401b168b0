"""BranchStore: the table of branches, the page pool and the prefix index, kept in step with each other."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from treedecode._host import PrefixIndex
from treedecode.cache.page_pool import PagePool
from treedecode.common.arrays import IntArray
from treedecode.engine.branch_table import BranchTable, Work, child_seeds
from treedecode.engine.futures import WAITING_LOOPS, running_loop, settle
from treedecode.engine.next_logits import NextLogits


class BranchStore:
    """Branches by row id, `[n]` int64 arrays throughout. A branch lives as long as handles on it are held.

    Safe to call from several threads.

    Args:
        max_tokens: tokens that a branch may have.
        on_released: called with rows that are released and an error for the work still to be done on them.
    """

    def __init__(
        self, pool: PagePool, *, max_tokens: int, on_released: Callable[[IntArray, BaseException], None]
    ) -> None:
        self.pool = pool
        self.table = BranchTable(pool.max_branches, max_tokens)
        self.index = PrefixIndex(pool.page_size)
        self.next_logits = NextLogits()
        self.lock = threading.RLock()
        self.closed = False
        self._on_released = on_released
        # The event loop of the call that releases a row when it ends; None: a frontier holds it, or it is free.
        self._caller = np.full(pool.max_branches, None, object)
        self._abandoned: deque[IntArray] = deque()
        self._waiting: list[asyncio.Future[None]] = []

    # -- opening, forking, releasing --

    @property
    def num_free_rows(self) -> int:
        """Branches that can still be opened."""
        self.collect()
        return self.pool.num_free_rows

    def open(self, prompts: Sequence[IntArray], seeds: IntArray, account: int = -1) -> IntArray:
        """Opens branches on prompts (token ids), paid for by `account`; nothing is computed yet."""
        with self.lock_open():
            rows = self.pool.allocate_rows(len(prompts)).astype(np.int64)
            self.table.open(rows, list(prompts), seeds, account)
            self._caller[rows] = running_loop()
            return rows

    def open_available(self, prompt: IntArray, seeds: IntArray) -> IntArray:
        """Opens branches on one prompt for the first of `seeds`, as many as there are free rows; maybe none."""
        with self.lock_open():
            count = min(len(seeds), self.pool.num_free_rows)
            return self.open([prompt] * count, seeds[:count]) if count else np.empty(0, np.int64)

    def fork(self, parents: IntArray, lens: IntArray | None = None, seeds: IntArray | None = None) -> IntArray:
        """Opens branches that go on from `parents` (ids may repeat); pages are shared, seeds are new unless given.

        Args:
            lens: tokens to keep of each parent; None = all.
        """
        with self.lock_open():
            table = self.table
            self.require_held(parents)
            rows = self.pool.allocate_rows(len(parents)).astype(np.int64)
            cached = table.num_cached[parents] if lens is None else np.minimum(table.num_cached[parents], lens - 1)
            try:
                self.pool.fork(parents.astype(np.int32), rows.astype(np.int32), cached.astype(np.int32))
            except BaseException:
                self.pool.release(rows.astype(np.int32))
                raise
            if seeds is None:
                seeds = child_seeds(table.seed[parents], table.num_tokens[parents], self._ordinals(parents))
            table.copy(parents, rows)
            table.num_cached[rows] = cached
            table.seed[rows] = seeds
            table.num_children[rows] = 0
            table.handles[rows] = 1
            table.work[rows] = Work.NONE
            table.job[rows] = -1
            self._caller[rows] = running_loop()
            if lens is None:
                self.next_logits.fork(parents, rows)
            else:
                table.truncate(rows, lens)
            return rows

    def reorder(self, rows: IntArray, parents: IntArray) -> None:
        """Makes `rows` copies of `parents`, all at once (a beam step); seeds stay with the rows."""
        with self.lock_open():
            self.require_resting(rows)
            self.require_held(parents)
            self.pool.fork(parents.astype(np.int32), rows.astype(np.int32))
            cached = self.table.num_cached[parents]
            self.table.copy(parents, rows)
            self.table.num_cached[rows] = cached
            self.next_logits.drop(rows)

    def append(self, rows: IntArray, tokens: Sequence[IntArray]) -> None:
        """Adds given tokens to the ends of branches at rest; they are computed with the next work on them."""
        with self.lock_open():
            self.require_resting(rows)
            lengths = np.array([len(ids) for ids in tokens], np.int64)
            self.table.append(rows, lengths, np.concatenate([np.empty(0, np.int32), *tokens]))

    def uncache(self, rows: IntArray, lens: IntArray) -> None:
        """Keeps the first `lens` tokens of rows in the cache; those after them are computed again."""
        longer = self.table.num_cached[rows] > lens
        if longer.any():
            self.table.num_cached[rows[longer]] = lens[longer]
            self.pool.truncate(rows[longer].astype(np.int32), lens[longer].astype(np.int32))

    def retain(self, rows: IntArray) -> None:
        """Adds a handle on each of rows."""
        with self.lock_open():
            self.require_held(rows)
            self.table.handles[rows] += 1

    def release(self, rows: IntArray) -> None:
        """Takes a handle from each of rows; pages and rows of branches without handles come back."""
        with self.lock:
            if self.closed or len(rows) == 0:
                return
            table = self.table
            table.handles[rows] -= 1
            gone = rows[table.handles[rows] <= 0]
            self._on_released(gone, RuntimeError("a branch was released while it was being extended"))
            if len(gone):
                self.pool.release(gone.astype(np.int32))
                table.num_cached[gone] = 0
                self.next_logits.drop(gone)
                self._caller[gone] = None
                self._wake()

    def abandon(self, rows: IntArray) -> None:
        """`release` for destructors: takes no lock, and happens with the next call."""
        self._abandoned.append(rows)

    def collect(self) -> None:
        """Releases rows that destructors abandoned."""
        while self._abandoned:
            self.release(self._abandoned.popleft())

    # -- waiting for rows --

    def keep(self, rows: IntArray) -> None:
        """Hands `rows` to a frontier: they come back when its holder says so, not when a call ends."""
        with self.lock:
            self._caller[rows] = None
            self._wake()

    @property
    def rows_will_return(self) -> bool:
        """True if rows are free, or held by calls that release them without the caller's help."""
        with self.lock:
            callers = set(self._caller) - {None, *WAITING_LOOPS.get()}
            return self.num_free_rows > 0 or not all(loop.is_closed() for loop in callers)

    def rows_returned(self) -> asyncio.Future[None]:
        """A future that resolves when rows are released, or get another holder, from now on."""
        future = asyncio.get_running_loop().create_future()
        with self.lock:
            self._waiting.append(future)
        return future

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            settle(future)

    # -- all of it --

    def forget(self) -> None:
        """Drops all keys and values; branches that go on are computed anew, like preempted ones."""
        with self.lock:
            self.forget_prefixes()
            rows = np.flatnonzero(self.table.handles > 0)
            self.pool.clear(rows.astype(np.int32))
            self.table.num_cached[rows] = 0
            self.next_logits.clear()

    def forget_prefixes(self) -> None:
        """Empties the prefix index."""
        with self.lock:
            held = self.index.clear()
            if len(held):
                self.pool.drop(held)

    def close(self) -> None:
        """Gives all rows and pages back; calls that open branches raise from here on."""
        rows = np.flatnonzero(self.table.handles > 0)
        self.pool.release(rows.astype(np.int32))
        self.table.handles[:] = 0
        self.table.num_cached[:] = 0
        self.forget_prefixes()
        self.closed = True
        self._wake()

    def check_integrity(self) -> None:
        """Checks pool, prefix index and table against each other.

        Raises:
            AssertionError: names what does not fit.
        """
        with self.lock:
            self.collect()
            self.pool.check_integrity(held=self.index.pages())
            held = self.table.handles > 0
            seq_lens = self.pool.seq_lens.numpy(force=True)
            if not np.array_equal(seq_lens, np.where(held, self.table.num_cached, 0)):
                raise AssertionError("BranchStore: the pool's lengths are not those of the branch table")
            if int(held.sum()) != self.pool.max_branches - self.pool.num_free_rows:
                raise AssertionError("BranchStore: rows are allocated that no handle holds")
            if (self.table.job[~held] >= 0).any() or (self.table.work[self.table.job < 0] != Work.NONE).any():
                raise AssertionError("BranchStore: a row works without a job")

    @contextlib.contextmanager
    def locked(self, timeout: float) -> Iterator[bool]:
        """Holds the lock within the block; yields False if it was not free within `timeout` seconds."""
        is_locked = self.lock.acquire(timeout=timeout)
        try:
            yield is_locked
        finally:
            if is_locked:
                self.lock.release()

    def lock_open(self) -> threading.RLock:
        """The lock, after what was abandoned has been released.

        Raises:
            RuntimeError: the store is closed.
        """
        if self.closed:
            raise RuntimeError("the decoder is closed")
        self.collect()
        return self.lock

    def require_held(self, rows: IntArray) -> None:
        """Checks that no row is free.

        Raises:
            RuntimeError: one is.
        """
        if not (self.table.handles[rows] > 0).all():
            raise RuntimeError("a branch was released")

    def require_resting(self, rows: IntArray) -> None:
        """Checks that no row is free or has work: only the runner may change those.

        Raises:
            RuntimeError: one is, or has.
        """
        self.require_held(rows)
        if (self.table.job[rows] >= 0).any():
            raise RuntimeError("a branch is already being extended by another call")

    def _ordinals(self, parents: IntArray) -> IntArray:
        """Number of children each parent had before, counting these in order."""
        ordinals = np.empty(len(parents), np.int64)
        for i, row in enumerate(parents):
            ordinals[i] = self.table.num_children[row]
            self.table.num_children[row] += 1
        return ordinals

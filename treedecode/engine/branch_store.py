"""Forest: branches on pages. The host's table of tokens, the page pool and the prefix index, kept in step."""

import asyncio
import threading
from collections import deque
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from treedecode._host import PrefixIndex
from treedecode.cache.page_pool import PagePool
from treedecode.common.arrays import IntArray
from treedecode.engine.branch_table import BranchTable, Work, child_seeds


class Forest:
    """Branches by row id, `[n]` int64 arrays throughout. A branch lives while handles on it are held.

    Safe to call from several threads.
    """

    def __init__(self, pool: PagePool, *, max_tokens: int) -> None:
        self.pool = pool
        self.table = BranchTable(pool.max_branches, max_tokens)
        self.index = PrefixIndex(pool.page_size)
        self.lock = threading.RLock()
        self.closed = False
        # the event loop of the call that gives a row back when it ends; None: a frontier's, or free
        self._caller = np.full(pool.max_branches, None, object)
        self._orphans: deque[IntArray] = deque()
        # row -> (logits of a forward, row in them, tokens it had then): what follows its last token is known already
        self._next_logits: dict[int, tuple[Tensor, int, int]] = {}

    @property
    def num_free_rows(self) -> int:
        """Branches that can still be opened."""
        self.collect()
        return self.pool.num_free_rows

    def open(self, prompts: Sequence[IntArray], seeds: IntArray, account: int = -1) -> IntArray:
        """New branches on prompts (token ids), paid for by `account`; nothing is computed yet."""
        with self.open_lock():
            rows = self.pool.allocate_rows(len(prompts)).astype(np.int64)
            self.table.open(rows, list(prompts), seeds, account)
            self._caller[rows] = _running_loop()
            return rows

    def open_free(self, prompt: IntArray, seeds: IntArray) -> IntArray:
        """New branches on one prompt for the first of `seeds`, as many as there are rows for; maybe none."""
        with self.open_lock():
            count = min(len(seeds), self.pool.num_free_rows)
            return self.open([prompt] * count, seeds[:count]) if count else np.empty(0, np.int64)

    def fork(self, src: IntArray, lens: IntArray | None = None, seeds: IntArray | None = None) -> IntArray:
        """New branches that go on from `src` (ids may repeat); pages are shared, seeds are new unless given.

        Args:
            lens: tokens to keep of each source; None = all.
        """
        with self.open_lock():
            table = self.table
            self.require_held(src)
            dst = self.pool.allocate_rows(len(src)).astype(np.int64)
            if seeds is None:
                seeds = child_seeds(table.seed[src], table.num_tokens[src], self._ordinals(src))
            cached = table.num_cached[src] if lens is None else np.minimum(table.num_cached[src], lens - 1)
            self.pool.fork(src.astype(np.int32), dst.astype(np.int32), cached.astype(np.int32))
            table.copy(src, dst)
            table.num_cached[dst] = cached
            table.seed[dst] = seeds
            table.num_children[dst] = 0
            table.handles[dst] = 1
            table.work[dst] = Work.NONE
            table.job[dst] = -1
            self._caller[dst] = _running_loop()
            if lens is not None:
                table.truncate(dst, lens)
                return dst
            for parent, child in zip(src.tolist(), dst.tolist(), strict=True):
                if parent in self._next_logits:
                    self._next_logits[child] = self._next_logits[parent]
            return dst

    def reorder(self, rows: IntArray, parents: IntArray) -> None:
        """`rows` become copies of `parents`, all at once (a beam step); seeds stay with the rows."""
        with self.open_lock():
            self.require_resting(rows)
            self.require_held(parents)
            self.pool.fork(parents.astype(np.int32), rows.astype(np.int32))
            cached = self.table.num_cached[parents]
            self.table.copy(parents, rows)
            self.table.num_cached[rows] = cached
            self._forget_logits(rows)

    def append(self, rows: IntArray, tokens: Sequence[IntArray]) -> None:
        """Adds given tokens to the ends of branches at rest; they are computed with the next work on them."""
        with self.open_lock():
            self.require_resting(rows)
            lengths = np.array([len(ids) for ids in tokens], np.int64)
            self.table.append(rows, lengths, np.concatenate([np.empty(0, np.int32), *tokens]))

    def keep(self, rows: IntArray) -> None:
        """`rows` are a frontier's from here on: they come back when its holder says so, not when a call ends."""
        with self.lock:
            self._caller[rows] = None
            self._wake()

    def retain(self, rows: IntArray) -> None:
        """One more handle on each of rows."""
        with self.open_lock():
            self.require_held(rows)
            self.table.handles[rows] += 1

    def release(self, rows: IntArray) -> None:
        """One handle less; pages and rows of branches without handles come back."""
        with self.lock:
            if self.closed or len(rows) == 0:
                return
            table = self.table
            table.handles[rows] -= 1
            gone = rows[table.handles[rows] <= 0]
            self._end_work(gone, RuntimeError("a branch was released while it was being extended"))
            if len(gone):
                self.pool.release(gone.astype(np.int32))
                table.num_cached[gone] = 0
                self._forget_logits(gone)
                self._caller[gone] = None
                self._wake()

    def abandon(self, rows: IntArray) -> None:
        """`release` for destructors: takes no lock, is done with the next call."""
        self._orphans.append(rows)

    def collect(self) -> None:
        """Releases what destructors abandoned."""
        while self._orphans:
            self.release(self._orphans.popleft())

    def forget_prefixes(self) -> None:
        """Empties the prefix index."""
        with self.lock:
            held = self.index.clear()
            if len(held):
                self.pool.drop(held)

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
                raise AssertionError("Engine: the pool's lengths are not those of the branch table")
            if int(held.sum()) != self.pool.max_branches - self.pool.num_free_rows:
                raise AssertionError("Engine: rows are allocated that no handle holds")
            if (self.table.job[~held] >= 0).any() or (self.table.work[self.table.job < 0] != Work.NONE).any():
                raise AssertionError("Engine: a row works without a job")

    def _forget_logits(self, rows: IntArray) -> None:
        for row in rows.tolist() if self._next_logits else ():
            self._next_logits.pop(row, None)

    def open_lock(self) -> threading.RLock:
        """The lock, of a forest that is open."""
        if self.closed:
            raise RuntimeError("the decoder is closed")
        self.collect()
        return self.lock

    def require_held(self, rows: IntArray) -> None:
        """Raises if one of rows is free."""
        if not (self.table.handles[rows] > 0).all():
            raise RuntimeError("a branch was released")

    def require_resting(self, rows: IntArray) -> None:
        """Raises if one of rows is free or has work: only the tick may change those."""
        self.require_held(rows)
        if (self.table.job[rows] >= 0).any():
            raise RuntimeError("a branch is already being extended by another call")

    def _ordinals(self, src: IntArray) -> IntArray:
        """How many children each source had before, counting these in order."""
        ordinals = np.empty(len(src), np.int64)
        for i, row in enumerate(src):
            ordinals[i] = self.table.num_children[row]
            self.table.num_children[row] += 1
        return ordinals

    def _end_work(self, rows: IntArray, error: BaseException) -> None:
        """Hook: the work on rows cannot go on."""

    def _wake(self) -> None:
        """Hook: rows have come back or have another holder."""


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None

"""Scheduler: chooses the tokens of the next forward, and the branches to preempt when pages run out."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from treedecode._host import PrefixIndex
from treedecode.accounting.meter import AccountRows, Meter
from treedecode.cache.page_pool import PagePool
from treedecode.common.arrays import IntArray
from treedecode.engine.branch_table import BranchTable, Work


@dataclass(frozen=True)
class SampleBatch:
    """Rows that get a token sampled, with the arguments of `ops.sample` for them, each `[s]` on the model's device."""

    rows: IntArray  # [s] int64
    penalised: bool  # whether a row has a repetition penalty
    stop_ids: list[int]  # stop sets in use among the rows
    temperature: Tensor  # fp32
    top_k: Tensor  # int32
    top_p: Tensor  # fp32
    min_p: Tensor  # fp32
    seed: Tensor  # int64


@dataclass
class Batch:
    """Rows of one forward in depth-first order, so that rows that share pages are adjacent.

    It serves many ticks: while all rows decode one token each, only `num_cached` moves.
    """

    rows: IntArray  # [B] int64
    q_lens: IntArray  # [B] int32
    decode_only: bool
    row_ids: Tensor  # [B] int64
    q_lens_tensor: Tensor | None  # [B] int32, None = 1 each
    wanted: IntArray  # [n] indices of rows whose last token's logits are wanted
    sampled: IntArray  # [s] indices into wanted of rows that sample
    sample: SampleBatch  # the rows that sample
    shares: list[AccountRows]  # of the accounts that pay for rows


class Scheduler:
    """Chooses batches: all rows that decode, and first come, first served, rows with more tokens to compute.

    The latter share a budget of tokens per forward. A row whose prompt begins like one that is being prefilled waits
    for it, and then starts on its pages.
    """

    def __init__(
        self, table: BranchTable, pool: PagePool, index: PrefixIndex, meter: Meter, *, prefill_tokens: int
    ) -> None:
        self.table = table
        self.meter = meter
        self.pool = pool
        self.index = index
        self.prefill_tokens = prefill_tokens
        self.num_preemptions = 0
        self.num_prefix_tokens = 0

    def free_held_pages(self, count: int) -> int:
        """Makes the prefix index drop up to `count` pages that no branch uses; returns how many it dropped."""
        evicted = self.index.evict(count, self.pool.refcount.numpy(force=True)) if count > 0 else ()
        if len(evicted):
            self.pool.drop(evicted)
        return len(evicted)

    def remember(self, rows: IntArray) -> None:
        """Puts the full pages of `rows` into the prefix index."""
        for row in rows:
            full = int(self.table.num_cached[row]) // self.pool.page_size
            if full:
                tokens = self.table.tokens[row, : full * self.pool.page_size]
                fresh = self.index.insert(np.ascontiguousarray(tokens), self.pool.pages(int(row))[:full])
                if len(fresh):
                    self.pool.retain(fresh)

    def next_batch(self) -> tuple[Batch | None, IntArray]:
        """Chooses the next batch.

        Returns:
            the batch (None: no row needs a forward), and rows whose prefill turned out to be done.
        """
        table = self.table
        busy = np.flatnonzero(table.work)
        busy = busy[np.argsort(table.order[busy])]
        todo = table.goal(busy) - table.num_cached[busy]
        done = busy[todo <= 0]
        one = (todo == 1) & (table.work[busy] != Work.PREFILL)
        rows, lens = self._admit(busy[(todo > 0) & ~one], busy[one])
        if len(rows) == 0 and len(done) == 0 and len(busy):
            return self.next_batch()  # the index had all of what the first in line needs
        return (self.batch(rows, lens) if len(rows) else None), done

    def _admit(self, waiting: IntArray, decoding: IntArray) -> tuple[IntArray, IntArray]:
        table, page = self.table, self.pool.page_size
        rows, lens = list(decoding), [1] * len(decoding)
        budget = self.prefill_tokens
        promised = len(decoding)  # pages that rows already admitted may still take
        ahead: list[tuple[int, int]] = []
        for row, goal in zip(waiting, table.goal(waiting).tolist(), strict=True):
            if budget <= 0:
                break
            empty = table.num_cached[row] == 0
            if empty and not self._adopt(int(row), ahead):
                continue
            cached = int(table.num_cached[row])
            todo = goal - cached
            if todo <= 0:
                self.num_prefix_tokens += cached
                continue  # the index had all of it; the next call reports it
            need = -(-int(table.num_tokens[row] + 1) // page) - cached // page
            lacking = need + promised - self.pool.num_free_pages
            if lacking > 0:
                lacking -= self.free_held_pages(lacking)
            if lacking > 0 and rows:
                if empty:
                    self._clear(int(row))
                break  # only the first in line may go on regardless: others make room for it, page by page
            self.num_prefix_tokens += cached if empty else 0
            promised += need
            take = min(todo, budget)
            budget -= take
            rows.append(row)
            lens.append(take)
            ahead.append((int(row), goal))
        return np.array(rows, np.int64), np.array(lens, np.int32)

    def _adopt(self, row: int, ahead: list[tuple[int, int]]) -> bool:
        """Starts an empty row on pages of the prefix index.

        Returns False if the row should wait for a row ahead of it with the same beginning.

        Args:
            ahead: (row, tokens it will have in the cache) of those that go before it.
        """
        table, page = self.table, self.pool.page_size
        prefix = np.ascontiguousarray(table.tokens[row, : table.num_tokens[row] - 1])
        pages, num_matched = self.index.match(prefix)
        for other, goal in ahead:
            length = min(len(prefix), goal)
            differ = np.flatnonzero(prefix[:length] != table.tokens[other, :length])
            common = int(differ[0]) if len(differ) else length
            if common // page * page > num_matched:
                return False
        if num_matched:
            self.pool.adopt(row, pages, num_matched)
            table.num_cached[row] = num_matched
        return True

    def _clear(self, row: int) -> None:
        self.pool.clear([row])
        self.table.num_cached[row] = 0

    def make_room(self, keep: IntArray, lacking: int) -> None:
        """Frees pages for the next batch, or makes it need fewer, at the cost of the least valuable cached tokens.

        Args:
            keep: rows that must not be preempted.
            lacking: pages that are missing.

        Raises:
            RuntimeError: nothing is left to free.
        """
        if self.free_held_pages(max(lacking, 1)):
            return
        table = self.table
        holders = np.setdiff1d(np.flatnonzero((table.num_cached > 0) & (table.handles > 0)), keep)
        before = self.pool.num_free_pages
        pages, used = self._pages(holders)
        own = np.count_nonzero((self.pool.refcount.numpy(force=True)[pages] == 1) & used, axis=1)
        resting = table.work[holders] == Work.NONE
        # Branches at rest may never be needed again; a page shared by several comes free only with the last of them.
        queue = np.lexsort((-table.order[holders], own == 0, ~resting))
        for row in holders[queue]:
            self._clear(int(row))
            self.num_preemptions += 1
            # even where it frees no page, the next batch needs fewer without a row that works
            if self.pool.num_free_pages > before or table.work[row] != Work.NONE:
                return
        if not self.free_held_pages(max(lacking, 1)) and len(holders) == 0:
            raise RuntimeError("out of pages: nothing is left to preempt; give the decoder more kv_memory")

    def batch(self, rows: IntArray, lens: IntArray) -> Batch:
        """Makes the batch that computes the next `lens` tokens of `rows`."""
        table = self.table
        pages, used = self._pages(rows)
        order = _depth_first(rows, pages, used)
        rows, lens = rows[order], lens[order]
        wants = table.work[rows] != Work.PREFILL
        wanted = np.flatnonzero(wants & (table.num_cached[rows] + lens == table.goal(rows)))
        out = rows[wanted]
        sampled = np.flatnonzero(table.work[out] == Work.SAMPLE)
        decode_only = bool((lens == 1).all()) and len(wanted) == len(rows)
        device = self.pool.device
        return Batch(
            rows=rows,
            q_lens=lens,
            decode_only=decode_only,
            row_ids=torch.from_numpy(rows).to(device),
            q_lens_tensor=None if decode_only else torch.from_numpy(lens).to(device),
            wanted=wanted,
            sampled=sampled,
            sample=self.sample_batch(out[sampled]),
            shares=self.meter.group_rows(table.account[rows], pages[order], used[order], table.num_cached[rows]),
        )

    def sample_batch(self, rows: IntArray) -> SampleBatch:
        """Gathers the sampling settings of `rows`."""
        table = self.table
        arrays = (table.temperature, table.top_k, table.top_p, table.min_p, table.seed)
        return SampleBatch(
            rows,
            bool((table.penalty[rows] != 1).any()),
            [int(stop) for stop in np.unique(table.stop[rows]) if stop],
            *(torch.from_numpy(array[rows]).to(self.pool.device) for array in arrays),
        )

    def _pages(self, rows: IntArray) -> tuple[IntArray, np.ndarray]:
        """Returns page ids `[n, most pages of a row]`, 0 beyond a row's own, and a mask of its own."""
        num_pages = -(-self.table.num_cached[rows] // self.pool.page_size)
        width = int(num_pages.max(initial=0))
        used = np.arange(width) < num_pages[:, None]
        table = self.pool.page_table[torch.from_numpy(rows).to(self.pool.device), :width]
        return np.where(used, table.numpy(force=True), 0), used


def _depth_first(rows: IntArray, pages: IntArray, used: np.ndarray) -> list[int]:
    """Returns an order of rows in which equal leading pages are adjacent: that of their page ids."""
    keys = [line.tobytes() for line in np.where(used, pages, -1)]
    return sorted(range(len(rows)), key=lambda i: (keys[i], rows[i]))

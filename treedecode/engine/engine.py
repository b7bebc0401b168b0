"""Engine: batches concurrent requests for work on branches into shared forward passes."""

import asyncio
import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treedecode.accounting.meter import BudgetExhausted, Meter
from treedecode.cache.page_pool import PagePool
from treedecode.common.arrays import IntArray
from treedecode.engine.branch_store import BranchStore
from treedecode.engine.branch_table import BranchTable, Finish, Work
from treedecode.engine.graph_runner import GraphRunner
from treedecode.engine.jobs import Callback, Job, JobRegistry
from treedecode.engine.next_logits import LogitsRow
from treedecode.engine.runner import Runner
from treedecode.engine.sampling import Sampling
from treedecode.engine.scheduler import Scheduler
from treedecode.engine.stops import StopMatcher, StopSet
from treedecode.models.adapter import ModelAdapter, require_hidden_states


class Engine:
    """Serves calls of coroutines, which may come from several event loops.

    Attributes:
        store: the branches: open, fork and release them here.
        scheduler: chooses the rows of each forward.
        runner: runs forwards.
        jobs: the calls under way.
        meter: the accounts that forwards are charged to.
    """

    def __init__(
        self,
        model: ModelAdapter,
        pool: PagePool,
        matcher: StopMatcher,
        *,
        max_tokens: int,
        prefill_tokens: int,
        graphs: GraphRunner | None = None,
        scheduler_type: type[Scheduler] = Scheduler,
    ) -> None:
        self.model = model
        self.matcher = matcher
        self.meter = Meter(model, pool.page_size)
        engine = weakref.proxy(self)  # in the callbacks: a cycle would keep the memory of the pool and the model
        self.store = BranchStore(
            pool, max_tokens=max_tokens, on_released=lambda rows, error: engine.jobs.fail(rows, error)
        )
        table = self.store.table
        self.scheduler = scheduler_type(table, pool, self.store.index, self.meter, prefill_tokens=prefill_tokens)
        self.jobs = JobRegistry(table, matcher, on_resting=lambda rows: engine.runner.rest(rows))
        self.runner = Runner(model, self.store, self.scheduler, self.jobs, self.meter, matcher, graphs=graphs)
        self.num_beam_searches = 0  # under way; they have jobs only now and then
        self._drivers: dict[asyncio.AbstractEventLoop, asyncio.Task] = {}

    @property
    def pool(self) -> PagePool:
        """The pages."""
        return self.store.pool

    @property
    def table(self) -> BranchTable:
        """Tokens and settings of all branches."""
        return self.store.table

    @property
    def only_a_beam_search_runs(self) -> bool:
        """True if one beam search is the only call that wants forwards."""
        return self.num_beam_searches == 1 and len(self.jobs) == 0

    async def prefill(self, rows: IntArray) -> None:
        """Computes all but the last token of each row, so that forks share them."""
        if len(rows):
            with self._lock_resting(rows):
                job_id, job = self._start(Work.PREFILL, rows, rows)
            await self._wait(job_id, job)

    async def sample(
        self,
        rows: IntArray,
        sampling: Sampling,
        stops: StopSet,
        max_new_tokens: int | IntArray,
        callback: Callback | None = None,
        first: Tensor | None = None,
        seeds: IntArray | None = None,
        fill: bool = False,
    ) -> None:
        """Extends rows until a stop; a row at its end of sequence, or full, stays as it is.

        Args:
            max_new_tokens: of all rows, or `[n]`.
            callback: called as `callback(i, token_id, text)` for `rows[i]` with every new token.
            first: `[vocab_size]` logits of the first new token of all rows, which hold the same tokens.
            seeds: `[n]`, in place of those the rows have.
            fill: one token more than model and pages hold may come, since nothing is computed after it.
        """
        with self._lock_resting(rows):
            live = self._configure(rows, sampling, stops, max_new_tokens, seeds, self.table.max_tokens + fill)
            if len(live) == 0:
                return
            if first is None:
                ready = self._computed_logits(live)
            else:
                ready = dict.fromkeys(live.tolist(), LogitsRow(first[None], 0))
            self._uncache_last(np.setdiff1d(live, list(ready)), Work.SAMPLE)
            job_id, job = self._start(Work.SAMPLE, rows, live, callback)
            self.runner.add_ready(job_id, ready)
        await self._wait(job_id, job)

    async def logits(self, rows: IntArray, tokens: IntArray | None = None) -> Tensor:
        """Appends `tokens` (`[n]`, None: nothing) and computes rows up to their last token, in the shared forward.

        Returns:
            `[n, vocab_size]` logits of the tokens that come next, in the model's dtype. The rows are then wholly in the
            cache: `reorder` them, and come again with the next tokens.
        """
        if tokens is not None:
            self.store.append(rows, [np.array([token]) for token in np.asarray(tokens)])
        return await self._last_of(Work.LOGITS, rows, self.model.vocab_size)

    async def hidden(self, rows: IntArray) -> Tensor:
        """Computes the final hidden states `[n, hidden_size]` at the last tokens of rows, in the shared forward.

        Of a row at its end of sequence it is that of the token before, where its text ends.

        Raises:
            ValueError: the model's adapter gives none.
        """
        require_hidden_states(self.model)
        return await self._last_of(Work.HIDDEN, rows, self.model.hidden_size)

    async def _last_of(self, work: Work, rows: IntArray, width: int) -> Tensor:
        with self._lock_resting(rows):
            if len(rows) == 0:
                return torch.empty(0, width, device=self.pool.device)
            if (self.table.num_tokens[rows] > self.table.max_tokens).any():
                raise ValueError(f"a branch has a token after the {self.table.max_tokens} that can be computed")
            self._uncache_last(rows, work)
            job_id, job = self._start(work, rows, rows)
        return await self._wait(job_id, job)

    def text(self, row: int, *, cut: bool, begin: int | None = None) -> str:
        """Decodes a branch's tokens from `begin` (None: the end of the prompt); `cut`: without its stop string."""
        table = self.table
        begin = int(table.prompt_len[row]) if begin is None else begin
        tokens = table.tokens[row, : table.num_tokens[row]]
        return self.matcher.text(int(table.stop[row]), tokens, begin, cut=cut and table.finish[row] == Finish.STOP)

    def check_integrity(self) -> None:
        """Takes the results in flight, and checks pool, prefix index and table against each other.

        Raises:
            AssertionError: names what does not fit.
        """
        with self.store.lock:
            self.runner.catch_up()
            self.store.check_integrity()

    def close(self) -> None:
        """Ends all jobs with an error and gives everything back."""
        with self.store.lock:
            if not self.store.closed:
                self.store.collect()
                self.jobs.end_all(RuntimeError("the decoder was closed"))
                self.store.close()

    # -- calls and their jobs --

    @contextlib.contextmanager
    def _lock_resting(self, rows: IntArray) -> Iterator[None]:
        """Holds the lock, after checking that the branches `rows` may get work."""
        with self.store.lock_open():
            if len(self.jobs) == 0:  # else every forward looks
                self.model.refresh()
            self.runner.follow_model()
            self.store.require_resting(rows)
            if len(set(rows.tolist())) < len(rows):
                raise RuntimeError("a branch appears twice in one call")
            if any(self.meter.is_over(account) for account in {*self.table.account[rows].tolist()}):
                raise BudgetExhausted("the budget is spent")
            yield

    def _configure(
        self,
        rows: IntArray,
        sampling: Sampling,
        stops: StopSet,
        max_new_tokens: int | IntArray,
        seeds: IntArray | None,
        max_tokens: int,
    ) -> IntArray:
        """Writes how rows sample from here on, and returns those that are neither finished nor full."""
        table = self.table
        table.configure(rows, sampling)
        if seeds is not None:
            table.seed[rows] = seeds
        table.stop[rows] = self.matcher.register(stops)
        table.limit[rows] = np.minimum(table.num_tokens[rows] + max_new_tokens, max_tokens)
        table.reserve(int(table.limit[rows].max(initial=0)))
        table.step_begin[rows] = table.num_tokens[rows]
        live = rows[table.finish[rows] != Finish.EOS]
        is_full = table.num_tokens[live] >= table.limit[live]
        table.finish[live] = np.where(is_full, Finish.LENGTH, Finish.NONE)
        return live[~is_full]

    def _computed_logits(self, rows: IntArray) -> dict[int, LogitsRow]:
        """Takes the logits that earlier forwards computed for the next tokens of rows, by row."""
        table, logits = self.table, {}
        for row in rows.tolist():
            num_tokens = int(table.num_tokens[row])
            row_logits = self.store.next_logits.pop(row, num_tokens)
            if row_logits is not None and table.num_cached[row] == num_tokens:
                logits[row] = row_logits
        return logits

    def _uncache_last(self, rows: IntArray, work: Work) -> None:
        """Rows that are wholly in the cache give up the token whose logits or hidden state `work` wants."""
        last = self.table.num_tokens[rows] - 1
        if work == Work.HIDDEN:
            last -= self.table.finish[rows] == Finish.EOS
        self.store.uncache(rows, last)

    def _start(self, work: Work, rows: IntArray, live: IntArray, callback: Callback | None = None) -> tuple[int, Job]:
        """Starts a job on `rows`, of which `live` have work, and sees to it that this event loop runs forwards."""
        loop = asyncio.get_running_loop()
        job = Job(rows, loop.create_future(), len(live), callback)
        job_id = self.jobs.start(job, live, work)
        self.runner.rows_changed()
        if loop not in self._drivers:
            self._drivers[loop] = loop.create_task(self._drive())
        return job_id, job

    async def _wait(self, job_id: int, job: Job) -> Any:
        try:
            return await job.future
        except BaseException:
            with self.store.lock:
                self.jobs.end(job_id)
            raise

    async def _drive(self) -> None:
        """Ticks while this event loop has jobs; one task per event loop."""
        loop = asyncio.get_running_loop()
        try:
            while self.jobs.has_any_of(loop):
                num_ended = self.jobs.num_ended
                self.runner.tick()
                # Whoever waited for a job that just ended may want to join the next tick. Let that code run, and the
                # code that waits for it.
                for _ in range(1 if self.jobs.num_ended == num_ended else 4):
                    await asyncio.sleep(0)
        finally:
            del self._drivers[loop]

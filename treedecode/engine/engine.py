"""Engine: whatever coroutine asks for work on branches, it joins the ticks of all."""

import asyncio
import threading
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treedecode.accounting.meter import BudgetExhausted
from treedecode.cache.page_pool import PagePool
from treedecode.common.arrays import IntArray
from treedecode.engine.branch_table import Finish, Work
from treedecode.engine.graph_steps import CapturedSteps
from treedecode.engine.jobs import Callback, Job, Stats, settle
from treedecode.engine.runner import Ticker
from treedecode.engine.sampling import Sampling
from treedecode.engine.stops import StopMatcher, StopSet
from treedecode.models.adapter import require_hidden_states

# Event loops that stand still until this code returns, because code in them waits for it.
OUTER_LOOPS: ContextVar[tuple[asyncio.AbstractEventLoop, ...]] = ContextVar("OUTER_LOOPS", default=())


class Engine(Ticker):
    """A ticker and the calls it works for. Coroutines may come from several event loops."""

    def __init__(
        self,
        model: Any,
        pool: PagePool,
        matcher: StopMatcher,
        *,
        max_tokens: int,
        prefill_tokens: int,
        captured: CapturedSteps | None = None,
    ) -> None:
        super().__init__(model, pool, matcher, max_tokens=max_tokens, prefill_tokens=prefill_tokens, captured=captured)
        self._num_jobs = 0
        self.num_searches = 0  # beam searches, which have jobs only now and then
        self._drivers: dict[asyncio.AbstractEventLoop, asyncio.Task] = {}
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def stats(self) -> Stats:
        """Counts so far."""
        self._stats.num_preemptions = self.scheduler.num_preemptions
        self._stats.num_prefix_tokens = self.scheduler.num_prefix_tokens
        return self._stats

    @property
    def in_callback(self) -> bool:
        """Whether this thread is in a callback, and so within a step: to wait for another step would be for ever."""
        return self._thread_in_callback == threading.get_ident()

    @property
    def rows_will_come_back(self) -> bool:
        """Whether rows are free, or held by calls that give them back without the doing of who asks."""
        with self.lock:
            callers = set(self._caller) - {None, *OUTER_LOOPS.get()}
            return self.num_free_rows > 0 or not all(loop.is_closed() for loop in callers)

    def rows_come_back(self) -> asyncio.Future[None]:
        """Resolves when rows have come back since, or have another holder."""
        future = asyncio.get_running_loop().create_future()
        with self.lock:
            self._waiting.append(future)
        return future

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            settle(future)

    @property
    def is_alone(self) -> bool:
        """Whether a beam search that asks is the only call that wants forwards."""
        return self.num_searches == 1 and not self._jobs

    async def prefill(self, rows: IntArray) -> None:
        """Computes all but the last token of each row, so that forks share it."""
        await self._run(Work.PREFILL, rows)

    async def sample(
        self,
        rows: IntArray,
        sampling: Sampling,
        stops: StopSet,
        max_new_tokens: int | IntArray,
        callback: Callback | None = None,
        first: Tensor | None = None,
        seeds: IntArray | None = None,
    ) -> None:
        """Extends rows until a stop; a row that is at its end of sequence or full stays as it is.

        Args:
            max_new_tokens: of all rows, or `[n]`.
            first: `[vocab_size]` logits of the first new token of all rows, which all end alike and had them computed.
            callback: called as `callback(i, token_id, text)` for `rows[i]` with every new token.
            seeds: `[n]`, in place of those the rows have.
        """
        await self._run(Work.SAMPLE, rows, sampling, stops, max_new_tokens, callback, first, seeds)

    async def logits(self, rows: IntArray, tokens: IntArray | None = None) -> Tensor:
        """Appends `tokens` (`[n]`, None: nothing) and computes rows up to their last token, in the shared forward.

        Returns:
            `[n, vocab_size]` logits of the tokens that come next, in the model's dtype. The rows are then wholly in the
            cache: `reorder` them, and come again with the next tokens.
        """
        if tokens is not None:
            self.append(rows, [np.array([token]) for token in np.asarray(tokens)])
        return await self._run(Work.LOGITS, rows)

    async def hidden(self, rows: IntArray) -> Tensor:
        """The final hidden states `[n, hidden_size]` of the last tokens of rows, computed in the shared forward.

        Of a row at its end of sequence it is that of the token before, where its text ends.

        Raises:
            ValueError: the model's adapter gives none.
        """
        require_hidden_states(self.model)
        return await self._run(Work.HIDDEN, rows)

    async def _run(
        self,
        work: Work,
        rows: IntArray,
        sampling: Sampling | None = None,
        stops: StopSet | None = None,
        max_new_tokens: int | IntArray = 0,
        callback: Callback | None = None,
        first: Tensor | None = None,
        seeds: IntArray | None = None,
    ) -> Any:
        loop = asyncio.get_running_loop()
        table = self.table
        with self.open_lock():
            if hasattr(self.model, "refresh") and not self._jobs:  # else every forward looks
                self.model.refresh()
            self._follow_model()
            self.require_resting(rows)
            if len(set(rows.tolist())) < len(rows):
                raise RuntimeError("a branch appears twice in one call")
            self._require_funds(rows)
            live = rows
            if work == Work.SAMPLE:
                assert sampling is not None
                assert stops is not None
                table.configure(rows, sampling)
                if seeds is not None:
                    table.seed[rows] = seeds
                table.stop[rows] = self.matcher.register(stops)
                table.limit[rows] = np.minimum(table.num_tokens[rows] + max_new_tokens, table.max_tokens)
                table.reserve(int(table.limit[rows].max(initial=0)))
                table.step_begin[rows] = table.num_tokens[rows]
                live = rows[table.finish[rows] != Finish.EOS]
                full = live[table.num_tokens[live] >= table.limit[live]]
                table.finish[live] = Finish.NONE
                table.finish[full] = Finish.LENGTH
                live = live[table.num_tokens[live] < table.limit[live]]
            known: dict[int, tuple[Tensor, int]] = {}
            if work == Work.SAMPLE:
                known = self._known_logits(live) if first is None else dict.fromkeys(live.tolist(), (first[None], 0))
            if work != Work.PREFILL:
                self._uncache_last(live[~np.isin(live, list(known))] if known else live, work)
            if len(live) == 0:
                return torch.empty(0, _width(self.model, work)) if work in (Work.LOGITS, Work.HIDDEN) else None
            job_id, self._num_jobs = self._num_jobs, self._num_jobs + 1
            job = Job(rows, loop.create_future(), len(live), callback)
            self._jobs[job_id] = job
            table.work[live] = work
            table.job[live] = job_id
            table.order[live] = (job_id << 24) + np.arange(len(live))
            self._batch = None
            self._first |= {row: (job_id, *found) for row, found in known.items()}
            if loop not in self._drivers:
                self._drivers[loop] = loop.create_task(self._drive())
        try:
            return await job.future
        except BaseException:
            with self.lock:
                self._end_job(job_id)
            raise

    async def _drive(self) -> None:
        """Ticks while this event loop has jobs; one task per event loop."""
        loop = asyncio.get_running_loop()
        try:
            while any(job.future.get_loop() is loop for job in list(self._jobs.values())):
                ended = self._num_jobs - len(self._jobs)
                self.tick()
                # who waited for a job that just ended may want to join the next tick: let it run, and who waits for it
                for _ in range(1 if ended == self._num_jobs - len(self._jobs) else 4):
                    await asyncio.sleep(0)
        finally:
            del self._drivers[loop]

    def _known_logits(self, rows: IntArray) -> dict[int, tuple[Tensor, int]]:
        """Rows whose next token's logits an earlier forward computed: those logits, and the row's place in them."""
        table, found = self.table, {}
        for row in rows.tolist() if self._next_logits else ():
            logits, at, num_tokens = self._next_logits.pop(row, (None, 0, -1))
            if logits is not None and table.num_cached[row] == table.num_tokens[row] == num_tokens:
                found[row] = logits, at
        return found

    def _require_funds(self, rows: IntArray) -> None:
        """Raises if an account of rows is over its limits."""
        if any(self.meter.is_over(account) for account in {*self.table.account[rows].tolist()}):
            raise BudgetExhausted("the budget is spent")

    def text(self, row: int, *, cut: bool, begin: int | None = None) -> str:
        """Text of a branch's tokens from `begin` (None: the end of the prompt); `cut`: without its stop string."""
        table = self.table
        new = table.tokens[row, int(table.prompt_len[row]) if begin is None else begin : table.num_tokens[row]]
        return self.matcher.text(int(table.stop[row]), new, cut=cut and table.finish[row] == Finish.STOP)

    def close(self) -> None:
        """Ends all jobs with an error and gives everything back."""
        with self.lock:
            if self.closed:
                return
            self.collect()
            for job_id in list(self._jobs):
                self._end_job(job_id, RuntimeError("the decoder was closed"))
            rows = np.flatnonzero(self.table.handles > 0)
            self.pool.release(rows.astype(np.int32))
            self.table.handles[:] = 0
            self.table.num_cached[:] = 0
            self.forget_prefixes()
            self.closed = True
            self._wake()

    def _uncache_last(self, rows: IntArray, work: Work) -> None:
        """Rows with all in the cache that `work` wants give up the last token of it: what it leads to is wanted."""
        last = self.table.num_tokens[rows] - 1
        if work == Work.HIDDEN:
            last -= self.table.finish[rows] == Finish.EOS
        full = self.table.num_cached[rows] > last
        if full.any():
            self.table.num_cached[rows[full]] = last[full]
            self.pool.truncate(rows[full].astype(np.int32), last[full].astype(np.int32))


def _width(model: Any, work: Work) -> int:
    return model.vocab_size if work == Work.LOGITS else model.hidden_size

"""Engine: one ragged forward per tick for everything that decodes, whichever coroutine asked for it."""

import asyncio
import threading
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treedecode import step
from treedecode.branches import Finish, Ints, Work
from treedecode.forest import Forest
from treedecode.jobs import Callback, Job, Stats, settle
from treedecode.pages import OutOfPages, PagePool
from treedecode.sampling import Sampling
from treedecode.schedule import Batch, Scheduler
from treedecode.stops import StopMatcher, StopSet, TextStream

# Event loops that stand still until this code returns, because code in them waits for it.
OUTER_LOOPS: ContextVar[tuple[asyncio.AbstractEventLoop, ...]] = ContextVar("OUTER_LOOPS", default=())


class Engine(Forest):
    """A forest and the tick that moves all of its branches.

    Coroutines may come from several event loops.
    """

    def __init__(
        self, model: Any, pool: PagePool, matcher: StopMatcher, *, max_tokens: int, prefill_tokens: int
    ) -> None:
        super().__init__(pool, max_tokens=max_tokens)
        self.model = model
        self.matcher = matcher
        self.scheduler = Scheduler(self.table, pool, self.index, prefill_tokens=prefill_tokens)
        self._stats = Stats()
        self._jobs: dict[int, Job] = {}
        self._num_jobs = 0
        self._drivers: dict[asyncio.AbstractEventLoop, asyncio.Task] = {}
        self._batch: Batch | None = None
        self._num_changes = getattr(model, "num_changes", 0)
        self._thread_in_callback: int | None = None
        self._waiting: list[asyncio.Future[None]] = []
        # configurations name tokens that the model does not have, -1 among them: those never come
        eos = sorted(token for token in model.eos_token_ids if 0 <= token < model.vocab_size)
        self._eos = np.zeros(model.vocab_size, bool)
        self._eos[eos] = True
        self._eos_ids = torch.tensor(eos, dtype=torch.int64, device=pool.device)

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

    async def prefill(self, rows: Ints) -> None:
        """Computes all but the last token of each row, so that forks share it."""
        await self._run(Work.PREFILL, rows)

    async def sample(
        self,
        rows: Ints,
        sampling: Sampling,
        stops: StopSet,
        max_new_tokens: int,
        callback: Callback | None = None,
        first: Tensor | None = None,
        seeds: Ints | None = None,
    ) -> None:
        """Extends rows until a stop; a row that is at its end of sequence or full stays as it is.

        Args:
            first: `[vocab_size]` logits of the first new token of all rows, which all end alike and had them computed.
            callback: called as `callback(i, token_id, text)` for `rows[i]` with every new token.
            seeds: `[n]`, in place of those the rows have.
        """
        await self._run(Work.SAMPLE, rows, sampling, stops, max_new_tokens, callback, first, seeds)

    async def logits(self, rows: Ints, tokens: Ints | None = None) -> Tensor:
        """Appends `tokens` (`[n]`, None: nothing) and computes rows up to their last token, in the shared forward.

        Returns:
            `[n, vocab_size]` logits of the tokens that come next, in the model's dtype. The rows are then wholly in the
            cache: `reorder` them, and come again with the next tokens.
        """
        if tokens is not None:
            self.append(rows, [np.array([token]) for token in np.asarray(tokens)])
        return await self._run(Work.LOGITS, rows)

    async def _run(
        self,
        work: Work,
        rows: Ints,
        sampling: Sampling | None = None,
        stops: StopSet | None = None,
        max_new_tokens: int = 0,
        callback: Callback | None = None,
        first: Tensor | None = None,
        seeds: Ints | None = None,
    ) -> Any:
        loop = asyncio.get_running_loop()
        table = self.table
        with self.open_lock():
            if hasattr(self.model, "refresh"):
                self.model.refresh()
            self._follow_model()
            self.require_resting(rows)
            if len(np.unique(rows)) < len(rows):
                raise RuntimeError("a branch appears twice in one call")
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
            if work != Work.PREFILL and first is None:
                self._uncache_last(live)
            if len(live) == 0:
                return torch.empty(0, self.model.vocab_size) if work == Work.LOGITS else None
            job_id, self._num_jobs = self._num_jobs, self._num_jobs + 1
            job = Job(rows, loop.create_future(), len(live), callback)
            self._jobs[job_id] = job
            table.work[live] = work
            table.job[live] = job_id
            table.order[live] = (job_id << 24) + np.arange(len(live))
            self._batch = None
            if first is not None:
                self._take_first(live, first)
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

    def tick(self) -> None:
        """One forward over everything that is due. An error in it fails the jobs of its rows; their branches stay."""
        with self.lock:
            self.collect()
            self._follow_model()
            rows: Ints = np.flatnonzero(self.table.work)
            try:
                with torch.inference_mode():
                    batch, slots = self._prepare()
                    if batch is not None:
                        rows = batch.rows
                        self._step(batch, slots)
            except BaseException as error:
                self._batch = None
                # a row whose logits are NaN ends its own call; the others' step is taken again without it
                self._end_work(error.rows if isinstance(error, step.BadLogits) else rows, error)
                if not isinstance(error, Exception):
                    raise

    def forget(self) -> None:
        """Drops all keys and values; branches that go on are computed anew, like preempted ones."""
        with self.lock:
            self.forget_prefixes()
            rows = np.flatnonzero(self.table.handles > 0)
            self.pool.clear(rows.astype(np.int32))
            self.table.num_cached[rows] = 0
            self._batch = None

    def _follow_model(self) -> None:
        """Keys and values that a model computed before it changed are of no use."""
        num_changes = getattr(self.model, "num_changes", 0)
        if num_changes != self._num_changes:
            self._num_changes = num_changes
            self.forget()

    def _take_first(self, rows: Ints, logits: Tensor) -> None:
        """Samples a token for each of rows from the same logits, without a forward."""
        try:
            with torch.inference_mode():
                batch = self.scheduler.batch(rows, np.zeros(len(rows), np.int32), complete=True)
                every = logits.expand(len(rows), -1).contiguous()
                self._record(batch, batch.rows, *step.choose(self.table, self.matcher, self._eos_ids, batch, every))
                self._stats.num_sampled_tokens += len(rows)
        except Exception as error:
            self._end_work(rows, error)

    def _prepare(self) -> tuple[Batch | None, Tensor]:
        """The batch of this tick and the cache slots of its tokens."""
        while True:
            batch = self._batch
            if batch is None:
                batch, done = self.scheduler.next_batch()
                self._finish(done)
                if batch is None:
                    return None, torch.empty(0)
            try:
                slots = self.pool.append(batch.rows.astype(np.int32), None if batch.decode_only else batch.q_lens)
            except OutOfPages as error:
                self._batch = None
                first = batch.rows[np.argmin(self.table.order[batch.rows])]
                self.scheduler.make_room(np.array([first]), error.num_needed - error.num_free)
                continue
            self._batch = batch if batch.decode_only else None
            return batch, slots

    def _step(self, batch: Batch, slots: Tensor) -> None:
        table = self.table
        cached = table.num_cached[batch.rows]
        try:
            logits = step.forward(self.model, self.pool, table, batch, slots)
            tokens, logprobs = step.choose(table, self.matcher, self._eos_ids, batch, logits)
        except BaseException:
            self.pool.truncate(batch.rows.astype(np.int32), cached.astype(np.int32))
            raise
        table.num_cached[batch.rows] = cached + batch.q_lens
        self._count(batch)
        self.scheduler.remember(batch.rows[(batch.q_lens > 1) | (cached < table.prompt_len[batch.rows])])
        out = batch.rows[batch.wanted]
        if len(batch.sampled) < len(out):
            given = np.setdiff1d(np.arange(len(out)), batch.sampled)
            for i in given:
                self._jobs[int(table.job[out[i]])].logits[int(out[i])] = (logits, int(i))
            self._finish(out[given])
        self._record(batch, out[batch.sampled], tokens, logprobs)

    def _record(self, batch: Batch, rows: Ints, tokens: Ints, logprobs: np.ndarray) -> None:
        table = self.table
        if len(rows) == 0:
            return
        at = table.num_tokens[rows]
        table.tokens[rows, at] = tokens
        table.logprobs[rows, at] = logprobs
        table.cum_logprob[rows] += logprobs
        table.num_tokens[rows] = at + 1
        finish = np.where(at + 1 >= table.limit[rows], Finish.LENGTH, Finish.NONE)
        for stop_id in batch.stop_ids:
            may = (
                (table.stop[rows] == stop_id) & self.matcher.mask(stop_id)[tokens] & (at + 1 >= table.min_tokens[rows])
            )
            for i in np.flatnonzero(may):
                if self.matcher.stopped(stop_id, table.tokens[rows[i], table.step_begin[rows[i]] : at[i] + 1]):
                    finish[i] = Finish.STOP
        finish[self._eos[tokens] & ~table.ignore_eos[rows]] = Finish.EOS
        table.finish[rows] = finish
        self._stream(rows, tokens)
        self._finish(rows[finish != Finish.NONE])

    def _stream(self, rows: Ints, tokens: Ints) -> None:
        """Tells callbacks of new tokens; an error in one fails its own job alone."""
        for job_id in np.unique(self.table.job[rows]):
            job = self._jobs[int(job_id)]
            if job.callback is None:
                continue
            where = {int(row): i for i, row in enumerate(job.rows)}
            self._thread_in_callback = threading.get_ident()
            try:
                for row, token in zip(rows, tokens, strict=True):
                    if self.table.job[row] == job_id:
                        job.callback(where[int(row)], int(token), self._delta(job, int(row)))
            except Exception as error:
                self._end_job(int(job_id), error)
            finally:
                self._thread_in_callback = None

    def _delta(self, job: Job, row: int) -> str:
        table = self.table
        if row not in job.streams:
            job.streams[row] = TextStream(self.matcher.decode, self.matcher[int(table.stop[row])])
        new = table.tokens[row, table.step_begin[row] : table.num_tokens[row]]
        finish = table.finish[row]
        return job.streams[row].push(new, last=finish != Finish.NONE, cut=finish == Finish.STOP)

    def _finish(self, rows: Ints) -> None:
        """Rows have done their work; jobs whose last row this was resolve."""
        table = self.table
        rows = rows[table.job[rows] >= 0]
        if len(rows) == 0:
            return
        self._batch = None
        jobs, counts = np.unique(table.job[rows], return_counts=True)
        table.work[rows] = Work.NONE
        table.job[rows] = -1
        for job_id, count in zip(jobs, counts, strict=True):
            job = self._jobs[int(job_id)]
            job.num_live -= int(count)
            if job.num_live == 0:
                del self._jobs[int(job_id)]
                job.resolve()

    def _end_work(self, rows: Ints, error: BaseException) -> None:
        for job_id in np.unique(self.table.job[rows]):
            if job_id >= 0:
                self._end_job(int(job_id), error)

    def _end_job(self, job_id: int, error: BaseException | None = None) -> None:
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        mine = self.table.job == job_id
        self.table.work[mine] = Work.NONE
        self.table.job[mine] = -1
        self._batch = None
        job.fail(error)

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

    def _count(self, batch: Batch) -> None:
        self._stats.num_forwards += 1
        chunked = int(batch.q_lens[batch.q_lens > 1].sum())
        self._stats.num_prefill_tokens += chunked
        self._stats.num_decode_tokens += int(batch.q_lens.sum()) - chunked
        self._stats.num_sampled_tokens += len(batch.sampled)

    def _uncache_last(self, rows: Ints) -> None:
        """Rows that are wholly in the cache give up their last token: its logits are wanted again."""
        full = rows[self.table.num_cached[rows] >= self.table.num_tokens[rows]]
        if len(full):
            self.table.num_cached[full] = self.table.num_tokens[full] - 1
            self.pool.truncate(full.astype(np.int32), self.table.num_cached[full].astype(np.int32))

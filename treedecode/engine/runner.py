"""Ticker: one ragged forward, or one captured step, for everything that is due."""

import threading
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treedecode.accounting.meter import BudgetExhausted, Meter
from treedecode.cache.page_pool import OutOfPages, PagePool
from treedecode.common.arrays import IntArray
from treedecode.engine import forward as step
from treedecode.engine.branch_store import Forest
from treedecode.engine.branch_table import Finish, Work
from treedecode.engine.graph_steps import CapturedSteps, Run, fits
from treedecode.engine.jobs import Job, Stats
from treedecode.engine.scheduler import Batch, Draw, Scheduler
from treedecode.engine.stops import StopMatcher, TextStream
from treedecode.ops.pages import OK, OUT_OF_PAGES, STATUS_ERROR, STATUS_NUM_FREE, STATUS_NUM_NEEDED


class Ticker(Forest):
    """A forest and the tick that moves the branches of its jobs.

    A batch whose steps are all alike goes on a captured step and runs ahead of the host; others go op by op.
    """

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
        super().__init__(pool, max_tokens=max_tokens)
        self.model = model
        self.matcher = matcher
        self.meter = Meter(model, pool.page_size)
        self.scheduler = Scheduler(self.table, pool, self.index, self.meter, prefill_tokens=prefill_tokens)
        self._stats = Stats()
        self._jobs: dict[int, Job] = {}
        # row -> (its job, logits of an earlier forward, row in them): its next token needs no forward
        self._first: dict[int, tuple[int, Tensor, int]] = {}
        self._batch: Batch | None = None
        self.captured = captured  # None: every step is launched op by op, and waited for
        self._run_ahead: Run | None = None
        self._num_changes = getattr(model, "num_changes", 0)
        self._thread_in_callback: int | None = None
        # configurations name tokens that the model does not have, -1 among them: those never come
        eos = sorted(token for token in model.eos_token_ids if 0 <= token < model.vocab_size)
        self._eos = np.zeros(model.vocab_size, bool)
        self._eos[eos] = True
        self._eos_ids = torch.tensor(eos, dtype=torch.int64, device=pool.device)

    def tick(self) -> None:
        """One forward over everything that is due. An error in it fails the jobs of its rows; their branches stay."""
        with self.lock:
            begin = time.perf_counter()
            self.collect()
            if self._run_ahead is not None and hasattr(self.model, "refresh"):
                self.model.refresh()  # replays do not go through the model, which looks before each forward
            self._follow_model()
            rows: IntArray = np.flatnonzero(self.table.work)
            try:
                with torch.inference_mode():
                    self._take_first()
                    if self._run_ahead is None or self._run_ahead.batch is not self._batch:
                        self._catch_up()
                        self._run_ahead = self._start_run()
                    if self._run_ahead is not None:
                        rows = self._run_ahead.batch.rows
                        self._advance(self._run_ahead)
                    else:
                        batch, slots = self._prepare()
                        if batch is not None:
                            rows = batch.rows
                            self._step(batch, slots)
            except BaseException as error:
                self._batch = None
                self._abandon_run()
                # a row whose logits are NaN ends its own call; the others' step is taken again without it
                self._end_work(error.rows if isinstance(error, step.BadLogits) else rows, error)
                if not isinstance(error, Exception):
                    raise
            finally:
                self._stats.busy_seconds += time.perf_counter() - begin

    def check_integrity(self) -> None:
        """See `Forest.check_integrity`; what is in flight is taken first."""
        with self.lock:
            self._catch_up()
            super().check_integrity()

    def forget(self) -> None:
        """Drops all keys and values; branches that go on are computed anew, like preempted ones."""
        with self.lock:
            self.forget_prefixes()
            self._abandon_run()
            if self.captured is not None:
                self.captured.clear()
            rows = np.flatnonzero(self.table.handles > 0)
            self.pool.clear(rows.astype(np.int32))
            self.table.num_cached[rows] = 0
            self._next_logits.clear()
            self._first.clear()
            self._batch = None

    def _follow_model(self) -> None:
        """Keys and values that a model computed before it changed are of no use."""
        num_changes = getattr(self.model, "num_changes", 0)
        if num_changes != self._num_changes:
            self._num_changes = num_changes
            self.forget()

    def _next_batch(self) -> Batch | None:
        if self._batch is None:
            batch, done = self.scheduler.next_batch()
            self._finish(done)
            self._batch = batch
        return self._batch

    def _prepare(self) -> tuple[Batch | None, Tensor]:
        """The batch of this tick and the cache slots of its tokens."""
        while True:
            batch = self._next_batch()
            if batch is None:
                return None, torch.empty(0)
            try:
                slots = self.pool.append(batch.rows.astype(np.int32), None if batch.decode_only else batch.q_lens)
            except OutOfPages as error:
                self._make_room(batch, error)
                continue
            self._batch = batch if batch.decode_only else None
            return batch, slots

    def _make_room(self, batch: Batch, error: OutOfPages) -> None:
        self._batch = None
        first = batch.rows[np.argmin(self.table.order[batch.rows])]
        self.scheduler.make_room(np.array([first]), error.num_needed - error.num_free)

    def _step(self, batch: Batch, slots: Tensor) -> None:
        table = self.table
        cached = table.num_cached[batch.rows]
        wants_hidden = bool((table.work[batch.rows[batch.wanted]] == Work.HIDDEN).any())
        try:
            logits, hidden = step.forward(self.model, self.pool, table, batch, slots, wants_hidden=wants_hidden)
            tokens, logprobs = self._choose(batch, logits)
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
                row, found = int(out[i]), logits
                if hidden is not None and table.work[row] == Work.HIDDEN:
                    found = hidden
                    self._next_logits[row] = (logits, int(i), int(table.num_tokens[row]))
                self._jobs[int(table.job[row])].found[row] = (found, int(i))
            self._finish(out[given])
        self._record(batch.draw, batch.draw.rows, tokens, logprobs)
        self._charge(batch, cached, batch.q_lens)

    def _choose(self, batch: Batch, logits: Tensor) -> tuple[IntArray, np.ndarray]:
        if len(batch.sampled) < len(batch.wanted):
            logits = logits[torch.from_numpy(batch.sampled).to(logits.device)]
        return step.choose(self.table, self.matcher, self._eos_ids, batch.draw, logits)

    def _take_first(self) -> None:
        """Samples a token for every row whose logits an earlier forward computed."""
        waiting, self._first = self._first, {}
        while waiting := {row: found for row, found in waiting.items() if self.table.job[row] == found[0]}:
            parts: dict[int, tuple[Tensor, list[int], list[int]]] = {}  # the rows of each forward's logits
            for row, (_, logits, at) in waiting.items():
                _, rows, places = parts.setdefault(id(logits), (logits, [], []))
                rows.append(row)
                places.append(at)
            found = [logits.index_select(0, torch.tensor(at, device=logits.device)) for logits, _, at in parts.values()]
            draw = self.scheduler.draw(np.concatenate([rows for _, rows, _ in parts.values()]))
            try:
                chosen = step.choose(self.table, self.matcher, self._eos_ids, draw, torch.cat(found))
            except step.BadLogits as error:
                self._end_work(error.rows, error)  # the others' tokens are drawn again without them
                continue
            self._record(draw, draw.rows, *chosen)
            self._stats.num_sampled_tokens += len(draw.rows)
            self._end_over(self.meter.charge_sampled(self.table.account[draw.rows]))
            return

    def _charge(self, batch: Batch, cached: IntArray, q_lens: IntArray) -> None:
        """Charges a forward to the accounts of its rows; what those that are then over a limit have under way ends."""
        if not batch.shares:
            return
        wanted, sampled = np.zeros(len(q_lens), bool), np.zeros(len(q_lens), bool)
        wanted[batch.wanted] = sampled[batch.wanted[batch.sampled]] = True
        self._end_over(self.meter.charge(batch.shares, cached, q_lens, wanted & (q_lens > 0), sampled & (q_lens > 0)))

    def _end_over(self, over: IntArray) -> None:
        """Ends what is under way for accounts that are over a limit."""
        if len(over):
            working = np.flatnonzero(self.table.work)
            ended = working[self.meter.members(self.table.account[working], over)]
            self._end_work(ended, BudgetExhausted("the budget is spent"))

    def _start_run(self) -> Run | None:
        """Puts the batch on a captured step, if there is one for what it does."""
        if self.captured is None or (batch := self._next_batch()) is None or not fits(batch, self.table):
            return None
        return self.captured.start(batch, self.table)

    def _advance(self, run: Run) -> None:
        """Launches the next step of a run, then takes the tokens of the one before."""
        rows = run.batch.rows
        if (self.table.num_tokens[rows] + run.num_in_flight < self.table.limit[rows]).all():
            run.launch()
            if not run.is_full:
                return
        self._take(run)

    def _take(self, run: Run) -> None:
        table = self.table
        tokens, logprobs, status = run.take()
        if status[STATUS_ERROR] != OK:  # neither this step nor a later one has changed anything
            self._abandon_run()
            if status[STATUS_ERROR] != OUT_OF_PAGES:
                raise RuntimeError(f"the page ops refused a captured step: status {status.tolist()}")
            error = OutOfPages(int(status[STATUS_NUM_NEEDED]), int(status[STATUS_NUM_FREE]))
            self._make_room(run.batch, error)
            return
        good = run.alive & (tokens >= 0)
        bad = run.batch.rows[run.alive & (tokens < 0)]
        rows = run.batch.rows[good]
        table.num_cached[rows] += 1
        self._count(run.batch)
        cached = table.num_cached[run.batch.rows] - good
        self._record(run.batch.draw, rows, tokens[good], logprobs[good])
        self._charge(run.batch, cached, good.astype(np.int64))
        if len(bad):
            self._end_work(bad, step.BadLogits(bad, table.num_tokens[bad]))

    def _catch_up(self) -> None:
        """Takes what is in flight of the run, which then has ended."""
        while self._run_ahead is not None and self._run_ahead.num_in_flight:
            self._take(self._run_ahead)
        self._run_ahead = None

    def _abandon_run(self) -> None:
        """Ends the run as if what is in flight had not been launched."""
        if self._run_ahead is not None:
            self.pool.reset_status()
            self._leave_run(self._run_ahead.batch.rows)
            self._run_ahead = None

    def _leave_run(self, rows: IntArray) -> None:
        """Rows are no longer part of the run: the pages' lengths, which are ahead, become what the table has."""
        run = self._run_ahead
        if run is None:
            return
        gone = run.alive & np.isin(run.batch.rows, rows)
        run.alive[gone] = False
        if gone.any() and run.num_in_flight:
            left = run.batch.rows[gone]
            self.pool.truncate(left.astype(np.int32), self.table.num_cached[left].astype(np.int32))

    def _record(self, draw: Draw, rows: IntArray, tokens: IntArray, logprobs: np.ndarray) -> None:
        table = self.table
        if len(rows) == 0:
            return
        at = table.num_tokens[rows]
        table.tokens[rows, at] = tokens
        table.logprobs[rows, at] = logprobs
        table.cum_logprob[rows] += logprobs
        table.num_tokens[rows] = at + 1
        finish = np.where(at + 1 >= table.limit[rows], Finish.LENGTH, Finish.NONE)
        for stop_id in draw.stop_ids:
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

    def _stream(self, rows: IntArray, tokens: IntArray) -> None:
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

    def _finish(self, rows: IntArray) -> None:
        """Rows have done their work; jobs whose last row this was resolve."""
        table = self.table
        rows = rows[table.job[rows] >= 0]
        if len(rows) == 0:
            return
        self._batch = None
        self._leave_run(rows)
        jobs, counts = np.unique(table.job[rows], return_counts=True)
        table.work[rows] = Work.NONE
        table.job[rows] = -1
        for job_id, count in zip(jobs, counts, strict=True):
            job = self._jobs[int(job_id)]
            job.num_live -= int(count)
            if job.num_live == 0:
                del self._jobs[int(job_id)]
                job.resolve()

    def _end_work(self, rows: IntArray, error: BaseException) -> None:
        for job_id in sorted({*self.table.job[rows].tolist()} - {-1}):
            self._end_job(job_id, error)

    def _end_job(self, job_id: int, error: BaseException | None = None) -> None:
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        mine = self.table.job == job_id
        self._leave_run(np.flatnonzero(mine))
        self.table.work[mine] = Work.NONE
        self.table.job[mine] = -1
        self._batch = None
        job.fail(error)

    def count_decoded(self, num_tokens: int) -> None:
        """A forward of one token for each of so many branches has been done elsewhere."""
        self._stats.num_forwards += 1
        self._stats.num_decode_tokens += num_tokens

    def _count(self, batch: Batch) -> None:
        self._stats.num_forwards += 1
        chunked = int(batch.q_lens[batch.q_lens > 1].sum())
        self._stats.num_prefill_tokens += chunked
        self._stats.num_decode_tokens += int(batch.q_lens.sum()) - chunked
        self._stats.num_sampled_tokens += len(batch.sampled)

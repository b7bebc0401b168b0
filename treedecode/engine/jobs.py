"""Jobs: awaited calls on the engine, and the rows that each of them works on."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from treedecode.common.arrays import IntArray
from treedecode.engine.branch_table import BranchTable, Finish, Work
from treedecode.engine.futures import settle
from treedecode.engine.next_logits import LogitsRow
from treedecode.engine.stops import StopMatcher, TextStream

Callback = Callable[[int, int, str], None]


@dataclass(eq=False)
class Job:
    """One awaited call: the rows it works on, and the future that its caller waits for."""

    rows: IntArray
    future: asyncio.Future
    num_live: int
    callback: Callback | None = None
    streams: dict[int, TextStream] = field(default_factory=dict)
    results: dict[int, LogitsRow] = field(default_factory=dict)  # row -> logits or hidden state of a forward

    def resolve(self) -> None:
        """Gives the caller the results; from any thread."""
        settle(self.future, self._stacked())

    def fail(self, error: BaseException | None) -> None:
        """Gives the caller an error; None: the caller does not wait any more."""
        settle(self.future, None, error if error is not None else asyncio.CancelledError())

    def _stacked(self) -> Tensor | None:
        if not self.results:
            return None
        results = [self.results[int(row)] for row in self.rows]
        values = results[0].logits
        if all(result.logits is values for result in results):
            order = [result.position for result in results]
            if order == list(range(len(values))):
                return values
            return values.index_select(0, torch.tensor(order, device=values.device))
        return torch.stack([result.logits[result.position] for result in results])


class JobRegistry:
    """The jobs under way. The branch table says which job a row works for.

    Args:
        on_resting: called with rows that have no work any more, before their callers are told.
    """

    def __init__(self, table: BranchTable, matcher: StopMatcher, on_resting: Callable[[IntArray], None]) -> None:
        self._table = table
        self._matcher = matcher
        self._on_resting = on_resting
        self._jobs: dict[int, Job] = {}
        self._num_started = 0
        self._thread_in_callback: int | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def num_ended(self) -> int:
        """Jobs that are done, or have failed."""
        return self._num_started - len(self._jobs)

    @property
    def in_callback(self) -> bool:
        """True in a callback, and so within a step: to wait for another step there would be for ever."""
        return self._thread_in_callback == threading.get_ident()

    def has_any_of(self, loop: asyncio.AbstractEventLoop) -> bool:
        """True while a caller in this event loop waits."""
        return any(job.future.get_loop() is loop for job in list(self._jobs.values()))

    def start(self, job: Job, live: IntArray, work: Work) -> int:
        """Gives the rows `live` of a job their work; returns the job's id."""
        job_id, self._num_started = self._num_started, self._num_started + 1
        self._jobs[job_id] = job
        self._table.work[live] = work
        self._table.job[live] = job_id
        self._table.order[live] = (job_id << 24) + np.arange(len(live))
        return job_id

    def put_result(self, row: int, result: LogitsRow) -> None:
        """Keeps a row's logits or hidden state for its job."""
        self._jobs[int(self._table.job[row])].results[row] = result

    def stream(self, rows: IntArray, tokens: IntArray) -> None:
        """Tells callbacks of new tokens; an error in one fails its own job alone."""
        for job_id in np.unique(self._table.job[rows]):
            job = self._jobs[int(job_id)]
            if job.callback is None:
                continue
            positions = {int(row): i for i, row in enumerate(job.rows)}
            self._thread_in_callback = threading.get_ident()
            try:
                for row, token in zip(rows, tokens, strict=True):
                    if self._table.job[row] == job_id:
                        job.callback(positions[int(row)], int(token), self._new_text(job, int(row)))
            except Exception as error:
                self.end(int(job_id), error)
            finally:
                self._thread_in_callback = None

    def _new_text(self, job: Job, row: int) -> str:
        table = self._table
        if row not in job.streams:
            stops = self._matcher[int(table.stop[row])]
            job.streams[row] = TextStream(self._matcher.decode, stops, int(table.step_begin[row]))
        tokens = table.tokens[row, : table.num_tokens[row]]
        finish = table.finish[row]
        return job.streams[row].push(tokens, last=finish != Finish.NONE, cut=finish == Finish.STOP)

    def finish(self, rows: IntArray) -> None:
        """Ends the work of rows; jobs whose last row this was resolve."""
        table = self._table
        rows = rows[table.job[rows] >= 0]
        if len(rows) == 0:
            return
        self._on_resting(rows)
        job_ids, counts = np.unique(table.job[rows], return_counts=True)
        table.work[rows] = Work.NONE
        table.job[rows] = -1
        for job_id, count in zip(job_ids.tolist(), counts.tolist(), strict=True):
            job = self._jobs[job_id]
            job.num_live -= count
            if job.num_live == 0:
                del self._jobs[job_id]
                job.resolve()

    def fail(self, rows: IntArray, error: BaseException) -> None:
        """Ends all jobs that work on one of rows with an error."""
        for job_id in sorted({*self._table.job[rows].tolist()} - {-1}):
            self.end(job_id, error)

    def end(self, job_id: int, error: BaseException | None = None) -> None:
        """Ends a job with an error, if it is still under way; None: its caller does not wait any more."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        rows = np.flatnonzero(self._table.job == job_id)
        self._on_resting(rows)
        self._table.work[rows] = Work.NONE
        self._table.job[rows] = -1
        job.fail(error)

    def end_all(self, error: BaseException) -> None:
        """Ends every job with an error."""
        for job_id in list(self._jobs):
            self.end(job_id, error)

"""Runner: moves all rows that have work by one ragged forward, or by one replay of a graph."""

import time

import numpy as np
import torch
from torch import Tensor

from treedecode.accounting.meter import BudgetExhausted, Meter
from treedecode.cache.page_pool import OutOfPages
from treedecode.common.arrays import IntArray
from treedecode.engine.branch_store import BranchStore
from treedecode.engine.branch_table import Finish, Work
from treedecode.engine.forward import BadLogits, forward, sample_tokens
from treedecode.engine.graph_runner import GraphRunner, ReplayedBatch, can_capture
from treedecode.engine.jobs import JobRegistry
from treedecode.engine.next_logits import LogitsRow, gather
from treedecode.engine.scheduler import Batch, SampleBatch, Scheduler
from treedecode.engine.stats import Stats
from treedecode.engine.stops import StopMatcher
from treedecode.models.adapter import ModelAdapter
from treedecode.ops.pages import OK, OUT_OF_PAGES, STATUS_ERROR, STATUS_NUM_FREE, STATUS_NUM_NEEDED


class Runner:
    """Runs forwards over the rows that have work, and writes what comes out into the branch table.

    A batch whose steps are all alike goes on a graph and runs one step ahead of the host; others go op by op.

    Attributes:
        graphs: captured steps; None = every step is launched op by op, and waited for.
    """

    def __init__(
        self,
        model: ModelAdapter,
        store: BranchStore,
        scheduler: Scheduler,
        jobs: JobRegistry,
        meter: Meter,
        matcher: StopMatcher,
        *,
        graphs: GraphRunner | None = None,
    ) -> None:
        self.model = model
        self.graphs = graphs
        self._store, self._table, self._pool = store, store.table, store.pool
        self._scheduler, self._jobs, self._meter, self._matcher = scheduler, jobs, meter, matcher
        self._stats = Stats()
        # row -> (its job, logits of an earlier forward): its next token needs no forward
        self._ready: dict[int, tuple[int, LogitsRow]] = {}
        self._batch: Batch | None = None  # of the next tick, if it is known already
        self._replayed: ReplayedBatch | None = None
        self._num_changes = model.num_changes
        # Configurations name tokens that the model does not have, -1 among them: those never come.
        eos = sorted(token for token in model.eos_token_ids if 0 <= token < model.vocab_size)
        self._is_eos = np.zeros(model.vocab_size, bool)
        self._is_eos[eos] = True
        self._eos_ids = torch.tensor(eos, dtype=torch.int64, device=store.pool.device)

    @property
    def stats(self) -> Stats:
        """Counts so far."""
        self._stats.num_preemptions = self._scheduler.num_preemptions
        self._stats.num_prefix_tokens = self._scheduler.num_prefix_tokens
        return self._stats

    def tick(self) -> None:
        """Runs one forward over everything that is due. An error fails the jobs of its rows; their branches stay."""
        with self._store.lock:
            begin = time.perf_counter()
            self._store.collect()
            if self._replayed is not None:
                self.model.refresh()  # replays do not go through the model, which looks before each forward
            self.follow_model()
            rows: IntArray = np.flatnonzero(self._table.work)
            try:
                with torch.inference_mode():
                    self._sample_ready()
                    if self._replayed is None or self._replayed.batch is not self._batch:
                        self.catch_up()
                        self._replayed = self._start_replays()
                    if self._replayed is not None:
                        rows = self._replayed.batch.rows
                        self._advance(self._replayed)
                    else:
                        batch, slots = self._prepare()
                        if batch is not None:
                            rows = batch.rows
                            self._step(batch, slots)
            except BaseException as error:
                self._batch = None
                self._abandon_replays()
                # A row whose logits are NaN ends its own call; the others take the step again without it.
                self._jobs.fail(error.rows if isinstance(error, BadLogits) else rows, error)
                if not isinstance(error, Exception):
                    raise
            finally:
                self._stats.busy_seconds += time.perf_counter() - begin

    def add_ready(self, job_id: int, logits: dict[int, LogitsRow]) -> None:
        """Samples the next token of a job's rows from logits that are there already."""
        self._ready |= {row: (job_id, row_logits) for row, row_logits in logits.items()}

    def rest(self, rows: IntArray) -> None:
        """Takes rows that have no work any more out of what is under way."""
        self._batch = None
        self._leave_replays(rows)

    def rows_changed(self) -> None:
        """Makes the next tick choose its batch anew, because rows have got work."""
        self._batch = None

    def forget(self) -> None:
        """Drops all keys and values and all graphs."""
        with self._store.lock:
            self._abandon_replays()
            if self.graphs is not None:
                self.graphs.clear()
            self._store.forget()
            self._ready.clear()
            self._batch = None

    def follow_model(self) -> None:
        """Drops keys and values that the model computed before it changed."""
        if self.model.num_changes != self._num_changes:
            self._num_changes = self.model.num_changes
            self.forget()

    def catch_up(self) -> None:
        """Takes the results of replays in flight; the batch is then on no graph."""
        while self._replayed is not None and self._replayed.num_in_flight:
            self._take(self._replayed)
        self._replayed = None

    def count_decoded(self, num_tokens: int) -> None:
        """Counts a forward of one token for each of `num_tokens` branches that was run elsewhere."""
        self._stats.num_forwards += 1
        self._stats.num_decode_tokens += num_tokens

    # -- op by op --

    def _next_batch(self) -> Batch | None:
        if self._batch is None:
            batch, done = self._scheduler.next_batch()
            self._jobs.finish(done)
            self._batch = batch
        return self._batch

    def _prepare(self) -> tuple[Batch | None, Tensor]:
        """Returns the batch of this tick and the cache slots of its tokens."""
        while True:
            batch = self._next_batch()
            if batch is None:
                return None, torch.empty(0, device="cpu")
            try:
                slots = self._pool.append(batch.rows.astype(np.int32), None if batch.decode_only else batch.q_lens)
            except OutOfPages as error:
                self._make_room(batch, error)
                continue
            self._batch = batch if batch.decode_only else None
            return batch, slots

    def _make_room(self, batch: Batch, error: OutOfPages) -> None:
        self._batch = None
        first = batch.rows[np.argmin(self._table.order[batch.rows])]
        self._scheduler.make_room(np.array([first]), error.num_needed - error.num_free)

    def _step(self, batch: Batch, slots: Tensor) -> None:
        table = self._table
        cached = table.num_cached[batch.rows]
        wants_hidden = bool((table.work[batch.rows[batch.wanted]] == Work.HIDDEN).any())
        try:
            logits, hidden = forward(self.model, self._pool, table, batch, slots, wants_hidden=wants_hidden)
            tokens, logprobs = self._sample(batch, logits)
        except BaseException:
            self._pool.truncate(batch.rows.astype(np.int32), cached.astype(np.int32))
            raise
        table.num_cached[batch.rows] = cached + batch.q_lens
        self._count(batch)
        self._scheduler.remember(batch.rows[(batch.q_lens > 1) | (cached < table.prompt_len[batch.rows])])
        out = batch.rows[batch.wanted]
        if len(batch.sampled) < len(out):
            unsampled = np.setdiff1d(np.arange(len(out)), batch.sampled)
            for i in unsampled.tolist():
                row, result = int(out[i]), LogitsRow(logits, i)
                if hidden is not None and table.work[row] == Work.HIDDEN:
                    self._store.next_logits.put(row, result, int(table.num_tokens[row]))
                    result = LogitsRow(hidden, i)
                self._jobs.put_result(row, result)
            self._jobs.finish(out[unsampled])
        self._record(batch.sample, batch.sample.rows, tokens, logprobs)
        self._charge(batch, cached, batch.q_lens)

    def _sample(self, batch: Batch, logits: Tensor) -> tuple[IntArray, np.ndarray]:
        if len(batch.sampled) < len(batch.wanted):
            logits = logits[torch.from_numpy(batch.sampled).to(logits.device)]
        return sample_tokens(self._table, self._matcher, self._eos_ids, batch.sample, logits)

    def _sample_ready(self) -> None:
        """Samples a token for every row whose logits an earlier forward computed."""
        ready, self._ready = self._ready, {}
        while ready := {row: (job, logits) for row, (job, logits) in ready.items() if self._table.job[row] == job}:
            logits, order = gather([row_logits for _, row_logits in ready.values()])
            sample = self._scheduler.sample_batch(np.fromiter(ready, np.int64)[order])
            try:
                tokens, logprobs = sample_tokens(self._table, self._matcher, self._eos_ids, sample, logits)
            except BadLogits as error:
                self._jobs.fail(error.rows, error)  # the others' tokens are drawn again without them
                continue
            self._record(sample, sample.rows, tokens, logprobs)
            self._stats.num_sampled_tokens += len(sample.rows)
            self._end_overspent(self._meter.charge_sampled(self._table.account[sample.rows]))
            return

    # -- on a graph --

    def _start_replays(self) -> ReplayedBatch | None:
        """Puts the batch on a graph, if there is one for its steps."""
        if self.graphs is None or (batch := self._next_batch()) is None or not can_capture(batch, self._table):
            return None
        return self.graphs.start(batch, self._table)

    def _advance(self, replayed: ReplayedBatch) -> None:
        """Launches the next step, then takes the tokens of the one before."""
        rows = replayed.batch.rows
        if (self._table.num_tokens[rows] + replayed.num_in_flight < self._table.limit[rows]).all():
            replayed.launch()
            if not replayed.is_full:
                return
        self._take(replayed)

    def _take(self, replayed: ReplayedBatch) -> None:
        table, batch = self._table, replayed.batch
        tokens, logprobs, status = replayed.take()
        if status[STATUS_ERROR] != OK:  # neither this step nor a later one has changed anything
            self._abandon_replays()
            if status[STATUS_ERROR] != OUT_OF_PAGES:
                raise RuntimeError(f"the page ops refused a captured step: status {status.tolist()}")
            self._make_room(batch, OutOfPages(int(status[STATUS_NUM_NEEDED]), int(status[STATUS_NUM_FREE])))
            return
        good = replayed.alive & (tokens >= 0)
        bad = batch.rows[replayed.alive & (tokens < 0)]
        rows = batch.rows[good]
        table.num_cached[rows] += 1
        self._count(batch)
        cached = table.num_cached[batch.rows] - good
        self._record(batch.sample, rows, tokens[good], logprobs[good])
        self._charge(batch, cached, good.astype(np.int64))
        if len(bad):
            self._jobs.fail(bad, BadLogits(bad, table.num_tokens[bad]))

    def _abandon_replays(self) -> None:
        """Takes the batch off its graph as if the steps in flight had not been launched."""
        if self._replayed is not None:
            self._pool.reset_status()
            self._leave_replays(self._replayed.batch.rows)
            self._replayed = None

    def _leave_replays(self, rows: IntArray) -> None:
        """Takes rows off the graph. The pages' lengths, which are ahead, become those of the table."""
        replayed = self._replayed
        if replayed is None:
            return
        gone = replayed.alive & np.isin(replayed.batch.rows, rows)
        replayed.alive[gone] = False
        if gone.any() and replayed.num_in_flight:
            rows = replayed.batch.rows[gone]
            self._pool.truncate(rows.astype(np.int32), self._table.num_cached[rows].astype(np.int32))

    # -- the results --

    def _record(self, sample: SampleBatch, rows: IntArray, tokens: IntArray, logprobs: np.ndarray) -> None:
        """Writes new tokens into the table, and ends the work of rows that have reached a stop or their limit."""
        table = self._table
        if len(rows) == 0:
            return
        position = table.num_tokens[rows]
        table.tokens[rows, position] = tokens
        table.logprobs[rows, position] = logprobs
        table.cum_logprob[rows] += logprobs
        length = table.num_tokens[rows] = position + 1
        finish = np.where(length >= table.limit[rows], Finish.LENGTH, Finish.NONE)
        for stop_id in sample.stop_ids:
            may_stop = (table.stop[rows] == stop_id) & self._matcher.mask(stop_id)[tokens]
            for i in np.flatnonzero(may_stop & (length >= table.min_tokens[rows])):
                if self._matcher.stopped(stop_id, table.tokens[rows[i], : length[i]], int(table.step_begin[rows[i]])):
                    finish[i] = Finish.STOP
        finish[self._is_eos[tokens] & ~table.ignore_eos[rows]] = Finish.EOS
        table.finish[rows] = finish
        self._jobs.stream(rows, tokens)
        self._jobs.finish(rows[finish != Finish.NONE])

    def _charge(self, batch: Batch, cached: IntArray, q_lens: IntArray) -> None:
        """Charges a forward to the accounts of its rows, and ends the work of accounts that are then over a limit."""
        if not batch.shares:
            return
        wanted, sampled = np.zeros(len(q_lens), bool), np.zeros(len(q_lens), bool)
        wanted[batch.wanted] = sampled[batch.wanted[batch.sampled]] = True
        over = self._meter.charge(batch.shares, cached, q_lens, wanted & (q_lens > 0), sampled & (q_lens > 0))
        self._end_overspent(over)

    def _end_overspent(self, accounts: IntArray) -> None:
        """Ends the work that is under way for accounts over a limit."""
        if len(accounts):
            working = np.flatnonzero(self._table.work)
            rows = working[self._meter.members(self._table.account[working], accounts)]
            self._jobs.fail(rows, BudgetExhausted("the budget is spent"))

    def _count(self, batch: Batch) -> None:
        self._stats.num_forwards += 1
        chunked = int(batch.q_lens[batch.q_lens > 1].sum())
        self._stats.num_prefill_tokens += chunked
        self._stats.num_decode_tokens += int(batch.q_lens.sum()) - chunked
        self._stats.num_sampled_tokens += len(batch.sampled)

"""Captured decode steps: append, plan, forward and sample on fixed buffers, so that a CUDA graph replays them.

The host launches a step before it has seen the tokens of the one before, whose buffers then arrive in pinned memory:
it is always one step behind, and never waits for the step it has just launched.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from treedecode import ops
from treedecode.cache.page_pool import PagePool
from treedecode.common.arrays import IntArray
from treedecode.engine.branch_table import BranchTable
from treedecode.engine.scheduler import Batch
from treedecode.models.context import StepContext

# Rows of a captured step; a batch takes the next larger one and leaves the rest of its rows idle.
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
MAX_IN_FLIGHT = 2

C = TypeVar("C", bound="Captured")


def leave_failed_capture(stream: torch.cuda.Stream, memory: Any) -> None:
    """Undoes what `torch.cuda.graph` leaves behind when its capture fails, on the device of `stream`.

    The stream of the capture would stay the current one, and the device's random numbers in a state for captures alone:
    `torch.rand` and its like would raise from then on. The allocator would take the capture for one under way: it gives
    no cached memory back meanwhile, and starts no second one in the same pool.

    Args:
        stream: the current one before.
        memory: the pool of the capture.
    """
    torch.cuda.set_stream(stream)
    with contextlib.suppress(RuntimeError):  # where torch has cleaned up itself
        torch._C._cuda_endAllocateToPool(stream.device_index, memory)
    generator = torch.cuda.default_generators[stream.device_index]
    fresh = torch.Generator(stream.device)
    fresh.set_state(generator.get_state())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


class Captured:
    """A decode step on fixed buffers: every row appends one token, or none, and something follows from the logits.

    A subclass says what follows in `_step`, and leaves in `result` what the host wants to know.
    """

    def __init__(self, model: Any, pool: PagePool, size: int, result_len: int) -> None:
        """Makes the buffers for `size` rows and `result_len` numbers."""
        self.model, self.pool, self.size = model, pool, size
        self.rows, self.q_lens = self.buffer(torch.int32), self.buffer(torch.int32)
        self.row_ids, self.ids = self.buffer(torch.int64), self.buffer(torch.int64)
        self.result = torch.zeros(result_len + len(pool.status), dtype=torch.int32, device=pool.device)
        self._slots, self._last = self.buffer(torch.int64), torch.arange(size, device=pool.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def buffer(self, dtype: torch.dtype, size: int | None = None) -> Tensor:
        """Zeros, one per row by default."""
        return torch.zeros(self.size if size is None else size, dtype=dtype, device=self.pool.device)

    def idle(self, rows: IntArray) -> None:
        """The step's rows from here on; none of them appends."""
        self.q_lens.zero_()
        self.rows.copy_(torch.from_numpy(rows.astype(np.int32)))
        self.row_ids.copy_(self.rows)

    def capture(self, memory: Any, stream: Any) -> None:
        """Makes the graph, on a GPU.

        Args:
            memory: the graphs' memory pool (`torch.cuda.graph_pool_handle()`), which they share.
            stream: captures, and runs the step before.

        Raises:
            RuntimeError: the step cannot be captured.
        """
        if self.pool.device.type != "cuda":
            return
        self._host = [torch.empty_like(self.result, device="cpu", pin_memory=True) for _ in range(MAX_IN_FLIGHT)]
        # Nothing is appended while all lengths are 0. The first runs load and compile kernels, which capture forbids.
        self.idle(np.arange(self.size))
        with torch.cuda.device(self.pool.device):
            before = torch.cuda.current_stream()
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._step()
            before.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may be decoding, too, and do what this one must not do now.
                with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                    self._step()
            except BaseException as error:
                leave_failed_capture(before, memory)
                error.add_note("This was while a decode step was captured; `cuda_graphs=False` captures none.")
                raise
            self._graph = graph

    def replay(self, number: int) -> tuple[Tensor, torch.cuda.Event | None]:
        """Launches the step; its result is in the tensor returned once the event has passed.

        Args:
            number: of this replay; the result of number n is overwritten by number n + MAX_IN_FLIGHT.
        """
        if self._graph is None:
            self._step()
            return self.result.clone(), None
        with torch.cuda.device(self.pool.device):
            self._graph.replay()
            host = self._host[number % MAX_IN_FLIGHT]
            host.copy_(self.result, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return host, event

    def _step(self) -> None:
        raise NotImplementedError

    def _forward(self) -> tuple[Tensor, Tensor]:
        """Appends the tokens of `ids`: (logits of what comes next `[size, vocab_size]`, lengths `[size]` int32)."""
        pool, model = self.pool, self.model
        ops.append_slots(pool.state, pool.kv, self._slots, self.rows, self.q_lens)
        page_table = pool.page_table.index_select(0, self.row_ids)
        seq_lens = pool.seq_lens.index_select(0, self.row_ids) * self.q_lens
        plan = ops.plan_tree(
            page_table,
            seq_lens,
            self.q_lens,
            page_size=pool.page_size,
            num_qo_heads=model.num_qo_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
        )
        context = StepContext(layer=pool.layer, page_table=page_table, seq_lens=seq_lens, plan=plan, slots=self._slots)
        positions = (seq_lens.long() - 1).clamp_min(0)
        return model.forward(self.ids, positions, context, self._last), seq_lens


class Flight:
    """The replays of a step that are under way; its length is how many have not been taken."""

    def __init__(self, step: Captured) -> None:
        self._step = step
        self._num_launched = 0
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def is_full(self) -> bool:
        """Whether a result must be taken before another launch."""
        return len(self._pending) == MAX_IN_FLIGHT

    def launch(self) -> None:
        """One more replay."""
        self._pending.append(self._step.replay(self._num_launched))
        self._num_launched += 1

    def take(self) -> np.ndarray:
        """Waits for the oldest replay: its `result`, copied."""
        result, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        return result.numpy().copy()


class CapturedStep(Captured):
    """A step of up to `size` rows: each appends the token sampled last and samples the next.

    Idle rows come last; they are rows of the pool like others, which a length of 0 leaves as they are.
    """

    def __init__(self, model: Any, pool: PagePool, size: int) -> None:
        super().__init__(model, pool, size, 2 * size)
        self.sampling = {
            "temperature": self.buffer(torch.float32),
            "top_k": self.buffer(torch.int32),
            "top_p": self.buffer(torch.float32),
            "min_p": self.buffer(torch.float32),
            "seed": self.buffer(torch.int64),
        }

    def load(self, batch: Batch, table: BranchTable) -> None:
        """The next replay steps these rows, each from the last token the table has."""
        count = len(batch.rows)
        others = np.setdiff1d(np.arange(self.pool.max_branches), batch.rows)[: self.size - count]
        self.idle(np.concatenate([batch.rows, others]))
        self.q_lens[:count] = 1
        last = table.tokens[batch.rows, table.num_tokens[batch.rows] - 1]
        self.ids[:count].copy_(torch.from_numpy(last.astype(np.int64)))
        for name, values in self.sampling.items():
            values[:count] = getattr(batch.draw, name)

    def _step(self) -> None:
        logits, length = self._forward()
        token, logprob, _ = ops.sample(logits, **self.sampling, position=length.long())
        self.ids.copy_(token.clamp_min(0))
        torch.cat([token, logprob.view(torch.int32), self.pool.status], out=self.result)


class Run:
    """A batch on its way through replays of a captured step.

    Attributes:
        batch: its rows.
        alive: `[n]` bool, rows that are still part of it; what replays say of others is void.
    """

    def __init__(self, step: CapturedStep, batch: Batch, table: BranchTable) -> None:
        self.batch = batch
        self.alive = np.ones(len(batch.rows), bool)
        self._flight = Flight(step)
        self._size = step.size
        step.load(batch, table)

    @property
    def num_in_flight(self) -> int:
        """Replays whose tokens have not been taken."""
        return len(self._flight)

    @property
    def is_full(self) -> bool:
        """Whether tokens must be taken before another launch."""
        return self._flight.is_full

    def launch(self) -> None:
        """One more step for all rows."""
        self._flight.launch()

    def take(self) -> tuple[IntArray, np.ndarray, IntArray]:
        """Waits for the oldest replay in flight: (tokens, log-probabilities, page status), rows as in the batch.

        A token of -1 means that nothing could be sampled from the row's logits.
        """
        size, count = self._size, len(self.alive)
        values = self._flight.take()
        return values[:count], values[size : size + count].view(np.float32), values[2 * size :]


class CapturedSteps:
    """The captured steps of a model; each is captured when it is first needed."""

    def __init__(self, model: Any, pool: PagePool, sizes: Sequence[int] = SIZES) -> None:
        self.model, self.pool, self.sizes = model, pool, sizes
        self._steps: dict[Any, Captured] = {}
        self._memory: Any = None
        self._stream: Any = None

    def start(self, batch: Batch, table: BranchTable) -> Run:
        """Puts a batch of decoding rows on the step of its size.

        Raises:
            RuntimeError: the model's forward cannot be captured (it waits for the device, say).
        """
        size = min((size for size in self.sizes if size >= len(batch.rows)), default=len(batch.rows))
        size = min(size, self.pool.max_branches)
        return Run(self.get(size, lambda: CapturedStep(self.model, self.pool, size)), batch, table)

    def get(self, key: Any, make: Callable[[], C]) -> C:
        """The step kept under `key`; made and captured if there is none."""
        if key not in self._steps:
            if self.pool.device.type == "cuda" and self._memory is None:
                self._memory = torch.cuda.graph_pool_handle()
                # One for all of them, for cuBLAS keeps a workspace for every stream that it has seen.
                self._stream = torch.cuda.Stream(self.pool.device)
            step = make()
            step.capture(self._memory, self._stream)
            self._steps[key] = step
        return self._steps[key]  # type: ignore[return-value]

    def clear(self) -> None:
        """Forgets all steps: the model is no longer what was captured."""
        self._steps.clear()


def fits(batch: Batch, table: BranchTable) -> bool:
    """Whether every step of the batch is the same work: one token per row, sampled from the logits as they are."""
    rows = batch.rows
    return bool(
        batch.decode_only
        and len(batch.sampled) == len(rows)
        and not batch.draw.penalised
        and (table.num_tokens[rows] >= table.min_tokens[rows]).all()
        # until the prompt is wholly in the cache, the prefix index has something to learn
        and (table.num_cached[rows] >= table.prompt_len[rows]).all()
    )

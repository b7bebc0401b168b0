"""GraphStep: a decode step on fixed buffers, captured as a CUDA graph and replayed.

The host launches a step before it has seen the results of the one before, which arrive in pinned memory. So it is
always one step behind, and never waits for the step it has just launched.
"""

import contextlib
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treedecode import ops
from treedecode.cache.page_pool import PagePool
from treedecode.common.arrays import IntArray
from treedecode.engine.forward import plan_step
from treedecode.models.adapter import ModelAdapter

MAX_IN_FLIGHT = 2


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


class GraphStep:
    """A decode step on fixed buffers: every row appends one token, or none, and computes the logits after it.

    A subclass defines `_step`, which runs `_forward`, uses its logits and leaves results for the host in `result`.
    """

    def __init__(self, model: ModelAdapter, pool: PagePool, size: int, result_len: int) -> None:
        """Makes the buffers for `size` rows and `result_len` numbers."""
        self.model, self.pool, self.size = model, pool, size
        self.rows, self.q_lens = self.buffer(torch.int32), self.buffer(torch.int32)
        self.row_ids, self.ids = self.buffer(torch.int64), self.buffer(torch.int64)
        self.result = torch.zeros(result_len + len(pool.status), dtype=torch.int32, device=pool.device)
        self._slots, self._last = self.buffer(torch.int64), torch.arange(size, device=pool.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def buffer(self, dtype: torch.dtype, size: int | None = None) -> Tensor:
        """Makes a tensor of zeros, one per row by default."""
        return torch.zeros(self.size if size is None else size, dtype=dtype, device=self.pool.device)

    def idle(self, rows: IntArray) -> None:
        """Sets the step's rows; none of them appends."""
        self.q_lens.zero_()
        self.rows.copy_(torch.from_numpy(rows.astype(np.int32)))
        self.row_ids.copy_(self.rows)

    def capture(self, memory: Any, stream: Any) -> None:
        """Captures the graph, on a GPU.

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
        """Launches the step; the tensor returned holds its result once the event has passed.

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
        """Appends the tokens of `ids` and runs the model.

        Returns:
            logits of the tokens after them, `[size, vocab_size]`; lengths `[size]` int32, 0 of idle rows.
        """
        pool, model = self.pool, self.model
        ops.append_slots(pool.state, pool.kv, self._slots, self.rows, self.q_lens)
        page_table = pool.page_table.index_select(0, self.row_ids)
        seq_lens = pool.seq_lens.index_select(0, self.row_ids) * self.q_lens
        context = plan_step(model, pool, page_table, seq_lens, self.q_lens, self._slots)
        positions = (seq_lens.long() - 1).clamp_min(0)
        return model.forward(self.ids, positions, context, self._last), seq_lens


class InFlight:
    """The replays of a step that are under way. Its length is the number of results not taken yet."""

    def __init__(self, step: GraphStep) -> None:
        self._step = step
        self._num_launched = 0
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def is_full(self) -> bool:
        """True if a result must be taken before another launch."""
        return len(self._pending) == MAX_IN_FLIGHT

    def launch(self) -> None:
        """Launches one more replay."""
        self._pending.append(self._step.replay(self._num_launched))
        self._num_launched += 1

    def take(self) -> np.ndarray:
        """Waits for the oldest replay and returns a copy of its `result`."""
        result, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        return result.numpy().copy()

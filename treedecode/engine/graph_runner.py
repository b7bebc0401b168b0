"""GraphRunner: decode steps as CUDA graphs, one for each size of batch."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from treedecode import ops
from treedecode.cache.page_pool import PagePool
from treedecode.common.arrays import IntArray
from treedecode.engine.branch_table import BranchTable
from treedecode.engine.graph_step import GraphStep, InFlight
from treedecode.engine.scheduler import Batch
from treedecode.models.adapter import ModelAdapter

# Rows of a captured step. A batch takes the next larger one and leaves the rest of its rows idle.
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

S = TypeVar("S", bound=GraphStep)


class DecodeStep(GraphStep):
    """A step of up to `size` rows: each appends the token it sampled last and samples the next.

    Idle rows come last. They are rows of the pool like others, and a length of 0 leaves them unchanged.
    """

    def __init__(self, model: ModelAdapter, pool: PagePool, size: int) -> None:
        super().__init__(model, pool, size, 2 * size)
        self.sampling = {
            "temperature": self.buffer(torch.float32),
            "top_k": self.buffer(torch.int32),
            "top_p": self.buffer(torch.float32),
            "min_p": self.buffer(torch.float32),
            "seed": self.buffer(torch.int64),
        }

    def load(self, batch: Batch, table: BranchTable) -> None:
        """Prepares the next replay: these rows continue from the last token that the table has of each."""
        count = len(batch.rows)
        others = np.setdiff1d(np.arange(self.pool.max_branches), batch.rows)[: self.size - count]
        self.idle(np.concatenate([batch.rows, others]))
        self.q_lens[:count] = 1
        last = table.tokens[batch.rows, table.num_tokens[batch.rows] - 1]
        self.ids[:count].copy_(torch.from_numpy(last.astype(np.int64)))
        for name, values in self.sampling.items():
            values[:count] = getattr(batch.sample, name)

    def _step(self) -> None:
        logits, length = self._forward()
        token, logprob, _ = ops.sample(logits, **self.sampling, position=length.long())
        self.ids.copy_(token.clamp_min(0))
        torch.cat([token, logprob.view(torch.int32), self.pool.status], out=self.result)


class ReplayedBatch:
    """A batch whose steps are replays of a graph.

    Attributes:
        batch: the rows.
        alive: `[n]` bool, rows that are still part of it; results of the others are void.
    """

    def __init__(self, step: DecodeStep, batch: Batch, table: BranchTable) -> None:
        self.batch = batch
        self.alive = np.ones(len(batch.rows), bool)
        self._in_flight = InFlight(step)
        self._size = step.size
        step.load(batch, table)

    @property
    def num_in_flight(self) -> int:
        """Replays whose tokens have not been taken."""
        return len(self._in_flight)

    @property
    def is_full(self) -> bool:
        """True if tokens must be taken before another launch."""
        return self._in_flight.is_full

    def launch(self) -> None:
        """Launches one more step of all rows."""
        self._in_flight.launch()

    def take(self) -> tuple[IntArray, np.ndarray, IntArray]:
        """Waits for the oldest replay in flight.

        Returns:
            tokens `[n]` int32 (-1: nothing could be sampled from the row's logits), log-probabilities `[n]` float32,
            and the page ops' status words.
        """
        size, count = self._size, len(self.alive)
        values = self._in_flight.take()
        return values[:count], values[size : size + count].view(np.float32), values[2 * size :]


class GraphRunner:
    """Captures steps of a model, each when it is first needed, and replays them."""

    def __init__(self, model: ModelAdapter, pool: PagePool, sizes: Sequence[int] = SIZES) -> None:
        self.model, self.pool, self.sizes = model, pool, sizes
        self._steps: dict[Any, GraphStep] = {}
        self._memory: Any = None
        self._stream: Any = None

    def start(self, batch: Batch, table: BranchTable) -> ReplayedBatch:
        """Starts replays for a batch of decoding rows, on the step of its size.

        Raises:
            RuntimeError: the model's forward cannot be captured (it waits for the device, say).
        """
        size = min((size for size in self.sizes if size >= len(batch.rows)), default=len(batch.rows))
        size = min(size, self.pool.max_branches)
        return ReplayedBatch(self.get(size, lambda: DecodeStep(self.model, self.pool, size)), batch, table)

    def get(self, key: Any, make: Callable[[], S]) -> S:
        """Returns the step kept under `key`; makes and captures it if there is none."""
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
        """Forgets all steps, because the model has changed since they were captured."""
        self._steps.clear()


def can_capture(batch: Batch, table: BranchTable) -> bool:
    """True if every step of the batch is the same work: one token per row, sampled from unchanged logits."""
    rows = batch.rows
    return bool(
        batch.decode_only
        and len(batch.sampled) == len(rows)
        and not batch.sample.penalised
        and (table.num_tokens[rows] >= table.min_tokens[rows]).all()
        # until the prompt is wholly in the cache, the prefix index has something to learn
        and (table.num_cached[rows] >= table.prompt_len[rows]).all()
    )

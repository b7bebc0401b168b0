"""Jobs: awaited calls on the engine, and counts of what it has done."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treedecode.common.arrays import IntArray
from treedecode.engine.stops import TextStream

Callback = Callable[[int, int, str], None]


@dataclass
class Stats:
    """What the decoder has done since it was made."""

    num_forwards: int = 0
    num_prefill_tokens: int = 0  # computed several at a time: prompts, given text, recomputation
    num_decode_tokens: int = 0  # computed one per branch and forward
    num_sampled_tokens: int = 0
    num_prefix_tokens: int = 0  # not computed: found in the prefix index
    num_preemptions: int = 0
    busy_seconds: float = 0.0  # in forwards and what goes with each


@dataclass(eq=False)
class Job:
    """One awaited call: the rows it works on, and whom to tell."""

    rows: IntArray
    future: asyncio.Future
    num_live: int
    callback: Callback | None = None
    streams: dict[int, TextStream] = field(default_factory=dict)
    found: dict[int, tuple[Tensor, int]] = field(default_factory=dict)  # row -> (tensor of a forward, its row there)

    def resolve(self) -> None:
        """The work is done; from whichever thread."""
        settle(self.future, self._result())

    def fail(self, error: BaseException | None) -> None:
        """The work ended with an error; None: nobody waits any more."""
        settle(self.future, None, error if error is not None else asyncio.CancelledError())

    def _result(self) -> Tensor | None:
        if not self.found:
            return None
        found = [self.found[int(row)] for row in self.rows]
        if all(values is found[0][0] for values, _ in found):
            values, order = found[0][0], [i for _, i in found]
            if order == list(range(len(values))):
                return values
            return values.index_select(0, torch.tensor(order, device=values.device))
        return torch.stack([values[i] for values, i in found])


def settle(future: asyncio.Future, result: Tensor | None = None, error: BaseException | None = None) -> None:
    """Resolves a future of any event loop, from whichever thread; nothing happens if it is done already."""

    def set_it() -> None:
        if future.done():
            return
        if isinstance(error, asyncio.CancelledError):
            future.cancel()
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    loop = future.get_loop()
    if loop.is_closed():
        return
    try:
        here = asyncio.get_running_loop() is loop
    except RuntimeError:
        here = False
    if here:
        set_it()
    else:
        loop.call_soon_threadsafe(set_it)

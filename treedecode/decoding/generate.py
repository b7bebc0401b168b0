"""Sampling completions of many prompts, also more branches than there are rows for."""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np

from treedecode.cache.page_pool import OutOfBranches
from treedecode.common.arrays import IntArray
from treedecode.decoding.completion import Completion, completions_of
from treedecode.engine.branch_table import child_seeds
from treedecode.engine.engine import Engine
from treedecode.engine.jobs import Callback
from treedecode.engine.sampling import Sampling, root_seed
from treedecode.engine.stops import StopSet


async def generate(
    engine: Engine,
    prompts: list[IntArray],
    *,
    num_branches: int,
    sampling: Sampling,
    max_new_tokens: int,
    stops: StopSet,
    callback: Callback | None,
) -> list[list[Completion]]:
    """Runs `Decoder.generate` on checked prompts, lengths and stops."""
    positions: dict[bytes, list[int]] = {}
    for i, prompt in enumerate(prompts):
        positions.setdefault(prompt.tobytes(), []).extend(range(i * num_branches, (i + 1) * num_branches))
    completions: dict[int, Completion] = {}

    async def complete(rows: IntArray, part: _Part) -> None:
        first = None
        if len(rows) > 1:
            [first] = await engine.logits(rows[:1])
            engine.store.reorder(rows[1:], np.repeat(rows[:1], len(rows) - 1))
        tell = None if callback is None else lambda i, token, text: callback(part.positions[i], token, text)
        await engine.sample(rows, sampling, stops, max_new_tokens, tell, first, fill=True)
        completions.update(zip(part.positions, completions_of(engine, rows), strict=False))

    parts = []
    for of_prompt in positions.values():
        prompt = prompts[of_prompt[0] // num_branches]
        seeds = child_seeds(root_seed(sampling), np.array(len(prompt)), np.arange(len(of_prompt)))
        parts.append(_Part(prompt, of_prompt, seeds))
    await _run_as_rows_allow(engine, parts, complete)
    return [[completions[i * num_branches + j] for j in range(num_branches)] for i in range(len(prompts))]


@dataclass(frozen=True)
class _Part:
    """Branches of one prompt: their positions in the results, and their seeds."""

    prompt: IntArray
    positions: list[int]
    seeds: IntArray

    def after(self, count: int) -> "_Part":
        """The branches without the first `count`."""
        return _Part(self.prompt, self.positions[count:], self.seeds[count:])


async def _run_as_rows_allow(
    engine: Engine, parts: list[_Part], complete: Callable[[IntArray, _Part], Coroutine[Any, Any, None]]
) -> None:
    """Completes parts in order, as many branches at a time as are free; the first error ends all.

    `complete` gets rows for the first branches of a part.
    """
    running: set[asyncio.Future[None]] = set()
    waiting = deque(parts)
    store = engine.store

    def start(rows: IntArray, part: _Part) -> None:
        task = asyncio.ensure_future(complete(rows, part))
        task.add_done_callback(lambda _: store.release(rows))  # also if it is cancelled before it begins
        running.add(task)

    try:
        while waiting or running:
            freed = store.rows_returned()  # asked before the look at what is free: other threads free rows too
            while waiting and len(rows := store.open_available(waiting[0].prompt, waiting[0].seeds)):
                part = waiting.popleft()
                start(rows, part)
                if len(rows) < len(part.positions):
                    waiting.appendleft(part.after(len(rows)))
            if waiting and not running and not store.rows_will_return:
                raise OutOfBranches(
                    f"out of branches: {len(waiting[0].positions)} needed, none free; frontiers, or calls that wait "
                    f"for this one, hold all {engine.pool.max_branches}"
                )
            ended, _ = await asyncio.wait(
                {*running, *([freed] if waiting else ())}, return_when=asyncio.FIRST_COMPLETED
            )
            for future in ended:
                future.result()
            running -= ended
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

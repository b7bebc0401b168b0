"""Completions of prompts: what `Decoder.generate` returns, and how it runs more branches than there are rows for."""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from treedecode.cache.page_pool import OutOfBranches
from treedecode.common.arrays import IntArray
from treedecode.engine.branch_table import Finish, child_seeds
from treedecode.engine.jobs import Callback
from treedecode.engine.sampling import Sampling
from treedecode.engine.stops import StopSet

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder
    from treedecode.engine.engine import Engine


@dataclass(frozen=True)
class Completion:
    """One finished branch.

    Attributes:
        text: the generated text, before the stop string that ended it. Empty without a tokenizer.
        token_ids: all generated tokens, up to and including the one that ended the text (end of sequence, stop token,
            or the last token of a stop string).
        logprobs: per token, nats, under the model's own distribution (before temperature and filters).
        cum_logprob: their sum.
        finish_reason: "stop" (end of sequence, stop token or stop string) or "length".
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    cum_logprob: float
    finish_reason: str


def completions_of(engine: "Engine", rows: IntArray) -> list[Completion]:
    """What the branches `rows` have generated so far."""
    table = engine.table
    found = []
    for row in rows:
        new = slice(int(table.prompt_len[row]), int(table.num_tokens[row]))
        found.append(
            Completion(
                text=engine.text(int(row), cut=True),
                token_ids=table.tokens[row, new].tolist(),
                logprobs=table.logprobs[row, new].tolist(),
                cum_logprob=float(table.cum_logprob[row]),
                finish_reason="stop" if table.finish[row] in (Finish.STOP, Finish.EOS) else "length",
            )
        )
    return found


def root_seed(sampling: Sampling) -> np.ndarray:
    """The seed of a tree: the one asked for, or a fresh one."""
    if sampling.seed is not None:
        return np.array(sampling.seed, np.int64)
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64).numpy()


async def generate(
    decoder: "Decoder",
    prompts: list[IntArray],
    *,
    num_branches: int,
    sampling: Sampling,
    max_new_tokens: int | None,
    stops: StopSet,
    callback: Callback | None,
) -> list[list[Completion]]:
    """`Decoder.generate` on checked prompts and stops."""
    if isinstance(num_branches, bool) or not isinstance(num_branches, int) or num_branches < 1:
        raise ValueError(f"num_branches: expected an int >= 1, got {num_branches!r}")
    limit = decoder.check_length(max(map(len, prompts)), max_new_tokens)
    engine = decoder.engine
    places: dict[bytes, list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(prompt.tobytes(), []).extend(range(i * num_branches, (i + 1) * num_branches))
    results: dict[int, Completion] = {}

    async def complete(rows: IntArray, share: _Share) -> None:
        first = None
        if len(rows) > 1:
            [first] = await engine.logits(rows[:1])
            engine.reorder(rows[1:], np.repeat(rows[:1], len(rows) - 1))
        tell = None if callback is None else lambda i, token, text: callback(share.places[i], token, text)
        await engine.sample(rows, sampling, stops, limit, tell, first)
        results.update(zip(share.places, completions_of(engine, rows), strict=False))

    shares = []
    for where in places.values():
        prompt = prompts[where[0] // num_branches]
        seeds = child_seeds(root_seed(sampling), np.array(len(prompt)), np.arange(len(where)))
        shares.append(_Share(prompt, where, seeds))
    await _in_portions(engine, shares, complete)
    return [[results[i * num_branches + j] for j in range(num_branches)] for i in range(len(prompts))]


@dataclass(frozen=True)
class _Share:
    """Branches of one prompt: their places in the result and their seeds."""

    prompt: IntArray
    places: list[int]
    seeds: IntArray


async def _in_portions(
    engine: "Engine", shares: list[_Share], complete: Callable[[IntArray, _Share], Coroutine[Any, Any, None]]
) -> None:
    """Completes shares in order, as many branches at a time as are free; the first error ends all.

    `complete` gets rows for the first branches of a share.
    """
    running: set[asyncio.Future[None]] = set()
    waiting = deque(shares)

    def start(rows: IntArray, share: _Share) -> None:
        task = asyncio.ensure_future(complete(rows, share))
        task.add_done_callback(lambda _: engine.release(rows))  # also if it is cancelled before it begins
        running.add(task)

    try:
        while waiting or running:
            freed = engine.rows_come_back()  # from before the look at what is free: other threads free rows too
            while waiting and len(rows := engine.open_free(waiting[0].prompt, waiting[0].seeds)):
                share = waiting.popleft()
                start(rows, share)
                if len(rows) < len(share.places):
                    n = len(rows)
                    waiting.appendleft(_Share(share.prompt, share.places[n:], share.seeds[n:]))
            if waiting and not running and not engine.rows_will_come_back:
                raise OutOfBranches(
                    f"out of branches: {len(waiting[0].places)} needed, none free; frontiers, or calls that wait for "
                    f"this one, hold all {engine.pool.max_branches}"
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

"""The branches that searches begin with."""

from typing import TYPE_CHECKING

import numpy as np

from treedecode.common.arrays import IntArray
from treedecode.decoding.frontier import Frontier
from treedecode.decoding.generate import root_seed
from treedecode.engine.branch_table import child_seeds
from treedecode.engine.sampling import Sampling

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder


async def roots(decoder: "Decoder", prompts: list[IntArray], sampling: Sampling, account: int) -> Frontier:
    """`Decoder.roots` on checked prompts."""
    engine = decoder.engine
    seen: dict[bytes, int] = {}
    first = np.array([seen.setdefault(prompt.tobytes(), i) for i, prompt in enumerate(prompts)])
    repeats = np.array([int((first[:i] == first[i]).sum()) for i in range(len(first))])
    seeds = np.array([root_seed(sampling) for _ in prompts])
    seeds = np.where(repeats > 0, child_seeds(seeds, np.array(-1), repeats), seeds)
    unique = np.unique(first)
    rows = np.full(len(prompts), -1, np.int64)
    rows[unique] = engine.open([prompts[i] for i in unique], seeds[unique], account)
    try:
        if account >= 0:
            engine.meter.charge_prompt(account, sum(map(len, prompts)))
        if decoder.recorder.is_recorded(account):
            decoder.recorder.add_prompts(account, rows[unique], [decoder.decode(prompts[i]) for i in unique])
        await engine.prefill(rows[unique])
        again = np.flatnonzero(rows < 0)
        if len(again):
            rows[again] = engine.fork(rows[first[again]], seeds=seeds[again])
    except BaseException:
        engine.release(rows[rows >= 0])
        raise
    return Frontier(decoder, rows, np.arange(len(prompts)), len(prompts), sampling)

"""Opening the branches that searches begin with."""

import numpy as np

from treedecode.common.arrays import IntArray
from treedecode.decoding.codec import Codec
from treedecode.decoding.frontier import Frontier
from treedecode.decoding.recorder import Recorder
from treedecode.engine.branch_table import child_seeds
from treedecode.engine.engine import Engine
from treedecode.engine.sampling import Sampling, root_seed


async def open_roots(
    engine: Engine, codec: Codec, recorder: Recorder, prompts: list[IntArray], sampling: Sampling, account: int
) -> Frontier:
    """Runs `Decoder.roots` on checked prompts. Equal prompts are computed once and forked."""
    store = engine.store
    by_prompt: dict[bytes, int] = {}
    first = np.array([by_prompt.setdefault(prompt.tobytes(), i) for i, prompt in enumerate(prompts)])
    repeats = np.array([int((first[:i] == first[i]).sum()) for i in range(len(first))])
    seeds = np.array([root_seed(sampling) for _ in prompts])
    seeds = np.where(repeats > 0, child_seeds(seeds, np.array(-1), repeats), seeds)
    unique = np.unique(first)
    rows = np.full(len(prompts), -1, np.int64)
    rows[unique] = store.open([prompts[i] for i in unique], seeds[unique], account)
    try:
        if account >= 0:
            engine.meter.charge_prompt(account, sum(map(len, prompts)))
        if recorder.is_recorded(account):
            recorder.add_prompts(account, rows[unique], [codec.decode(prompts[i]) for i in unique])
        await engine.prefill(rows[unique])
        repeated = np.flatnonzero(rows < 0)
        if len(repeated):
            rows[repeated] = store.fork(rows[first[repeated]], seeds=seeds[repeated])
    except BaseException:
        store.release(rows[rows >= 0])
        raise
    return Frontier(engine, codec, recorder, rows, np.arange(len(prompts)), len(prompts), sampling)

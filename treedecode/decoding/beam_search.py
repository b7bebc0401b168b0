"""Beam search on a decoder's pages: runs `Beams` on the logits of the engine's shared forwards."""

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treedecode.common.validation import integer
from treedecode.decoding.beam_graph_step import run_graph_steps
from treedecode.decoding.beams import Beams, BeamSearch, Hypothesis
from treedecode.decoding.completion import Completion
from treedecode.engine.engine import Engine
from treedecode.engine.stops import StopMatcher, StopSet

# (prompt [n] int64, tokens [n, length] int32) -> [n] bool: whether generated tokens, the new one last, are at an end
Stop = Callable[[np.ndarray, np.ndarray], np.ndarray]


async def complete(
    engine: Engine,
    prompts: Sequence[np.ndarray],
    stops: StopSet,
    *,
    num_return_sequences: int | None = None,
    repetition_penalty: float = 1.0,
    ignore_eos: bool = False,
    **options: Any,
) -> list[list[Completion]]:
    """Runs `Decoder.beam_search` on checked prompts and stops; `options` are those of `BeamSearch`."""
    ends = (*(() if ignore_eos else engine.model.eos_token_ids), *stops.token_ids)
    options = {"num_beams": 4, "max_new_tokens": 256} | options
    settings = BeamSearch(eos_token_ids=tuple(dict.fromkeys(ends)), **options)
    count = settings.num_beams if num_return_sequences is None else num_return_sequences
    integer("num_return_sequences", count)
    if not 1 <= count <= settings.num_beams:
        raise ValueError(f"num_return_sequences: expected 1 to num_beams = {settings.num_beams}, got {count}")
    if not (isinstance(repetition_penalty, (int, float)) and 0 < repetition_penalty < math.inf):
        raise ValueError(f"repetition_penalty: expected a finite number > 0, got {repetition_penalty!r}")
    matcher = engine.matcher
    stop_id = matcher.register(stops)
    asked = _stop_string(matcher, stop_id, settings.min_new_tokens, prompts) if stops.strings else None
    results = await search(engine, prompts, settings, repetition_penalty=repetition_penalty, stop=asked)

    def completion(index: int, hypothesis: Hypothesis) -> Completion:
        prompt, tokens = prompts[index], hypothesis.token_ids
        at_string = asked is not None and bool(asked(np.array([index]), tokens[None])[0])
        return Completion(
            text=matcher.text(stop_id, np.concatenate([prompt, tokens]), len(prompt), cut=at_string),
            token_ids=tokens.tolist(),
            logprobs=hypothesis.logprobs.tolist(),
            cum_logprob=float(hypothesis.logprobs.sum()),
            finish_reason="stop" if at_string or int(tokens[-1]) in settings.eos_token_ids else "length",
        )

    return [[completion(i, hypothesis) for hypothesis in hypotheses[:count]] for i, hypotheses in enumerate(results)]


def _stop_string(matcher: StopMatcher, stop_id: int, min_new_tokens: int, prompts: Sequence[np.ndarray]) -> Stop:
    possible = matcher.mask(stop_id)

    def stop(prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        hits = possible[tokens[:, -1]] & (tokens.shape[1] >= min_new_tokens)
        for i in np.flatnonzero(hits):
            context = prompts[int(prompt[i])]
            hits[i] = matcher.stopped(stop_id, np.concatenate([context, tokens[i]]), len(context))
        return hits

    return stop


async def search(
    engine: Engine,
    prompts: Sequence[np.ndarray],
    settings: BeamSearch,
    *,
    repetition_penalty: float = 1.0,
    stop: Stop | None = None,
) -> list[list[Hypothesis]]:
    """Searches all prompts in lock step, as many at once as there are branches for; one forward a step.

    A beam is a branch: prompts are computed once, beams of a prompt share its pages, and reordering them moves page
    ids. All branches come back when it ends, in whichever way.

    Args:
        engine: of the decoder to search on.
        prompts: token ids of each prompt, int32.
        repetition_penalty: multiplies the log-probs of tokens already in the branch, prompt included.
        stop: finishes further beams, beside `settings.eos_token_ids`.

    Returns:
        for each prompt its `settings.num_beams` finished beams, best first.

    Raises:
        ValueError: the beams of a prompt are more than the decoder's branches, or would be longer than it can hold, or
            `length_penalty` is so negative that no beam of a prompt is kept.
        OutOfBranches: other work holds the branches.
    """
    max_branches = engine.pool.max_branches
    size = max_branches // settings.num_beams
    if size == 0:
        raise ValueError(f"num_beams: expected at most the decoder's {max_branches} branches, got {settings.num_beams}")
    longest = max(len(prompt) for prompt in prompts) + settings.max_new_tokens - 1  # the last token is never computed
    if longest > engine.table.max_tokens:
        raise ValueError(
            f"max_new_tokens: the longest prompt and {settings.max_new_tokens} new tokens are {longest + 1} tokens, "
            f"but model and pages hold {engine.table.max_tokens + 1}"
        )
    results: list[list[Hypothesis]] = []
    for begin in range(0, len(prompts), size):
        part = prompts[begin : begin + size]
        asked = None if stop is None else lambda prompt, tokens, begin=begin: stop(prompt + begin, tokens)
        results += await _search(engine, part, settings, repetition_penalty, asked)
    if any(len(hypotheses) == 0 for hypotheses in results):
        # A finished beam below the score of a free entry is not kept. Transformers gives out a running beam then.
        raise ValueError(
            f"length_penalty: {settings.length_penalty} takes the scores of finished beams below -1e9, where beams are "
            "not told apart any more"
        )
    return results


async def _search(
    engine: Engine,
    prompts: Sequence[np.ndarray],
    settings: BeamSearch,
    repetition_penalty: float,
    stop: Stop | None,
) -> list[list[Hypothesis]]:
    beams = Beams(settings, len(prompts), device=engine.pool.device)
    rows = engine.store.open(prompts, np.zeros(len(prompts), np.int64))
    engine.num_beam_searches += 1
    try:
        tokens = None
        may_run_ahead = engine.runner.graphs is not None and stop is None and repetition_penalty == 1.0
        while True:
            step = None
            if may_run_ahead and tokens is not None and beams.is_steady:
                step = run_graph_steps(engine, beams, rows, tokens)
                await asyncio.sleep(0)
            if step is None:
                logits = await engine.logits(rows, tokens)
                if repetition_penalty != 1.0:
                    logits = _penalise(logits, engine, rows, repetition_penalty)
                step = beams.step(
                    logits,
                    is_logprobs=repetition_penalty != 1.0,
                    stop=None if stop is None else _asks(engine, rows, beams, stop),
                )
            rows = _move(engine, rows, step.parent.numpy(force=True), step.row.numpy(force=True))
            tokens = step.token.numpy(force=True)
            if beams.num_rows == 0:
                return [beams.results(group) for group in range(len(prompts))]
    finally:
        engine.num_beam_searches -= 1
        engine.store.release(rows)


def _move(engine: Engine, rows: np.ndarray, parent: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Moves branches to the rows of the next beams, and releases rows that no beam takes.

    On an error `rows` is what the caller still has to release.
    """
    fresh = place < 0
    new = np.where(fresh, -1, rows[place])
    if fresh.any():  # the first step: all parents are prompts, which stay where they are
        new[fresh] = engine.store.fork(rows[parent[fresh]])
    try:
        moved = ~fresh & (new != rows[parent])
        engine.store.reorder(new[moved], rows[parent[moved]])
        engine.store.release(np.setdiff1d(rows, new))
    except BaseException:
        engine.store.release(new[fresh])
        raise
    return new


def _penalise(logits: Tensor, engine: Engine, rows: np.ndarray, penalty: float) -> Tensor:
    """Returns log-probs in fp32, those of tokens already in each row times `penalty` (1909.05858, on log-probs)."""
    lens = engine.table.num_tokens[rows]
    seen = engine.table.tokens[rows, : int(lens.max())].astype(np.int64)
    seen = np.where(np.arange(seen.shape[1]) < lens[:, None], seen, seen[:, :1])  # padded with a token that is there
    seen_ids = torch.from_numpy(seen).to(logits.device)
    logprobs = logits.float().log_softmax(dim=-1)
    # log-probs are never positive, so there is nothing to divide
    return logprobs.scatter(1, seen_ids, logprobs.gather(1, seen_ids) * penalty)


def _asks(engine: Engine, rows: np.ndarray, beams: Beams, stop: Stop) -> Callable[[Tensor, Tensor], Tensor]:
    def ask(parent: Tensor, token: Tensor) -> Tensor:
        parents, tokens, table = parent.numpy(force=True), token.numpy(force=True), engine.table
        hits = np.zeros(parents.shape, bool)
        group, rank = np.nonzero(parents >= 0)
        beam = rows[parents[group, rank]]
        past = table.num_tokens[beam][:, None] - np.arange(beams.num_steps, 0, -1)
        texts = np.concatenate([table.tokens[beam[:, None], past], tokens[group, rank][:, None]], axis=1)
        hits[group, rank] = stop(beams.groups[group], texts)
        return torch.from_numpy(hits).to(parent.device)

    return ask

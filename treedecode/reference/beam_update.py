"""Reference of beam_update."""

import math

import torch
from torch import Tensor

_BANNED = -1e9


def _float32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32))


def beam_update(
    scores: Tensor,
    parent: Tensor,
    token: Tensor,
    row_indptr: Tensor,
    beam_indptr: Tensor,
    pool_scores: Tensor,
    pool_lens: Tensor,
    pool_parents: Tensor,
    pool_tokens: Tensor,
    done: Tensor,
    *,
    gen_lens: Tensor,
    max_new_tokens: Tensor,
    eos_ids: Tensor,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    stop: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `treedecode.ops.beam_update`."""
    running_scores = torch.full_like(pool_scores, -math.inf)
    running_parent = torch.empty_like(pool_parents)
    running_token = torch.zeros_like(pool_tokens)
    eos = set(eos_ids.tolist())
    for g in range(scores.shape[0]):
        first_row, end_row = row_indptr[g : g + 2].tolist()
        beams = slice(*beam_indptr[g : g + 2].tolist())
        num_beams = beams.stop - beams.start
        if done[g]:
            rows = range(first_row, first_row + num_beams)
            running_parent[beams] = torch.tensor([row if row < end_row else first_row for row in rows])
            continue
        length = int(gen_lens[g]) + 1
        last_step = length >= int(max_new_tokens[g])

        candidates = []  # (score, row, token, hit)
        for rank in range(max(2, 1 + len(eos_ids)) * num_beams):
            row, tok = int(parent[g, rank]), int(token[g, rank])
            if row >= 0:
                stopped = stop is not None and bool(stop[g, rank])
                candidates.append((float(scores[g, rank]), row, tok, last_step or stopped or tok in eos))

        # Python's sort is stable: equal scores keep the order of the candidates, and old beams go before new ones.
        running = [(_float32(score + hit * _BANNED), row, tok) for score, row, tok, hit in candidates]
        running.sort(key=lambda beam: -beam[0])
        running = running[:num_beams] + [(-math.inf, first_row, 0)] * (num_beams - len(running))
        for i, (score, row, tok) in enumerate(running):
            running_scores[beams.start + i] = score
            running_parent[beams.start + i] = row
            running_token[beams.start + i] = tok

        columns = (pool_scores, pool_lens, pool_parents, pool_tokens)
        pool = list(zip(*(column[beams].tolist() for column in columns), strict=True))
        for score, row, tok, hit in candidates[:num_beams]:
            if hit:
                pool.append((score / length**length_penalty, length, row - first_row, tok))
        pool.sort(key=lambda beam: -beam[0])
        for column, values in zip(columns, zip(*pool[:num_beams], strict=True), strict=True):
            column[beams] = torch.tensor(values, dtype=column.dtype)

        full = bool((pool_lens[beams] > 0).all())
        by_max_len = early_stopping == "never" and length_penalty > 0
        best = running[0][0] / (int(max_new_tokens[g]) if by_max_len else length) ** length_penalty
        worst = pool[num_beams - 1][0] if full else _BANNED
        nothing_open = all(hit for *_, hit in candidates)
        done[g] = nothing_open or (full and early_stopping is True) or not best > worst
    return running_scores, running_parent, running_token

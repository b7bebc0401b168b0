"""Arguments of one step of beam search, for the tests of beam_update."""

import torch

POOL = ("pool_scores", "pool_lens", "pool_parents", "pool_tokens")


def i32(values):
    return torch.tensor(values, dtype=torch.int32)


def make_args(num_beams, candidates, *, eos=(), gen_len=0, max_new_tokens=100, pool=(), rows=None, **settings):
    """Makes arguments of `ops.beam_update` for one group.

    Candidates are (score, row, token), entries of the pool (score, len, parent, token).
    """
    pool = list(pool) + [(-1e9, 0, 0, 0)] * (num_beams - len(pool))
    scores, parent, token = zip(*candidates, strict=True)
    columns = list(zip(*pool, strict=True))
    return {
        "scores": torch.tensor([scores]),
        "parent": i32([parent]),
        "token": i32([token]),
        "row_indptr": i32([0, rows or num_beams]),
        "beam_indptr": i32([0, num_beams]),
        "pool_scores": torch.tensor(columns[0]),
        **{name: i32(column) for name, column in zip(POOL[1:], columns[1:], strict=True)},
        "done": torch.tensor([False]),
        "gen_lens": i32([gen_len]),
        "max_new_tokens": i32([max_new_tokens]),
        "eos_ids": i32(list(eos)),
        **settings,
    }

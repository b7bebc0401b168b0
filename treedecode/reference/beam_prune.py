"""Reference of beam_prune."""

import math

import torch
from torch import Tensor

from treedecode.reference.sample import allowed


def beam_prune(
    logits: Tensor,
    cum_logprobs: Tensor,
    group_indptr: Tensor,
    num_candidates: int,
    *,
    token_mask: Tensor | None = None,
    is_logprobs: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `treedecode.ops.beam_prune`; returns scores and lse in float64."""
    x = logits.double()
    for row in range(x.shape[0]):
        if not (x[row] < math.inf).all():
            raise ValueError(f"logits: expected numbers below +inf, got NaN or +inf in row {row}")
        if not cum_logprobs[row] < math.inf:
            raise ValueError(f"cum_logprobs: expected numbers below +inf, got {float(cum_logprobs[row])} in row {row}")
    lse = torch.zeros(x.shape[0], dtype=torch.float64) if is_logprobs else x.logsumexp(1)
    score = torch.where(x == -math.inf, -math.inf, cum_logprobs.double()[:, None] + (x - lse[:, None]))
    if token_mask is not None:
        score = score.masked_fill(~allowed(token_mask, x.shape[1]), -math.inf)
    num_groups, vocab = len(group_indptr) - 1, x.shape[1]
    scores = torch.full((num_groups, num_candidates), -math.inf, dtype=torch.float64)
    parent = torch.full((num_groups, num_candidates), -1, dtype=torch.int32)
    token = torch.full((num_groups, num_candidates), -1, dtype=torch.int32)
    for group in range(num_groups):
        first, last = int(group_indptr[group]), int(group_indptr[group + 1])
        flat = score[first:last].flatten()
        order = torch.sort(flat, descending=True, stable=True).indices  # stable: row, then token ascending
        order = order[flat[order] > -math.inf][:num_candidates]
        n = len(order)
        scores[group, :n] = flat[order]
        parent[group, :n] = (first + order // vocab).int()
        token[group, :n] = (order % vocab).int()
    return scores, parent, token, lse

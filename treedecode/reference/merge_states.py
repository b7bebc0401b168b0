"""Reference of merge_states."""

from itertools import pairwise

import torch
from torch import Tensor


def merge_states(part_out: Tensor, part_lse: Tensor, merge_indptr: Tensor) -> tuple[Tensor, Tensor]:
    """See `treedecode.ops.merge_states`; returns float64."""
    num_states = merge_indptr.numel() - 1
    out = torch.zeros(num_states, *part_out.shape[1:], dtype=torch.float64)
    lse = torch.full((num_states, part_out.shape[1]), -torch.inf, dtype=torch.float64)
    for i, (begin, end) in enumerate(pairwise(merge_indptr.tolist())):
        for head in range(part_out.shape[1]):
            parts = [p for p in range(begin, end) if part_lse[p, head] > -torch.inf]
            if not parts:
                continue
            lse[i, head] = part_lse[parts, head].double().logsumexp(0)
            for p in parts:
                out[i, head] += (part_lse[p, head].double() - lse[i, head]).exp() * part_out[p, head].double()
    return out, lse

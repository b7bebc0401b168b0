"""Reference of tree_attention, which reads the pages of each branch without a tree."""

from typing import Protocol

import torch
from torch import Tensor


class HasQIndptr(Protocol):
    """The part of a plan that the reference uses."""

    @property
    def q_indptr(self) -> Tensor:
        """`[num_branches + 1]` int32, offsets of each branch's query tokens."""


def tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    plan: HasQIndptr,
    *,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `treedecode.ops.tree_attention`; returns float64. It computes each branch by itself, from its pages."""
    num_q, num_qo_heads, head_dim = q.shape
    page_size, num_kv_heads = k_pages.shape[1:3]
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    out = torch.zeros(num_q, num_qo_heads, head_dim, dtype=torch.float64)
    lse = torch.full((num_q, num_qo_heads), -torch.inf, dtype=torch.float64)
    q_indptr = plan.q_indptr.tolist()
    if sinks is not None:
        lse[: q_indptr[-1]] = sinks.double()
    for row, seq_len in enumerate(seq_lens.tolist()):
        q_begin, q_end = q_indptr[row], q_indptr[row + 1]
        if seq_len == 0 or q_begin == q_end:
            continue
        pages = page_table[row, : -(-seq_len // page_size)].long()
        k = k_pages[pages].flatten(0, 1)[:seq_len].double()  # [seq_len, num_kv_heads, head_dim]
        v = v_pages[pages].flatten(0, 1)[:seq_len].double()
        queries = q[q_begin:q_end].double().unflatten(1, (num_kv_heads, -1))  # [q_len, num_kv_heads, group, head_dim]
        score = torch.einsum("thgd,jhd->thgj", queries, k) * scale
        if logits_soft_cap > 0:
            score = logits_soft_cap * torch.tanh(score / logits_soft_cap)
        key = torch.arange(seq_len)
        position = seq_len - (q_end - q_begin) + torch.arange(q_end - q_begin)[:, None]
        masked = key > position
        if window_left >= 0:
            masked |= key < position - window_left
        score = score.masked_fill(masked[:, None, None, :], -torch.inf).flatten(1, 2)  # [q_len, num_qo_heads, seq_len]
        row_lse = torch.logaddexp(score.logsumexp(-1), lse[q_begin:q_end])
        weight = torch.where(row_lse.isneginf()[..., None], 0.0, (score - row_lse[..., None]).exp())
        weight = weight.unflatten(1, (num_kv_heads, -1))
        out[q_begin:q_end] = torch.einsum("thgj,jhd->thgd", weight, v).flatten(1, 2)
        lse[q_begin:q_end] = row_lse
    return out, lse

"""tree_attention: attention of many branches to the pages of a tree; each shared page is read once."""

import math

import torch
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call, register_fake
from treedecode.ops.plan_tree import TreePlan


def tree_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    plan: TreePlan,
    *,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = True,
    checks_plan: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Computes attention from every branch's newest tokens to all of the branch's tokens in the paged cache.

    Query token t (0-based) of branch b is at position `seq_lens[b] - q_len(b) + t` and sees the keys at or before its
    position. Each chunk of pages in `plan` is read once for all the branches below it, and sums are fp32. On the CPU
    the result of a query depends, to the last bit, only on itself and the keys and values that it sees: not on the
    other queries of the branch, the other branches, the sharing, or the number of threads.

    Args:
        q: `[num_q, num_qo_heads, head_dim]`, fp32, bf16 or fp16, the branches' query tokens in row order; unit stride
            in the last dimension, head_dim a multiple of 8 up to 256. Tokens beyond those of the plan belong to no
            branch: they see no key and no sink.
        k_pages, v_pages: `[num_pages, page_size, num_kv_heads, head_dim]`, dtype of q, any strides with unit head_dim
            stride; num_qo_heads is a multiple of num_kv_heads.
        page_table: `[num_branches, max_pages]` int32, unit stride in the last dimension.
        seq_lens: `[num_branches]` int32, tokens in the cache including the query tokens.
        plan: made by `plan_tree` for this page_table, seq_lens and the step's q_lens.
        sm_scale: factor of q k^T, positive; 1 / sqrt(head_dim) by default.
        window_left: a query also does not see keys more than this many tokens before it; -1 = no limit. Pages that no
            window reaches are not read, so an engine may put any page in their place.
        logits_soft_cap: cap * tanh(score / cap) replaces the scaled score; 0 = off.
        sinks: `[num_qo_heads]` fp32, logits that join each head's denominator without a value.
        out, lse: where the results go, contiguous, and apart from all other arguments; by default new tensors.
        return_lse: False = `lse` is not computed, and None is returned for it, unless it is given.
        checks_plan: False = the plan and its pages are not compared with the other arguments, because a call with the
            same plan, page_table, seq_lens and as many pages has done that (another layer's). A plan of another batch
            reads out of bounds then. On a GPU, where nothing can be compared, it changes nothing.

    Returns:
        out: `[num_q, num_qo_heads, head_dim]` in q's dtype, 0 where a query sees no key.
        lse: `[num_q, num_qo_heads]` fp32, natural log of the sum of exp(score), sinks included; -inf for an empty sum.

    Raises:
        ValueError: an argument's shape, stride or value is wrong, the plan is of another batch (other lengths, page
            size or shared pages), or a page id is out of range. On a GPU the host does not read values: `out` and `lse`
            are NaN where a page id is out of range, and everywhere when the plan is not flat or is for more query
            tokens or another page size.
        TypeError: an argument's dtype is wrong.

    Sources: online softmax, https://arxiv.org/abs/1805.02867; merging by lse, https://arxiv.org/abs/2501.01005.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
    if out is None:
        out = q.new_empty(q.shape)
    if lse is None and return_lse:
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    if USE_REFERENCE:
        exact_out, exact_lse = reference.tree_attention(
            q, k_pages, v_pages, page_table, seq_lens, plan, sm_scale=scale, window_left=window_left,
            logits_soft_cap=logits_soft_cap, sinks=sinks,
        )  # fmt: skip
        out.copy_(exact_out)
        if lse is not None:
            lse.copy_(exact_lse)
        return out, lse
    call(
        torch.ops.treedecode.tree_attention.default,
        q, k_pages, v_pages, page_table, seq_lens, *plan.tensors, out, lse, scale, window_left,
        logits_soft_cap, sinks, checks_plan,
    )  # fmt: skip
    return out, lse


@register_fake("tree_attention")
def _(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    q_indptr: Tensor,
    part_indptr: Tensor,
    chunks: Tensor,
    counts: Tensor,
    order: Tensor,
    row_indptr: Tensor,
    out: Tensor,
    lse: Tensor | None,
    sm_scale: float,
    window_left: int,
    logits_soft_cap: float,
    sinks: Tensor | None,
    checks_plan: bool,
) -> None:
    return None

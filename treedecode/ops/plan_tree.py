"""plan_tree: which branches share which pages, cut at segment borders; made once per step, used by every layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call, register_fake

SEGMENT = 1024  # tokens; kSegment of csrc/cpu/plan_tree.h


@dataclass(frozen=True)
class TreePlan:
    """How `tree_attention` reads the page table of one step. All tensors are int32.

    A branch's *path* is the list of its chunks from the root of its tree to its own last tokens, in token order. No
    chunk crosses a multiple of 1024 tokens, the borders of *segments*. Query token t (0-based) of the branch attends to
    a segment's chunks one after the other, each going on with the sums of the one before; the partial results of its
    segments are merged.

    Attributes:
        q_indptr: `[num_branches + 1]`, offsets of each branch's query tokens.
        part_indptr: `[num_branches + 1]`, offsets of each branch's partial results: query token t of branch b has
            them in the slots `part_indptr[b] + t * num_parts(b) + i`, i counting segments. A branch with no tokens or
            no queries has none.
        chunks: `[max_chunks, 6]`, rows of row_begin, row_end, token_begin, token_end, segment, round. All branches in
            `[row_begin, row_end)` hold the same pages for the tokens `[token_begin, token_end)`; a branch may end
            before token_end, but not before or at token_begin. A chunk of round r > 0 goes on from one of round r - 1.
            Sorted by round, the most expensive of a round first.
        counts: `[5]`, num_chunks (rows of `chunks` beyond it are undefined), num_parts, unique_tokens (read once each),
            path_tokens (what the branches that have queries would read each for itself), page_size.
    """

    q_indptr: Tensor
    part_indptr: Tensor
    chunks: Tensor
    counts: Tensor


def plan_tree(
    page_table: Tensor,
    seq_lens: Tensor,
    q_lens: Tensor | None = None,
    *,
    page_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> TreePlan:
    """Finds the tree in a page table and cuts it at segment borders.

    Neighbouring rows share a page when all page ids up to it are equal and both have tokens there: the tree is that of
    the longest common prefixes of adjacent rows, of any depth, with any number of roots. Rows in any order are
    correct; rows in depth-first order share best. Page ids are all that counts: table entries beyond a branch's
    seq_len are never compared.

    In units of one packed row (a query token's query head of one kv head) attending to one token, reading a token's K
    and V is taken to cost 16, and a packed row's partial result 32. So a node of n tokens with c children goes to the
    children, who then read it c times, where 16 * (c - 1) * n <= 32 * (packed rows that would go on from it).

    Neither sharing nor folding changes a branch's result: it is the same, to the last bit, as for the branch alone.
    For that, neighbours that share an odd number of tokens share one page less.

    The plan depends on the arguments alone, never on the number of threads.

    Args:
        page_table: `[num_branches, max_pages]` int32, any row stride.
        seq_lens: `[num_branches]` int32, tokens in the cache including this step's; 0 for an empty branch.
        q_lens: `[num_branches]` int32, how many of a branch's last tokens are queries; 1 each by default. 0 leaves a
            branch out of this step.
        page_size: tokens in a page.
        num_qo_heads, num_kv_heads, head_dim: of the attention that will use the plan.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or stride is wrong, a seq_len is negative or beyond
            max_pages * page_size, a q_len is negative or more than the branch's seq_len, or a count exceeds int32.
    """
    args = (page_table, seq_lens, q_lens, page_size, num_qo_heads, num_kv_heads, head_dim)
    if USE_REFERENCE:
        return TreePlan(*reference.plan_tree(*args))
    return TreePlan(*call(torch.ops.treedecode.plan_tree.default, *args))


@register_fake("plan_tree")
def _(
    page_table: Tensor,
    seq_lens: Tensor,
    q_lens: Tensor | None,
    page_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, max_pages = page_table.shape
    max_chunks = torch.sym_max(0, 2 * num_rows - 1) + num_rows * (max_pages * page_size // SEGMENT)
    return (
        seq_lens.new_empty(num_rows + 1),
        seq_lens.new_empty(num_rows + 1),
        seq_lens.new_empty(max_chunks, 6),
        seq_lens.new_empty(5),
    )

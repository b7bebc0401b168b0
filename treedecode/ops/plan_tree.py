"""plan_tree: which branches share which pages, cut into chunks of work; made once per step, used by every layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call

_MIN_CHUNK_TOKENS = 128  # kMinChunkTokens of csrc/cpu/plan_tree.h


@dataclass(frozen=True)
class TreePlan:
    """How `tree_attention` reads the page table of one step. All tensors are int32.

    A branch's *path* is the list of its chunks from the root of its tree to its own last tokens, in token order. Its
    query token t (0-based) attends to each of the chunks separately and the partial results are merged.

    Attributes:
        q_indptr: `[num_branches + 1]`, offsets of each branch's query tokens.
        part_indptr: `[num_branches + 1]`, offsets of each branch's partial results: query token t of branch b has
            them in the slots `part_indptr[b] + t * num_parts(b) + i`, i counting the chunks of its path. A branch with
            no tokens or no queries has none.
        chunks: `[max_chunks, 6]`, rows of row_begin, row_end, token_begin, token_end, path_ordinal, 0. All branches
            in `[row_begin, row_end)` hold the same pages for the tokens `[token_begin, token_end)`; token_begin is a
            multiple of page_size, and a branch may end before token_end, but not before or at token_begin. It is the
            chunk number path_ordinal on the path of each of them. The most expensive come first.
        counts: `[4]`, num_chunks (rows of `chunks` beyond it are undefined), num_parts, unique_tokens (read once each),
            path_tokens (what the branches that have queries would read each for itself).
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
    """Finds the tree in a page table and cuts it into chunks of comparable cost.

    Neighbouring rows share a page when all page ids up to it are equal and both have tokens there: the tree is that of
    the longest common prefixes of adjacent rows, of any depth, with any number of roots. Rows in any order are
    correct; rows in depth-first order share best. Page ids are all that counts: table entries beyond a branch's
    seq_len are never compared.

    In units of one packed row (a query token's query head of one kv head) attending to one token, reading a token's K
    and V is taken to cost 16, and a packed row's partial result 32. From that follow

    * folding: a node of n tokens with c children goes to the children, who then read it c times, where
      16 * (c - 1) * n <= 32 * (packed rows that would have another partial to merge);
    * chunk length: 1/128 of the cost of the whole step per chunk and kv head, but 128 to 2048 tokens (or one page), and
      not so short that partials cost more than a sixteenth of it.

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


@torch.library.register_fake("treedecode::plan_tree")
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
    num_pages = num_rows * max_pages
    max_chunks = torch.sym_min(
        num_pages, torch.sym_max(0, 2 * num_rows - 1) + num_pages * page_size // _MIN_CHUNK_TOKENS
    )
    return (
        seq_lens.new_empty(num_rows + 1),
        seq_lens.new_empty(num_rows + 1),
        seq_lens.new_empty(max_chunks, 6),
        seq_lens.new_empty(4),
    )

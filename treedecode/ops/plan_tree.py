"""plan_tree: finds the pages that branches share, and cuts them into chunks; once per step, for all layers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call, register_fake
from treedecode.reference.plan_tree import ChainedChunk, FlatChunk, PlanCounts

# As in csrc/cpu/plan_tree.h, which explains them.
SEGMENT = 1024
TILES_PER_WORKER = 4

_COUNTS = PlanCounts(*range(len(PlanCounts._fields)))  # position of each number in `counts`


PlanTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, repr=False)
class TreePlan:
    """A plan for `tree_attention` over the page table of one step. All tensors are int32.

    Rows are the branches in the plan's order, in which branches that share pages are neighbours.

    A branch's *path* is the list of its chunks from the root of its tree to its own last tokens, in token order. A
    *chained* plan is for the CPU: no chunk crosses a multiple of 1024 tokens, the borders of *segments*; a query token
    attends to a segment's chunks one after the other, each continuing the sums of the one before, and a segment is
    one partial result. A *flat* plan is for a GPU: chunks are cut by cost and computed independently, and each is a
    partial result. Partial results are merged in the order of the path.

    Attributes:
        q_indptr: `[num_branches + 1]`, offsets of each branch's query tokens.
        part_indptr: `[num_branches + 1]`, offsets of each branch's partial results: query token t (0-based) of branch b
            has them in the slots `part_indptr[b] + t * num_parts(b) + i`, i counting along the path. A branch without
            tokens or without queries has none.
        chunks: `[max_chunks, 6]`, each of row_begin, row_end, token_begin, token_end and two more (`named_chunks` gives
            them names). All branches of the rows `[row_begin, row_end)` hold the same pages for the tokens
            `[token_begin, token_end)`; a branch may end before token_end, and in a flat plan with pages of more than 64
            tokens before token_begin.
            Chained: segment, round. A chunk of round r > 0 continues one of round r - 1. Sorted by round, the most
            expensive of a round first. Borders are even, because pairs of bf16 keys are added at once.
            Flat: part, tile_begin. part is the index of the partial result on the path, tile_begin the number of
            work tiles (of at most 128 packed rows) of all chunks before. Sorted by cost, roughly.
        counts: `[6]`, the numbers of PlanCounts. Properties return them as tensors `[]`, without waiting for a GPU.
        order: `[num_branches]`, the branch of each row.
        row_indptr: `[num_branches + 1]`, offsets of each row's query tokens, in the order of rows.
    """

    q_indptr: Tensor
    part_indptr: Tensor
    chunks: Tensor
    counts: Tensor
    order: Tensor
    row_indptr: Tensor

    @property
    def tensors(self) -> PlanTensors:
        """All tensors of the plan, in the order in which ops take them."""
        return self.q_indptr, self.part_indptr, self.chunks, self.counts, self.order, self.row_indptr

    @property
    def num_chunks(self) -> Tensor:
        """Number of defined rows of `chunks`; -1 where counts do not fit (on a GPU)."""
        return self.counts[_COUNTS.num_chunks]

    @property
    def num_parts(self) -> Tensor:
        """Number of partial results of all query tokens."""
        return self.counts[_COUNTS.num_parts]

    @property
    def unique_tokens(self) -> Tensor:
        """Number of tokens of all chunks, which are read once each."""
        return self.counts[_COUNTS.unique_tokens]

    @property
    def path_tokens(self) -> Tensor:
        """Number of tokens that the branches with queries would read without sharing."""
        return self.counts[_COUNTS.path_tokens]

    @property
    def page_size(self) -> Tensor:
        """Tokens of a page."""
        return self.counts[_COUNTS.page_size]

    @property
    def num_tiles(self) -> Tensor:
        """Number of work tiles of a flat plan; 0 in a chained one."""
        return self.counts[_COUNTS.num_tiles]

    def named_chunks(self) -> list[ChainedChunk] | list[FlatChunk]:
        """Returns the defined rows of `chunks` as named tuples; on a GPU this waits for the plan."""
        counts = PlanCounts(*self.counts.tolist())
        chunks = self.chunks[: max(0, counts.num_chunks)].tolist()
        if counts.num_tiles:
            return [FlatChunk(*chunk) for chunk in chunks]
        return [ChainedChunk(*chunk) for chunk in chunks]

    def __repr__(self) -> str:
        """Shows the defined part of the plan; on a GPU this waits for it."""
        if self.counts.is_meta or type(self.counts) is not Tensor:  # no values: on the meta device, or while tracing
            return f"TreePlan(num_branches={self.q_indptr.shape[0] - 1}, max_chunks={self.chunks.shape[0]})"
        counts = PlanCounts(*self.counts.tolist())
        numbers = ", ".join(f"{name}={value}" for name, value in counts._asdict().items())
        chunks = self.chunks[: max(0, counts.num_chunks)]
        rows = f"order={self.order}, row_indptr={self.row_indptr}"
        return f"TreePlan({numbers}, q_indptr={self.q_indptr}, part_indptr={self.part_indptr}, {rows}, chunks={chunks})"


def plan_tree(
    page_table: Tensor,
    seq_lens: Tensor,
    q_lens: Tensor | None = None,
    *,
    page_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_workers: int | None = None,
) -> TreePlan:
    """Finds the tree in a page table and cuts it into chunks.

    Branches share a page when all page ids up to it are equal and both have tokens there, in whatever order they come:
    the tree is that of their longest common prefixes, of any depth, with any number of roots. Only page ids are
    compared, and no table entries beyond a branch's seq_len. The plan's order makes branches that share pages
    neighbours. It is that of their page ids, lexicographically; a chained plan keeps the order that is given where that
    loses no sharing. So a permutation of the branches changes no bit of any result.

    The unit of cost is one packed row (a query token's query head of one kv head) attending to one token. Reading K and
    V of a token costs 16, and the partial result of a packed row 32. So a node of n tokens with c children is folded
    into the children, which then read it c times, where 16 * (c - 1) * n <= 32 * (packed rows that continue below it).

    In a chained plan neither sharing nor folding changes a branch's result: it is the same, to the last bit, as for
    the branch alone. For that, neighbours that share an odd number of tokens share one page less.

    A flat plan keeps at most 8 shared nodes on a path, the first ones that pay. A work tile is a chunk and up to 128 of
    its packed rows. It costs as much as it has tokens, because reading them takes longer than computing the rows. Nodes
    are cut into chunks (in steps of 64 tokens) whose tiles cost about a quarter of a worker's share of all tiles. A
    chunk has at least 128 tokens, and at least 4 for each packed row of a tile, as long as that is at most half of a
    share. Results are repeatable, but the last bits of a branch depend on the other branches of the plan.

    The plan depends on the arguments alone, never on the number of threads.

    Args:
        page_table: `[num_branches, max_pages]` int32, any row stride.
        seq_lens: `[num_branches]` int32, tokens in the cache including this step's; 0 for an empty branch.
        q_lens: `[num_branches]` int32, how many of a branch's last tokens are queries; 1 each by default. 0 leaves a
            branch out of this step.
        page_size: tokens in a page.
        num_qo_heads: of the attention that will use the plan, a multiple of num_kv_heads.
        num_kv_heads: of the attention that will use the plan.
        head_dim: of the attention that will use the plan, a multiple of 8 up to 256.
        num_workers: thread blocks that a GPU runs at once, for a flat plan; 0 for a chained one. By default 0 on the
            CPU, and two per multiprocessor on a GPU.

    Raises:
        TypeError: an argument's dtype is wrong.
        ValueError: an argument's shape or stride is wrong, attention does not take this head_dim, a seq_len is negative
            or beyond max_pages * page_size, a q_len is negative or more than the branch's seq_len, or a count exceeds
            int32. On a GPU the host does not read values: lengths are clamped to these ranges, and num_chunks is -1
            where counts do not fit.
    """
    if num_workers is None:
        num_workers = default_workers(page_table.device)
    args = (page_table, seq_lens, q_lens, page_size, num_qo_heads, num_kv_heads, head_dim, num_workers)
    if USE_REFERENCE:
        return TreePlan(*reference.plan_tree(*args))
    return TreePlan(*call(torch.ops.treedecode.plan_tree.default, *args))


def default_workers(device: torch.device) -> int:
    """Returns `num_workers` of plans for `device`: the thread blocks that `tree_attention` runs there at once."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


@register_fake("plan_tree")
def _(
    page_table: Tensor,
    seq_lens: Tensor,
    q_lens: Tensor | None,
    page_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_workers: int,
) -> PlanTensors:
    num_rows, max_pages = page_table.shape
    nodes = torch.sym_max(0, 2 * num_rows - 1)
    if num_workers:
        max_chunks = nodes + torch.sym_min(1, num_rows) * TILES_PER_WORKER * max(1, num_workers // num_kv_heads)
    else:
        max_chunks = nodes + num_rows * (max_pages * page_size // SEGMENT)
    return (
        seq_lens.new_empty(num_rows + 1),
        seq_lens.new_empty(num_rows + 1),
        seq_lens.new_empty(max_chunks, len(FlatChunk._fields)),
        seq_lens.new_empty(len(PlanCounts._fields)),
        seq_lens.new_empty(num_rows),
        seq_lens.new_empty(num_rows + 1),
    )

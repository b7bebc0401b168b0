"""Triton kernels of plan_tree: they build the tree of shared pages and cut its nodes into chunks of a flat plan."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from treedecode.triton_kernels import check, plan_rows
from treedecode.triton_kernels.row_order import order_rows

# As in csrc/cpu/plan_tree.h, which explains them.
_READ_ROWS = tl.constexpr(16)
_PART_TOKENS = tl.constexpr(32)
_MAX_LEVELS = tl.constexpr(8)
_TILES_PER_WORKER = tl.constexpr(4)
_MIN_CHUNK_TOKENS = tl.constexpr(128)
_ROW_TOKENS = tl.constexpr(4)
_CHUNK_STEP = tl.constexpr(64)
_NUM_CLASSES = tl.constexpr(8)

_NO_ROW = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _lens_of(seq_lens_ptr, q_lens_ptr, order_ptr, row, mask, capacity):
    """Loads (seq_len, q_len) of rows, clamped to the range that the op allows, since the host has not checked them.

    A row is the branch `order[row]`; without an order it is the branch itself.
    """
    if order_ptr is not None:
        row = tl.load(order_ptr + row, mask=mask, other=0)
    seq_len = tl.load(seq_lens_ptr + row, mask=mask, other=0).to(tl.int64)
    seq_len = tl.maximum(tl.minimum(seq_len, capacity), 0)
    if q_lens_ptr is None:
        q_len = mask.to(tl.int64)
    else:
        q_len = tl.maximum(tl.load(q_lens_ptr + row, mask=mask, other=0).to(tl.int64), 0)
        q_len = tl.where(seq_len > 0, tl.minimum(q_len, seq_len), q_len)
    return seq_len, q_len


@triton.jit
def _nodes_kernel(
    row_begin_ptr, row_end_ptr, leader_ptr,  # [B] out: of the interval of rows that share shared[row] pages around row
    queries_ptr, longest_ptr, continuing_ptr, children_ptr,  # [2 B] out, by node
    shared_ptr, order_ptr, seq_lens_ptr, q_lens_ptr,  # [B], q_lens may be null
    B, capacity, page_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes nodes 2 i and 2 i + 1: the run of pages whose first fork is at row i, if any, and the rest of row i."""
    row = tl.program_id(0)
    shared = tl.load(shared_ptr + row)
    rows = tl.arange(0, 1) + row
    seq_len, q_len = _lens_of(seq_lens_ptr, q_lens_ptr, order_ptr, rows, rows < B, capacity)
    q_len = tl.where(seq_len > 0, q_len, 0)
    tl.store(queries_ptr + 2 * rows + 1, q_len)
    tl.store(longest_ptr + 2 * rows + 1, seq_len)
    queries = tl.full([], 0, tl.int64)
    longest, continuing = queries, queries
    if shared > 0:
        row_begin, leader, end = -1, row, row
        while row_begin < 0:
            i = end - 1 - tl.arange(0, BLOCK)
            other = tl.load(shared_ptr + i, mask=i >= 0, other=0)
            row_begin = tl.max(tl.where((i >= 0) & (other < shared), i, -1))
            leader = tl.minimum(leader, tl.min(tl.where((i > row_begin) & (other == shared), i, _NO_ROW)))
            end -= BLOCK
        row_end, begin = B + 1, row + 1
        while row_end > B:
            i = begin + tl.arange(0, BLOCK)
            other = tl.load(shared_ptr + i, mask=i < B, other=0)
            row_end = tl.minimum(row_end, tl.min(tl.where((i <= B) & (other < shared), i, _NO_ROW)))
            begin += BLOCK
        tl.store(row_begin_ptr + row, row_begin)
        tl.store(row_end_ptr + row, row_end)
        tl.store(leader_ptr + row, leader)
        if leader == row:
            begin = row_begin
            while begin < row_end:
                i = begin + tl.arange(0, BLOCK)
                seq_lens, q_lens = _lens_of(seq_lens_ptr, q_lens_ptr, order_ptr, i, i < row_end, capacity)
                q_lens = tl.where(seq_lens > 0, q_lens, 0)
                queries += tl.sum(q_lens)
                longest = tl.maximum(longest, tl.max(tl.where(q_lens > 0, seq_lens, 0)))
                continuing += tl.sum(tl.where(tl.cdiv(seq_lens, page_size) > shared, q_lens, 0))
                begin += BLOCK
    tl.store(queries_ptr + 2 * row, queries)
    tl.store(longest_ptr + 2 * row, longest)
    tl.store(continuing_ptr + 2 * row, continuing)
    tl.store(continuing_ptr + 2 * row + 1, 0)
    tl.store(children_ptr + 2 * row, 0)
    tl.store(children_ptr + 2 * row + 1, 0)


@triton.jit
def _kept_tokens(longest, page_begin, page_end, folded, page_size):
    tokens = tl.minimum(page_end.to(tl.int64) * page_size, longest) - page_begin.to(tl.int64) * page_size
    return tl.where(folded != 0, 0, tl.maximum(tokens, 0))


@triton.jit
def _cut(length, queries, target, group):
    """Returns (work tiles of a piece, tokens of a piece, number of pieces) of nodes."""
    rows = group * queries
    tokens = tl.minimum(_ROW_TOKENS * tl.minimum(rows, plan_rows.TILE_ROWS), 2 * target)
    count = tl.cdiv(length, tl.maximum(tl.maximum(tokens, target), _MIN_CHUNK_TOKENS))
    step = tl.cdiv(tl.cdiv(length, tl.maximum(count, 1)), _CHUNK_STEP) * _CHUNK_STEP
    return tl.cdiv(rows, plan_rows.TILE_ROWS), step, tl.cdiv(length, tl.maximum(step, 1))


@triton.jit
def _plan_tree_kernel(
    q_indptr_ptr, part_indptr_ptr, row_indptr_ptr,  # [B + 1] out
    chunks_ptr, counts_ptr,  # [max_chunks, 6], [6] out
    shared_ptr, row_begin_ptr, row_end_ptr, leader_ptr,  # [B]
    queries_ptr, longest_ptr, continuing_ptr, children_ptr,  # [2 B], by node
    parent_ptr, page_begin_ptr, level_ptr, folded_ptr, above_ptr, parts_ptr,  # [2 B] scratch
    order_ptr, seq_lens_ptr, q_lens_ptr,  # [B], q_lens may be null
    B, capacity, page_size, group, workers, max_chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Makes the plan in one program: a node depends on the nodes above it, a chunk's size on the costs of all nodes."""
    # The parent of a node is the interval around it: that of the row at its border that shares more pages.
    for first in range(0, 2 * B, BLOCK):
        node = first + tl.arange(0, BLOCK)
        row = node // 2
        exists = tl.load(queries_ptr + node, mask=node < 2 * B, other=0) > 0
        is_leaf = node % 2 == 1
        a = tl.where(is_leaf, row, tl.load(row_begin_ptr + row, mask=exists & (node % 2 == 0), other=0))
        b = tl.where(is_leaf, row + 1, tl.load(row_end_ptr + row, mask=exists & (node % 2 == 0), other=0))
        depth_a = tl.load(shared_ptr + a, mask=exists, other=0)
        depth_b = tl.load(shared_ptr + b, mask=exists & (b < B), other=0)
        has_parent = exists & (tl.maximum(depth_a, depth_b) > 0)
        parent = 2 * tl.load(leader_ptr + tl.where(depth_a >= depth_b, a, b), mask=has_parent, other=0)
        tl.store(parent_ptr + node, tl.where(has_parent, parent, -1), mask=node < 2 * B)
        tl.store(page_begin_ptr + node, -1, mask=node < 2 * B)
        tl.atomic_add(children_ptr + parent, 1, mask=has_parent)
    tl.debug_barrier()

    # Fold nodes into their children where reading their pages once costs more than it saves, from the roots down.
    changed = 1
    while changed > 0:
        changed = 0
        for first in range(0, 2 * B, BLOCK):
            node = first + tl.arange(0, BLOCK)
            row = node // 2
            queries = tl.load(queries_ptr + node, mask=node < 2 * B, other=0)
            is_open = (queries > 0) & (tl.load(page_begin_ptr + node, mask=queries > 0, other=0) < 0)
            parent = tl.load(parent_ptr + node, mask=is_open, other=-1)
            inner = is_open & (parent >= 0)
            begin = tl.load(page_begin_ptr + parent, mask=inner, other=0)
            level = tl.load(level_ptr + parent, mask=inner, other=0)
            folded = tl.load(folded_ptr + parent, mask=inner, other=0)
            above = tl.load(above_ptr + parent, mask=inner, other=-1)
            end = tl.load(shared_ptr + parent // 2, mask=inner, other=0)
            settled = is_open & (begin >= 0)
            parent_keeps = inner & (folded == 0)
            begin = tl.where(parent_keeps, end, begin)
            level += parent_keeps.to(tl.int32)
            above = tl.where(parent_keeps, parent, above)
            # a branching node is folded if keeping its own pages does not pay
            is_inner = settled & (node % 2 == 0)
            children = tl.load(children_ptr + node, mask=is_inner, other=0).to(tl.int64)
            continuing = tl.load(continuing_ptr + node, mask=is_inner, other=0).to(tl.int64)
            longest = tl.load(longest_ptr + node, mask=is_inner, other=0).to(tl.int64)
            page_end = tl.load(shared_ptr + row, mask=is_inner, other=0).to(tl.int64)
            tokens = tl.minimum(page_end * page_size, longest) - begin.to(tl.int64) * page_size
            pays = _READ_ROWS * (children - 1) * tokens > _PART_TOKENS * group * continuing
            folded = is_inner & ((level == _MAX_LEVELS) | (pays == 0))
            tl.debug_barrier()  # all fields of a parent are read before any of them is written
            tl.store(level_ptr + node, level, mask=settled)
            tl.store(folded_ptr + node, folded.to(tl.int32), mask=settled)
            tl.store(above_ptr + node, above, mask=settled)
            tl.store(page_begin_ptr + node, begin, mask=settled)
            tl.debug_barrier()
            changed += tl.sum(settled.to(tl.int32))

    # Add up the costs of all nodes, for the cost that a chunk should have.
    total = tl.zeros([BLOCK], tl.int64)
    unique_tokens = tl.zeros([BLOCK], tl.int64)
    for first in range(0, 2 * B, BLOCK):
        node = first + tl.arange(0, BLOCK)
        queries = tl.load(queries_ptr + node, mask=node < 2 * B, other=0).to(tl.int64)
        longest = tl.load(longest_ptr + node, mask=queries > 0, other=0).to(tl.int64)
        begin = tl.load(page_begin_ptr + node, mask=queries > 0, other=0)
        inner_end = tl.load(shared_ptr + node // 2, mask=queries > 0, other=0).to(tl.int64)
        end = tl.where(node % 2 == 1, tl.cdiv(longest, page_size), inner_end)
        folded = tl.load(folded_ptr + node, mask=queries > 0, other=1)
        length = _kept_tokens(longest, begin, end, folded, page_size)
        total += tl.cdiv(group * queries, plan_rows.TILE_ROWS) * length
        unique_tokens += length
        tl.store(longest_ptr + node, length, mask=node < 2 * B)  # from here on the tokens that the node keeps
    target = tl.maximum(tl.cdiv(tl.sum(total), _TILES_PER_WORKER * workers), 1)
    tl.debug_barrier()

    # Sort chunks by class of cost, and those of a class by node: count the chunks of each class first.
    number = tl.arange(0, _NUM_CLASSES)[None, :]
    class_chunks = tl.zeros([1, _NUM_CLASSES], tl.int64)
    class_tiles = tl.zeros([1, _NUM_CLASSES], tl.int64)
    for first in range(0, 2 * B, BLOCK):
        node = first + tl.arange(0, BLOCK)
        queries = tl.load(queries_ptr + node, mask=node < 2 * B, other=0).to(tl.int64)
        length = tl.load(longest_ptr + node, mask=node < 2 * B, other=0).to(tl.int64)
        tiles, step, pieces = _cut(length, queries, target, group)
        size_class = _class_of(tl.minimum(step, length), target)
        pieces = tl.where((size_class[:, None] == number), pieces[:, None], 0)
        class_chunks += tl.sum(pieces, 0)[None, :]
        class_tiles += tl.sum(pieces * tiles[:, None], 0)[None, :]
        tl.store(parts_ptr + node, tl.sum(pieces, 1), mask=node < 2 * B)
    num_chunks, num_tiles = tl.sum(class_chunks), tl.sum(class_tiles)
    chunk_begin = tl.cumsum(class_chunks, 1) - class_chunks
    tile_begin = tl.cumsum(class_tiles, 1) - class_tiles
    tl.debug_barrier()
    for first in range(0, 2 * B, BLOCK):
        node = first + tl.arange(0, BLOCK)
        row = node // 2
        queries = tl.load(queries_ptr + node, mask=node < 2 * B, other=0).to(tl.int64)
        length = tl.load(longest_ptr + node, mask=node < 2 * B, other=0).to(tl.int64)
        tiles, step, count = _cut(length, queries, target, group)
        in_class = _class_of(tl.minimum(step, length), target)[:, None] == number
        pieces = tl.where(in_class, count[:, None], 0)
        cut_tiles = pieces * tiles[:, None]
        chunk = tl.sum(tl.where(in_class, chunk_begin + tl.cumsum(pieces, 0) - pieces, 0), 1)
        tile = tl.sum(tl.where(in_class, tile_begin + tl.cumsum(cut_tiles, 0) - cut_tiles, 0), 1)
        chunk_begin += tl.sum(pieces, 0)[None, :]
        tile_begin += tl.sum(cut_tiles, 0)[None, :]
        exists = queries > 0
        part = _parts_above(parts_ptr, above_ptr, node, exists)
        token = tl.load(page_begin_ptr + node, mask=exists, other=0).to(tl.int64) * page_size
        row_begin = tl.where(node % 2 == 1, row, tl.load(row_begin_ptr + row, mask=exists & (node % 2 == 0), other=0))
        row_end = tl.where(node % 2 == 1, row + 1, tl.load(row_end_ptr + row, mask=exists & (node % 2 == 0), other=0))
        max_count = tl.max(count)
        piece = 0
        while piece < max_count:
            out_ptr = chunks_ptr + (chunk + piece) * plan_rows.COLUMNS
            mask = (piece < count) & (chunk + piece < max_chunks)
            tl.store(out_ptr + plan_rows.ROW_BEGIN, row_begin, mask=mask)
            tl.store(out_ptr + plan_rows.ROW_END, row_end, mask=mask)
            tl.store(out_ptr + plan_rows.TOKEN_BEGIN, (token + piece * step).to(tl.int32), mask=mask)
            tl.store(
                out_ptr + plan_rows.TOKEN_END, (token + tl.minimum((piece + 1) * step, length)).to(tl.int32), mask=mask
            )
            tl.store(out_ptr + plan_rows.PART, (part + piece).to(tl.int32), mask=mask)
            tl.store(out_ptr + plan_rows.TILE_BEGIN, (tile + piece * tiles).to(tl.int32), mask=mask)
            piece += 1

    num_queries = tl.full([], 0, tl.int64)
    num_parts, path_tokens = num_queries, num_queries
    for first in range(0, B, BLOCK):
        row = first + tl.arange(0, BLOCK)
        seq_len, q_len = _lens_of(seq_lens_ptr, q_lens_ptr, order_ptr, row, row < B, capacity)
        active = (q_len > 0) & (seq_len > 0)
        own = tl.load(parts_ptr + 2 * row + 1, mask=active, other=0)
        parts = tl.where(active, own + _parts_above(parts_ptr, above_ptr, 2 * row + 1, active), 0)
        branch = tl.load(order_ptr + row, mask=row < B, other=0)
        tl.store(children_ptr + branch, parts, mask=row < B)  # of each query token of the branch
        tl.store(row_indptr_ptr + 1 + row, (num_queries + tl.cumsum(q_len, 0)).to(tl.int32), mask=row < B)
        num_queries += tl.sum(q_len)
        path_tokens += tl.sum(tl.where(active, seq_len, 0))
    tl.debug_barrier()
    num_queries = tl.full([], 0, tl.int64)
    for first in range(0, B, BLOCK):
        branch = first + tl.arange(0, BLOCK)
        _, q_len = _lens_of(seq_lens_ptr, q_lens_ptr, None, branch, branch < B, capacity)
        parts = q_len * tl.load(children_ptr + branch, mask=branch < B, other=0)
        tl.store(q_indptr_ptr + 1 + branch, (num_queries + tl.cumsum(q_len, 0)).to(tl.int32), mask=branch < B)
        tl.store(part_indptr_ptr + 1 + branch, (num_parts + tl.cumsum(parts, 0)).to(tl.int32), mask=branch < B)
        num_queries += tl.sum(q_len)
        num_parts += tl.sum(parts)
    tl.store(q_indptr_ptr, 0)
    tl.store(part_indptr_ptr, 0)
    tl.store(row_indptr_ptr, 0)
    tl.store(counts_ptr + plan_rows.NUM_CHUNKS, num_chunks.to(tl.int32))
    tl.store(counts_ptr + plan_rows.NUM_PARTS, num_parts.to(tl.int32))
    tl.store(counts_ptr + plan_rows.UNIQUE_TOKENS, tl.sum(unique_tokens).to(tl.int32))
    tl.store(counts_ptr + plan_rows.PATH_TOKENS, path_tokens.to(tl.int32))
    tl.store(counts_ptr + plan_rows.PAGE_SIZE, page_size)
    tl.store(counts_ptr + plan_rows.NUM_TILES, num_tiles.to(tl.int32))


@triton.jit
def _class_of(cost, target):
    """Returns the class of cost of chunks, 0 for the most expensive ones; see csrc/cpu/plan_tree.h."""
    size_class = tl.zeros_like(cost)
    for i in tl.static_range(_NUM_CLASSES - 1):
        size_class += ((cost << ((i + 1) // 2)) <= (2 + i % 2) * target).to(tl.int64)
    return size_class


@triton.jit
def _parts_above(parts_ptr, above_ptr, node, mask):
    """Returns the number of partial results of the nodes above that keep their pages."""
    parts = tl.zeros_like(node)
    for _ in tl.static_range(_MAX_LEVELS):
        node = tl.load(above_ptr + node, mask=mask, other=-1)
        mask &= node >= 0
        parts += tl.load(parts_ptr + node, mask=mask, other=0)
    return parts


def plan_tree(
    page_table: Tensor,
    seq_lens: Tensor,
    q_lens: Tensor | None,
    page_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_workers: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches `treedecode.ops.plan_tree`, for flat plans only.

    The host reads no values: lengths are clamped to their range, and counts beyond int32 wrap around.
    """
    int32 = torch.int32
    check.tensor(page_table, "page_table", "[num_branches, max_pages]", (-1, -1), int32)
    num_rows, max_pages = page_table.shape
    check.tensor(seq_lens, "seq_lens", "[num_branches]", (num_rows,), int32, contiguous=True)
    if q_lens is not None:
        check.tensor(q_lens, "q_lens", "[num_branches]", (num_rows,), int32, contiguous=True)
    limit = torch.iinfo(int32).max
    check.value(0 < page_size <= limit, "page_size", "a positive number", page_size)
    check.value(num_kv_heads > 0, "num_kv_heads", "a positive number", num_kv_heads)
    is_multiple = num_qo_heads > 0 and num_kv_heads > 0 and num_qo_heads % num_kv_heads == 0
    check.value(is_multiple, "num_qo_heads", "a multiple of num_kv_heads", num_qo_heads)
    check.value(check.is_head_dim(head_dim), "head_dim", "a multiple of 8 up to 256", head_dim)
    text = "a positive number (a flat plan; chained ones are made on the CPU)"
    check.value(0 < num_workers <= limit, "num_workers", text, num_workers)

    workers = max(1, num_workers // num_kv_heads)
    q_indptr, part_indptr, row_indptr = (seq_lens.new_empty(num_rows + 1) for _ in range(3))
    if num_rows == 0:
        counts = seq_lens.new_zeros(plan_rows.NUM_COUNTS)
        counts[plan_rows.PAGE_SIZE.value] = page_size
        chunks, order = seq_lens.new_empty(0, plan_rows.COLUMNS.value), seq_lens.new_empty(0)
        return q_indptr.zero_(), part_indptr.zero_(), chunks, counts, order, row_indptr.zero_()
    counts = seq_lens.new_empty(plan_rows.NUM_COUNTS)
    max_chunks = 2 * num_rows - 1 + _TILES_PER_WORKER.value * workers
    chunks = seq_lens.new_empty(max_chunks, plan_rows.COLUMNS.value)
    of_rows = seq_lens.new_empty(4, num_rows)
    of_nodes = seq_lens.new_empty(10, 2 * num_rows)
    order = seq_lens.new_empty(num_rows)
    capacity = max_pages * page_size
    shared, *interval = of_rows.unbind()
    order_rows(order, shared, page_table, seq_lens, page_size)
    lens = (order, seq_lens, q_lens, num_rows, capacity, page_size)
    _nodes_kernel[(num_rows,)](*interval, *of_nodes[:4].unbind(), shared, *lens, BLOCK=512, num_warps=4)
    block = min(512, max(16, triton.next_power_of_2(2 * num_rows)))
    _plan_tree_kernel[(1,)](
        q_indptr, part_indptr, row_indptr, chunks, counts, *of_rows.unbind(), *of_nodes.unbind(), *lens,
        num_qo_heads // num_kv_heads, workers, max_chunks, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return q_indptr, part_indptr, chunks, counts, order, row_indptr

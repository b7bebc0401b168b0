"""Reference of plan_tree, and the names of the columns of a plan."""

from itertools import accumulate, groupby, pairwise, takewhile
from typing import NamedTuple

import torch
from torch import Tensor


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class ChainedChunk(NamedTuple):
    """A row of a chained plan's `chunks`."""

    row_begin: int
    row_end: int
    token_begin: int
    token_end: int
    segment: int
    round: int


class FlatChunk(NamedTuple):
    """A row of a flat plan's `chunks`."""

    row_begin: int
    row_end: int
    token_begin: int
    token_end: int
    part: int
    tile_begin: int


class PlanCounts(NamedTuple):
    """The numbers in a plan's `counts`."""

    num_chunks: int
    num_parts: int
    unique_tokens: int
    path_tokens: int
    page_size: int
    num_tiles: int


class Node(NamedTuple):
    """Rows that share the pages [page_begin, page_end), and the nodes below; a leaf has one row and no children."""

    rows: list[int]
    page_begin: int
    page_end: int
    queries: int  # of all its rows
    token_end: int  # longest seq_len of its rows that have queries
    order: int  # of the node among all; a leaf comes after the node that its row is the first to fork from
    children: list["Node"]


def plan_tree(
    page_table: Tensor,
    seq_lens: Tensor,
    q_lens: Tensor | None,
    page_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_workers: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `treedecode.ops.plan_tree`; builds the same plan from the top down."""
    num_rows = len(page_table)
    branch_len = seq_lens.tolist()
    branch_q_len = [1] * num_rows if q_lens is None else q_lens.tolist()
    group = num_qo_heads // num_kv_heads
    branch_pages = [row[: ceil_div(n, page_size)] for row, n in zip(page_table.tolist(), branch_len, strict=True)]
    order = sorted(range(num_rows), key=branch_pages.__getitem__)
    if num_workers == 0 and _shared(branch_pages) == _shared([branch_pages[branch] for branch in order]):
        order = list(range(num_rows))
    pages = [branch_pages[branch] for branch in order]
    seq_len = [branch_len[branch] for branch in order]
    q_len = [branch_q_len[branch] for branch in order]

    def runs(rows: list[int], depth: int) -> list[list[int]]:
        """Groups neighbours that share page number `depth`; a row without that page is a run of its own."""
        result = [[rows[0]]]
        last = depth if page_size % 2 == 0 else depth | 1  # odd pages are shared in twos
        for before, row in pairwise(rows):
            has_page = len(pages[before]) > last and len(pages[row]) > last
            if has_page and pages[before][depth : last + 1] == pages[row][depth : last + 1]:
                result[-1].append(row)
            else:
                result.append([row])
        return result

    def grow(rows: list[int], page_begin: int) -> Node:
        active = [row for row in rows if q_len[row] > 0 and seq_len[row] > 0]
        queries = sum(q_len[row] for row in active)
        token_end = max((seq_len[row] for row in active), default=0)
        if len(rows) == 1:
            return Node(rows, page_begin, len(pages[rows[0]]), queries, token_end, 2 * rows[0] + 1, [])
        page_end = page_begin
        while len(runs(rows, page_end)) == 1:
            page_end += 1
        children = [grow(run, page_end) for run in runs(rows, page_end)]
        return Node(rows, page_begin, page_end, queries, token_end, 2 * children[1].rows[0], children)

    def num_tokens(node: Node) -> int:
        return min(node.page_end * page_size, node.token_end) - node.page_begin * page_size

    def fold(node: Node, level: int = 0) -> list[Node]:
        """Returns the subtree without nodes that do not pay and without rows that have no queries."""
        if node.queries == 0:
            return []
        children = [child for child in node.children if child.queries > 0]
        continuing = sum(child.queries for child in children if child.page_end > child.page_begin)
        is_too_deep = num_workers > 0 and level == 8
        if children and (is_too_deep or 16 * (len(children) - 1) * num_tokens(node) <= 32 * group * continuing):
            return [kept for child in children for kept in fold(child._replace(page_begin=node.page_begin), level)]
        return [node._replace(children=[kept for child in children for kept in fold(child, level + 1)])]

    trees = [grow(run, 0) for run in runs(list(range(num_rows)), 0)] if num_rows else []
    roots = [root for tree in trees for root in fold(tree)]
    chunks: list[ChainedChunk] | list[FlatChunk]
    if num_workers:
        chunks, num_parts, num_tiles = _flat(roots, num_rows, group, page_size, max(1, num_workers // num_kv_heads))
    else:
        chunks, num_tiles = _chained(roots, seq_len, group, page_size), 0
        num_parts = [ceil_div(n, 1024) for n in seq_len]
    part_lens = [0] * num_rows
    for row, branch in enumerate(order):
        part_lens[branch] = q_len[row] * num_parts[row]
    counts = PlanCounts(
        num_chunks=len(chunks),
        num_parts=sum(part_lens),
        unique_tokens=sum(chunk.token_end - chunk.token_begin for chunk in chunks),
        path_tokens=sum(n for n, q in zip(seq_len, q_len, strict=True) if q > 0),
        page_size=page_size,
        num_tiles=num_tiles,
    )
    return (
        torch.tensor([0, *accumulate(branch_q_len)], dtype=torch.int32),
        torch.tensor([0, *accumulate(part_lens)], dtype=torch.int32),
        torch.tensor(chunks, dtype=torch.int32).reshape(-1, len(FlatChunk._fields)),
        torch.tensor(counts, dtype=torch.int32),
        torch.tensor(order, dtype=torch.int32),
        torch.tensor([0, *accumulate(q_len)], dtype=torch.int32),
    )


def _shared(rows: list[list[int]]) -> int:
    """Counts the leading pages that neighbours share."""
    same = (takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)) for a, b in pairwise(rows))
    return sum(len(list(pairs)) for pairs in same)


def _chained(roots: list[Node], seq_len: list[int], group: int, page_size: int) -> list[ChainedChunk]:
    """Cuts nodes into chunks that end at the borders of segments, and continue one another."""
    chunks: list[ChainedChunk] = []
    costs: list[int] = []

    def emit(node: Node, round_before: int) -> None:
        begin, end = node.page_begin * page_size, min(node.page_end * page_size, node.token_end)
        while begin < end:
            token_end = min(end, begin // 1024 * 1024 + 1024)
            round_before = round_before + 1 if begin % 1024 else 0
            rows = range(node.rows[0], node.rows[-1] + 1)
            for ends, run in groupby(rows, [n <= begin for n in seq_len].__getitem__):
                if not ends:
                    members = list(run)
                    segment = begin // 1024
                    chunks.append(
                        ChainedChunk(members[0], members[-1] + 1, begin, token_end, segment, round=round_before)
                    )
                    costs.append((token_end - begin) * (16 + group * node.queries))
            begin = token_end
        for child in node.children:
            emit(child, round_before)

    for root in roots:
        emit(root, 0)
    return [chunks[i] for i in sorted(range(len(chunks)), key=lambda i: (chunks[i].round, -costs[i]))]


def _flat(
    roots: list[Node], num_rows: int, group: int, page_size: int, workers: int
) -> tuple[list[FlatChunk], list[int], int]:
    """Cuts nodes into independent chunks of comparable cost; also returns parts per row, and tiles of all chunks."""

    class Piece(NamedTuple):
        node: Node
        begin: int
        end: int
        rows: int  # packed, of a tile
        num_tiles: int

    nodes: list[Piece] = []

    def visit(node: Node) -> None:
        begin, end = node.page_begin * page_size, min(node.page_end * page_size, node.token_end)
        rows = group * node.queries
        if begin < end:
            nodes.append(Piece(node, begin, end, min(rows, 128), ceil_div(rows, 128)))
        for child in node.children:
            visit(child)

    for root in roots:
        visit(root)
    target = max(1, ceil_div(sum(piece.num_tiles * (piece.end - piece.begin) for piece in nodes), 4 * workers))
    num_parts = [0] * num_rows
    pieces: list[tuple[int, int, int, Piece, int]] = []  # class, order of the node, number, piece, part
    for whole in nodes:  # parents first
        length = whole.end - whole.begin
        count = ceil_div(length, max(128, target, min(4 * whole.rows, 2 * target)))
        step = 64 * ceil_div(ceil_div(length, count), 64)
        bounds = [2 * target, 3 * target / 2, target, 3 * target / 4, target / 2, 3 * target / 8, target / 4]
        size_class = sum(min(step, length) <= bound for bound in bounds)
        part = num_parts[whole.node.rows[0]]
        for number, begin in enumerate(range(whole.begin, whole.end, step)):
            piece = whole._replace(begin=begin, end=min(begin + step, whole.end))
            pieces.append((size_class, whole.node.order, number, piece, part + number))
        for row in whole.node.rows:
            num_parts[row] = part + ceil_div(length, step)
    chunks, num_tiles = [], 0
    for _, _, _, piece, part in sorted(pieces, key=lambda piece: piece[:3]):
        rows = piece.node.rows
        chunks.append(FlatChunk(rows[0], rows[-1] + 1, piece.begin, piece.end, part, tile_begin=num_tiles))
        num_tiles += piece.num_tiles
    return chunks, num_parts, num_tiles

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Node(NamedTuple):
    """Rows that share the pages [page_begin, page_end), and what lies below; a leaf has one row and no children."""

    rows: list[int]
    page_begin: int
    page_end: int
    queries: int  # of all its rows
    token_end: int  # longest seq_len of its rows that have queries
    children: list["Node"]


def plan_tree(
    page_table: Tensor,
    seq_lens: Tensor,
    q_lens: Tensor | None,
    page_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `treedecode.ops.plan_tree`: the same plan to the last number, built from the top down."""
    num_rows = len(page_table)
    seq_len = seq_lens.tolist()
    q_len = [1] * num_rows if q_lens is None else q_lens.tolist()
    group = num_qo_heads // num_kv_heads
    pages = [row[: -(-n // page_size)] for row, n in zip(page_table.tolist(), seq_len, strict=True)]

    def runs(rows: list[int], depth: int) -> list[list[int]]:
        """Neighbours that have the same page number `depth`; a row that has none is a run of its own."""
        found = [[rows[0]]]
        for before, row in pairwise(rows):
            has_page = len(pages[before]) > depth and len(pages[row]) > depth
            if has_page and pages[before][depth] == pages[row][depth]:
                found[-1].append(row)
            else:
                found.append([row])
        return found

    def grow(rows: list[int], page_begin: int) -> Node:
        active = [row for row in rows if q_len[row] > 0 and seq_len[row] > 0]
        queries = sum(q_len[row] for row in active)
        token_end = max((seq_len[row] for row in active), default=0)
        if len(rows) == 1:
            return Node(rows, page_begin, len(pages[rows[0]]), queries, token_end, [])
        page_end = page_begin
        while len(runs(rows, page_end)) == 1:
            page_end += 1
        children = [grow(run, page_end) for run in runs(rows, page_end)]
        return Node(rows, page_begin, page_end, queries, token_end, children)

    def num_tokens(node: Node) -> int:
        return min(node.page_end * page_size, node.token_end) - node.page_begin * page_size

    def fold(node: Node) -> list[Node]:
        """The subtree without the nodes that do not pay and the rows that have no queries."""
        if node.queries == 0:
            return []
        children = [child for child in node.children if child.queries > 0]
        continuing = sum(child.queries for child in children if child.page_end > child.page_begin)
        if children and 16 * (len(children) - 1) * num_tokens(node) <= 32 * group * continuing:
            return [kept for child in children for kept in fold(child._replace(page_begin=node.page_begin))]
        return [node._replace(children=[kept for child in children for kept in fold(child)])]

    def walk(nodes: list[Node]) -> list[Node]:
        return [node for root in nodes for node in (root, *walk(root.children))]

    def page_costs(node: Node) -> list[int]:
        costs = []
        for begin in range(node.page_begin * page_size, node.page_end * page_size, page_size):
            queries = min(node.queries, node.token_end - begin) if len(node.rows) == 1 else node.queries
            costs.append(min(page_size, node.token_end - begin) * (16 + group * queries))
        return costs

    def cut(node: Node, target: int) -> list[int]:
        """Borders of the node's chunks, in pages from its first."""
        costs = [0, *accumulate(page_costs(node))]
        num_pages = len(costs) - 1
        if num_pages == 0:
            return [0]
        packed_rows = group * node.queries
        max_pages = max(1, 2048 // page_size)
        min_tokens = max(128, 16 * 32 * packed_rows // (16 + packed_rows))
        pieces = min(-(-costs[-1] // target), max(1, num_tokens(node) // min_tokens))
        pieces = min(max(pieces, -(-num_pages // max_pages)), num_pages)
        borders = [0]
        for i in range(1, pieces + 1):
            first = max(borders[-1] + 1, num_pages - (pieces - i) * max_pages)
            last = min(borders[-1] + max_pages, num_pages - (pieces - i))
            if len(node.rows) > 1 or node.queries == 1:
                end = -(-num_pages * i // pieces)
            else:
                end = next(page for page, cost in enumerate(costs) if cost * pieces >= costs[-1] * i)
            borders.append(min(max(end, first), last))
        return borders

    forest = [node for run in runs(list(range(num_rows)), 0) for node in fold(grow(run, 0))] if num_rows else []
    total = sum(sum(page_costs(node)) for node in walk(forest))
    target = max(1, -(-total * num_kv_heads // 128))
    chunks: list[tuple[int, list[int]]] = []
    num_parts = [0] * num_rows

    def emit(node: Node, ordinal: int) -> None:
        costs = page_costs(node)
        for begin, end in pairwise(cut(node, target)):
            tokens = [(node.page_begin + begin) * page_size, min((node.page_begin + end) * page_size, node.token_end)]
            chunks.append((sum(costs[begin:end]), [node.rows[0], node.rows[-1] + 1, *tokens, ordinal, 0]))
            ordinal += 1
        if not node.children:
            num_parts[node.rows[0]] = ordinal
        for child in node.children:
            emit(child, ordinal)

    for root in forest:
        emit(root, 0)
    chunks.sort(key=lambda chunk: -chunk[0])
    part_lens = [q * parts for q, parts in zip(q_len, num_parts, strict=True)]
    unique_tokens = sum(chunk[3] - chunk[2] for _, chunk in chunks)
    path_tokens = sum(n for n, q in zip(seq_len, q_len, strict=True) if q > 0)
    return (
        torch.tensor([0, *accumulate(q_len)], dtype=torch.int32),
        torch.tensor([0, *accumulate(part_lens)], dtype=torch.int32),
        torch.tensor([chunk for _, chunk in chunks], dtype=torch.int32).reshape(-1, 6),
        torch.tensor([len(chunks), sum(part_lens), unique_tokens, path_tokens], dtype=torch.int32),
    )

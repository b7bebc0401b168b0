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
        """Neighbours that share page number `depth`; a row that has none is a run of its own."""
        found = [[rows[0]]]
        last = depth if page_size % 2 == 0 else depth | 1  # odd pages are shared in twos
        for before, row in pairwise(rows):
            has_page = len(pages[before]) > last and len(pages[row]) > last
            if has_page and pages[before][depth : last + 1] == pages[row][depth : last + 1]:
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

    chunks: list[list[int]] = []
    costs: list[int] = []

    def emit(node: Node, round_before: int) -> None:
        begin, end = node.page_begin * page_size, min(node.page_end * page_size, node.token_end)
        while begin < end:
            token_end = min(end, begin // 1024 * 1024 + 1024)
            round_before = round_before + 1 if begin % 1024 else 0
            chunks.append([node.rows[0], node.rows[-1] + 1, begin, token_end, begin // 1024, round_before])
            costs.append((token_end - begin) * (16 + group * node.queries))
            begin = token_end
        for child in node.children:
            emit(child, round_before)

    for run in runs(list(range(num_rows)), 0) if num_rows else []:
        for root in fold(grow(run, 0)):
            emit(root, 0)
    order = sorted(range(len(chunks)), key=lambda i: (chunks[i][5], -costs[i]))
    num_parts = [-(-n // 1024) for n in seq_len]
    part_lens = [q * parts for q, parts in zip(q_len, num_parts, strict=True)]
    unique_tokens = sum(chunk[3] - chunk[2] for chunk in chunks)
    path_tokens = sum(n for n, q in zip(seq_len, q_len, strict=True) if q > 0)
    return (
        torch.tensor([0, *accumulate(q_len)], dtype=torch.int32),
        torch.tensor([0, *accumulate(part_lens)], dtype=torch.int32),
        torch.tensor([chunks[i] for i in order], dtype=torch.int32).reshape(-1, 6),
        torch.tensor([len(chunks), sum(part_lens), unique_tokens, path_tokens, page_size], dtype=torch.int32),
    )

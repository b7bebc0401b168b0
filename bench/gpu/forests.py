"""Makes page tables of trees and forests of branches, and inputs of attention over them."""

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128


@dataclass
class Level:
    """A level of a tree whose nodes are alike, as a cascade needs it."""

    num_queries: int  # per node
    pages: Tensor  # [num_nodes, pages_per_node] int32
    last_page_len: int


@dataclass
class Forest:
    """Branches as rows of page ids, with their lengths in tokens.

    Attributes:
        levels: from the root down; None where the forest has none.
    """

    page_size: int
    rows: list[list[int]]
    seq_lens: list[int]
    levels: list[Level] | None = field(default=None)

    @property
    def num_pages(self) -> int:
        return 1 + max(itertools.chain.from_iterable(self.rows))

    @property
    def page_table(self) -> Tensor:
        """`[num_branches, max_pages]` int32; 0 beyond a branch's pages."""
        table = torch.zeros(len(self.rows), max(map(len, self.rows)), dtype=torch.int32)
        for entries, row in zip(table, self.rows, strict=True):
            entries[: len(row)] = torch.tensor(row, dtype=torch.int32)
        return table

    @property
    def page_lens(self) -> Tensor:
        """`[num_pages]` int64, tokens in each page that some branch reads."""
        lens = torch.zeros(self.num_pages, dtype=torch.int64)
        for row, seq_len in zip(self.rows, self.seq_lens, strict=True):
            ids = torch.tensor(row)
            tokens = (seq_len - self.page_size * torch.arange(len(row))).clamp(max=self.page_size)
            lens[ids] = torch.maximum(lens[ids], tokens)
        return lens

    @property
    def unique_tokens(self) -> int:
        return int(self.page_lens.sum())

    @property
    def path_tokens(self) -> int:
        return sum(self.seq_lens)


def tree(nodes: tuple[int, ...], tokens: tuple[int, ...], page_size: int) -> Forest:
    """Makes a tree with `nodes[i]` nodes of `tokens[i]` tokens on level i, rows in depth-first order.

    Pages are shared whole: where a level ends within a page, its last tokens are each child's own, as after a
    copy-on-write.
    """
    num_branches, counter = nodes[-1], itertools.count()
    rows: list[list[int]] = [[] for _ in range(num_branches)]
    levels, begin, end = [], 0, 0
    for depth, (count, length) in enumerate(zip(nodes, tokens, strict=True)):
        end += length
        is_last = depth + 1 == len(nodes)
        stop = math.ceil(end / page_size) if is_last else end // page_size
        per_node, width = stop - begin, num_branches // count
        ids = [[next(counter) for _ in range(per_node)] for _ in range(count)]
        for i, row in enumerate(rows):
            row.extend(ids[i // width])
        if per_node:
            last = end - (stop - 1) * page_size if is_last else page_size
            levels.append(Level(width, torch.tensor(ids, dtype=torch.int32), last))
        begin = stop
    return Forest(page_size, rows, [end] * num_branches, levels)


def deep_leaf_among_singletons(page_size: int, prefix: int = 4096, leaves: int = 64, singletons: int = 192) -> Forest:
    """Makes one prefix with many leaves, and short branches that share nothing."""
    deep = tree((1, leaves), (prefix, 64), page_size)
    counter = itertools.count(deep.num_pages)
    rows = list(deep.rows)
    seq_lens = list(deep.seq_lens)
    for i in range(singletons):
        seq_lens.append(128 + 16 * (i % 9))
        rows.append([next(counter) for _ in range(math.ceil(seq_lens[-1] / page_size))])
    return Forest(page_size, rows, seq_lens)


def ragged(page_size: int, num_branches: int = 64, prefix: int = 4096) -> Forest:
    """Makes branches that leave another one at a random point of its path and end at a random length."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    counter = itertools.count()
    root = [next(counter) for _ in range(math.ceil(prefix / page_size))]
    rows, seq_lens = [], []
    for i in range(num_branches):
        source = root if i == 0 or draw(0, 3) == 0 else rows[draw(max(0, i - 4), i - 1)]
        row = list(source[: draw(len(source) // 2, len(source))])
        row += [next(counter) for _ in range(draw(1, max(1, 512 // page_size)))]
        rows.append(row)
        seq_lens.append((len(row) - 1) * page_size + draw(1, page_size))
    order = sorted(range(num_branches), key=lambda i: rows[i])  # equal beginnings side by side
    return Forest(page_size, [rows[i] for i in order], [seq_lens[i] for i in order])


def unsorted(forest: Forest) -> Forest:
    """Puts the branches in a random order, in which neighbours share pages only by chance."""
    order = torch.randperm(len(forest.rows), generator=torch.Generator().manual_seed(0)).tolist()
    return Forest(forest.page_size, [forest.rows[i] for i in order], [forest.seq_lens[i] for i in order])


@dataclass
class Inputs:
    """Inputs of attention over a forest on a device, with several sets of keys, values and queries."""

    forest: Forest
    heads: Heads
    kv: list[Tensor]  # [2, num_pages, num_kv_heads, page_size, head_dim] each
    q: list[Tensor]  # [num_branches, num_qo_heads, head_dim] each
    page_table: Tensor
    seq_lens: Tensor

    @property
    def device(self) -> torch.device:
        return self.page_table.device

    @property
    def dtype(self) -> torch.dtype:
        return self.q[0].dtype

    @property
    def token_bytes(self) -> int:
        return 2 * self.heads.num_kv_heads * self.heads.head_dim * self.dtype.itemsize

    def pages(self, i: int) -> tuple[Tensor, Tensor]:
        """Returns k_pages and v_pages of set i as NHD views: `[num_pages, page_size, num_kv_heads, head_dim]`."""
        k, v = self.kv[i].transpose(2, 3)
        return k, v

    def keys_of(self, row: int, i: int = 0) -> Tensor:
        """Copies K and V of a branch, `[2, num_kv_heads, seq_len, head_dim]`."""
        pages = torch.tensor(self.forest.rows[row], device=self.device)
        return self.kv[i][:, pages].transpose(1, 2).flatten(2, 3)[:, :, : self.forest.seq_lens[row]]


def make_inputs(forest: Forest, heads: Heads, dtype: torch.dtype, device: torch.device, sets: int) -> Inputs:
    torch.manual_seed(0)
    shape = (2, forest.num_pages, heads.num_kv_heads, forest.page_size, heads.head_dim)
    return Inputs(
        forest,
        heads,
        [torch.randn(shape, device=device, dtype=dtype) for _ in range(sets)],
        [
            torch.randn(len(forest.rows), heads.num_qo_heads, heads.head_dim, device=device, dtype=dtype)
            for _ in range(sets)
        ],
        forest.page_table.to(device),
        torch.tensor(forest.seq_lens, dtype=torch.int32, device=device),
    )

"""Times plan_tree on tables whose rows come in depth-first order and in a random one."""

import numpy as np
import pytest
import torch

from treedecode import ops

SHAPES = {  # nodes per level, pages per node, page size
    "64x(128+4 pages)": ((1, 64), (128, 4), 16),
    "16,128x(256+32 pages)": ((16, 128), (256, 32), 16),
    "1,4,16,64,256,1024": ((1, 4, 16, 64, 256, 1024), (16, 1, 16, 4, 2, 16), 16),
    "256x256 pages, no sharing": ((256,), (256,), 16),
    "64x(4096+64 pages of a token)": ((1, 64), (4096, 64), 1),
}


def page_table_of(nodes, pages):
    """Makes the page table of a tree, rows in depth-first order, from the nodes per level and the pages per node."""
    rows, first = nodes[-1], 0
    levels = []
    for num_nodes, num_pages in zip(nodes, pages, strict=True):
        ids = first + torch.arange(num_nodes * num_pages, dtype=torch.int32).view(num_nodes, num_pages)
        levels.append(ids.repeat_interleave(rows // num_nodes, 0))
        first += num_nodes * num_pages
    return torch.cat(levels, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["depth-first", "shuffled"])
def bench_plan_tree(compare, order, shape):
    nodes, pages, page_size = SHAPES[shape]
    page_table = page_table_of(nodes, pages)
    if order == "shuffled":
        page_table = page_table[torch.randperm(len(page_table), generator=torch.Generator().manual_seed(0))]
    num_rows, num_pages = page_table.shape
    seq_lens = torch.full((num_rows,), num_pages * page_size - page_size // 4, dtype=torch.int32)

    def numpy_common_pages():  # the least that a planner in Python does, without a tree and chunks
        table = page_table.numpy()
        differ = table[1:] != table[:-1]
        return np.where(differ.any(1), differ.argmax(1), num_pages)

    compare(
        lambda: ops.plan_tree(page_table, seq_lens, page_size=page_size, num_qo_heads=32, num_kv_heads=8, head_dim=128),
        {"numpy, comparing rows only": numpy_common_pages},
        num_bytes=page_table.nbytes,
        dtype=torch.float32,
    )

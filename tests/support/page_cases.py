"""Makes pools and pages for the page tests, and writes and checks the values of branches."""

import torch

from treedecode import ops
from treedecode.cache.page_pool import PagePool

STATE_FIELDS = ("refcount", "free_pages", "page_table", "seq_lens", "status")


def make_pool(num_pages=24, page_size=4, max_branches=8, max_pages_per_branch=12, **changes):
    sizes = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 4, "dtype": torch.float32} | changes
    return PagePool(
        num_pages=num_pages,
        page_size=page_size,
        max_branches=max_branches,
        max_pages_per_branch=max_pages_per_branch,
        **sizes,
    )


def snapshot(pool):
    return {name: getattr(pool, name).clone() for name in (*STATE_FIELDS, "kv")}


def assert_unchanged(pool, before):
    for name, value in before.items():
        assert torch.equal(getattr(pool, name), value), name


class Writer:
    """Writes a different value into each new slot, and checks the values of branches, K and V of all layers."""

    def __init__(self, pool):
        self.pool = pool
        self.count = 0

    def append(self, rows, q_lens):
        """Appends tokens, and returns their values, a list per row."""
        slots = self.pool.append(rows, q_lens)
        num_heads, head_dim = self.pool.kv.shape[3], self.pool.kv.shape[5]
        values = torch.arange(self.count, self.count + len(slots), dtype=torch.float32) + 1
        self.count += len(slots)
        place = torch.arange(num_heads * head_dim).view(num_heads, head_dim) / 64
        for layer in range(self.pool.num_layers):
            k = values[:, None, None] + place + layer * 1000
            ops.append_kv(k, -k, *self.pool.layer(layer), slots)
        return [part.tolist() for part in values.split(list(q_lens))]

    def assert_holds(self, row, values):
        pool = self.pool
        num_heads, head_dim = pool.kv.shape[3], pool.kv.shape[5]
        pages = torch.from_numpy(pool.pages(row)).long()
        place = torch.arange(num_heads * head_dim).view(num_heads, head_dim) / 64
        for layer in range(pool.num_layers):
            want = torch.tensor(values)[:, None, None] + place + layer * 1000
            for got, sign in zip(pool.layer(layer), (1, -1), strict=True):
                got = got[pages].reshape(-1, num_heads, head_dim)[: len(values)]
                assert torch.equal(got, sign * want), f"row {row}"


def make_pages(num_pages, page_size, num_kv_heads, head_dim, dtype, layout):
    """Makes pages full of 7, `[num_pages, page_size, num_kv_heads, head_dim]`, in memory of either layout."""
    if layout == "NHD":
        return torch.full((num_pages, page_size, num_kv_heads, head_dim), 7.0, dtype=dtype)
    return torch.full((num_pages, num_kv_heads, page_size, head_dim), 7.0, dtype=dtype).transpose(1, 2)

"""Pools and pages for the page tests, and a writer that knows what every branch must hold."""

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
    """Writes a value of its own into each new slot of each layer, K and V, and reads branches back."""

    def __init__(self, pool):
        self.pool = pool
        self.count = 0

    def append(self, rows, q_lens):
        """Returns the new tokens' values, one list per row."""
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
    """Pages full of 7 as `[num_pages, page_size, num_kv_heads, head_dim]`, in memory of either layout."""
    if layout == "NHD":
        return torch.full((num_pages, page_size, num_kv_heads, head_dim), 7.0, dtype=dtype)
    return torch.full((num_pages, num_kv_heads, page_size, head_dim), 7.0, dtype=dtype).transpose(1, 2)

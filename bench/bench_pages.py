"""Times the page ops at the size of SmolLM2-135M, 64 branches of 2056 tokens, beside reorders of a dense cache."""

import numpy as np
import pytest
import torch

from treedecode import ops
from treedecode._host import PrefixIndex
from treedecode.cache.page_pool import PagePool

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 30, 3, 64, 16
NUM_BRANCHES, NUM_TOKENS = 64, 2056  # ends in the middle of a page: the first append copies it
DTYPE = torch.bfloat16
TOKEN_BYTES = 2 * NUM_LAYERS * NUM_KV_HEADS * HEAD_DIM * DTYPE.itemsize
INT32 = 4
PART = "index_select (dense cache, 3 of 30 layers)"  # a tenth of the work is enough to compare microseconds with
PEER_SECONDS = 1.0  # a dense reorder takes about a second
# A fork or a reorder must read and write the rows of the table.
TABLE_BYTES = 2 * NUM_BRANCHES * -(-NUM_TOKENS // PAGE_SIZE) * INT32


def make_pool(num_pages=1024):
    pool = PagePool(
        num_layers=NUM_LAYERS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_branches=NUM_BRANCHES,
        max_pages_per_branch=256,
        dtype=DTYPE,
    )
    pool.kv.fill_(1.0)  # the memory is there: no page fault in the timing
    return pool


class DenseReorder:
    """Reorders a dense cache as Transformers does at each beam step, by `index_select` of K and V of every layer.

    The whole cache of 64 branches would be 3 GB, twice. Reordering one layer again and again reads and writes as much,
    and never takes longer than the whole.
    """

    def __init__(self):
        self.k, self.v = torch.ones(2, NUM_BRANCHES, NUM_KV_HEADS, NUM_TOKENS, HEAD_DIM, dtype=DTYPE)

    def __call__(self, parents, num_layers):
        for _ in range(num_layers):
            self.k.index_select(0, parents)
            self.v.index_select(0, parents)


@pytest.fixture(scope="module")
def dense():
    return DenseReorder()


def bench_fork_branches(compare, dense):
    """fork_branches: one root becomes 64 branches, which are empty before."""
    pool = make_pool()
    rows = pool.allocate_rows(NUM_BRANCHES)
    pool.append(rows[:1], [NUM_TOKENS])
    parents, children = np.zeros(NUM_BRANCHES - 1, np.int32), rows[1:]
    zeros = torch.zeros(NUM_BRANCHES, dtype=torch.int64)
    compare(
        lambda: pool.fork(parents, children),
        {PART: lambda: dense(zeros, 3)},
        peer_seconds=PEER_SECONDS,
        prepare=lambda: pool.clear(children),
        num_bytes=TABLE_BYTES,
        dtype=DTYPE,
    )


def bench_fork_and_first_append(compare, dense):
    """fork_branches and append_slots, which copies 63 half-full last pages."""
    pool = make_pool()
    rows = pool.allocate_rows(NUM_BRANCHES)
    pool.append(rows[:1], [NUM_TOKENS])
    parents, children = np.zeros(NUM_BRANCHES - 1, np.int32), rows[1:]
    zeros = torch.zeros(NUM_BRANCHES, dtype=torch.int64)

    def fork_and_append():
        pool.fork(parents, children)
        pool.append(rows)

    def prepare():
        pool.clear(children)
        pool.truncate(rows[:1], [NUM_TOKENS])

    compare(
        fork_and_append,
        {"index_select (dense cache)": lambda: dense(zeros, NUM_LAYERS)},
        peer_seconds=PEER_SECONDS,
        prepare=prepare,
        num_bytes=TABLE_BYTES + 2 * (NUM_BRANCHES - 1) * (NUM_TOKENS % PAGE_SIZE) * TOKEN_BYTES,
        dtype=DTYPE,
    )


@pytest.mark.parametrize("own_tokens", [8, 64], ids=["own8", "own64"])
def bench_reorder(compare, dense, own_tokens):
    """A beam step: every branch continues a random parent; all share 2048 tokens and have some of their own."""
    pool = make_pool()
    rows = pool.allocate_rows(NUM_BRANCHES)
    pool.append(rows[:1], [NUM_TOKENS - 8])
    pool.fork(np.zeros(NUM_BRANCHES - 1, np.int32), rows[1:])
    pool.append(rows, np.full(NUM_BRANCHES, own_tokens))
    rng = np.random.default_rng(0)
    parents = rng.permutation(NUM_BRANCHES).astype(np.int32)  # nothing is lost, so each round does the same work
    compare(
        lambda: pool.fork(parents, rows),
        {PART: lambda: dense(torch.from_numpy(parents).long(), 3)},
        peer_seconds=PEER_SECONDS,
        num_bytes=TABLE_BYTES,
        dtype=DTYPE,
    )


@pytest.mark.parametrize("borders", [False, True], ids=["within-page", "new-page"])
def bench_append_slots(compare, borders):
    """append_slots: one token for each of 64 branches, all Python included; at most 20 us."""
    pool = make_pool()
    rows = pool.allocate_rows(NUM_BRANCHES)
    ones = np.ones(NUM_BRANCHES, np.int32)
    lens = np.full(NUM_BRANCHES, 128 if borders else 129, np.int32)
    pool.append(rows, lens)
    state = pool.state
    slots, ids = torch.empty(NUM_BRANCHES, dtype=torch.int64), torch.from_numpy(rows)
    compare(
        lambda: pool.append(rows, ones),
        {"the op alone (append_slots)": lambda: ops.append_slots(state, pool.kv, slots, ids)},
        prepare=lambda: pool.truncate(rows, lens),
        num_bytes=NUM_BRANCHES * (8 + 3 * INT32),
        rounds=200,
    )


def bench_hold_pages(compare):
    """hold_pages: retain and drop the 129 pages of a prompt."""
    pool = make_pool()
    (row,) = pool.allocate_rows(1)
    pool.append([row], [NUM_TOKENS])
    pages = pool.pages(row)

    def hold():
        pool.retain(pages)
        pool.drop(pages)

    compare(hold, {}, num_bytes=4 * len(pages) * INT32, rounds=200)


def bench_match_and_adopt_pages(compare):
    """adopt_pages: find the pages of a 2000-token prompt that the prefix index knows, and start a row on them."""
    rng = np.random.default_rng(0)
    pool = make_pool()
    index = PrefixIndex(PAGE_SIZE)
    row, other = pool.allocate_rows(2)
    for _ in range(8):  # prompts that part after 1000 tokens
        prompt = rng.integers(0, 49152, 2000, dtype=np.int32)
        prompt[:1000] = np.arange(1000)
        pool.append([row], [2000])
        pool.retain(index.insert(prompt, pool.pages(row)))
        pool.clear([row])

    def match_and_adopt():
        pages, num_tokens = index.match(prompt)
        pool.adopt(other, pages, num_tokens)

    compare(
        match_and_adopt,
        {"match alone": lambda: index.match(prompt)},
        prepare=lambda: pool.clear([other]),
        num_bytes=2 * prompt.nbytes,
        rounds=200,
    )


def bench_copy_pages(compare):
    """copy_pages: 64 whole pages, all layers."""
    pool = make_pool()
    src, dst = torch.randperm(pool.num_pages, dtype=torch.int32)[: 2 * NUM_BRANCHES].view(2, NUM_BRANCHES)
    src_index, dst_index = src.long(), dst.long()

    def index_copy():
        pool.kv.index_copy_(2, dst_index, pool.kv.index_select(2, src_index))

    compare(
        lambda: ops.copy_pages(pool.kv, src, dst),
        {"index_select + index_copy_": index_copy},
        num_bytes=2 * NUM_BRANCHES * pool.page_bytes,
        dtype=DTYPE,
    )

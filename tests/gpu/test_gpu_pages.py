"""The page ops on CUDA tensors: after every call of a random history the state equals that of the CPU."""

import random

import pytest
import torch
from support.gpu_cases import DEVICE, GPU
from support.page_cases import STATE_FIELDS, make_pool

from treedecode import ops
from treedecode.cache.page_pool import OutOfPages
from treedecode.ops import pages
from treedecode.ops.pages import STATUS_ERROR, STATUS_NUM_FREE, STATUS_NUM_NEEDED

pytestmark = GPU
PAGE_OPS = ("fork_branches", "append_slots", "hold_pages", "adopt_pages", "append_kv")


def defined(pool):
    """Returns the defined parts of a pool's state, on the CPU."""
    num_free, lens = int(pool.status[STATUS_NUM_FREE]), pool.seq_lens.cpu()
    used = torch.arange(pool.page_table.shape[1]) * pool.page_size < lens[:, None]
    return {
        "lengths": lens,
        "table": pool.page_table.cpu()[used],
        "refcount": pool.refcount.cpu(),
        "free": pool.free_pages[:num_free].cpu(),
        "status": pool.status.cpu(),
        "kv": pool.kv.cpu(),
    }


class Pair:
    """Makes the same calls on a pool of the CPU and one of the GPU."""

    def __init__(self, page_size, num_pages, max_branches=7):
        sizes = {"page_size": page_size, "num_pages": num_pages, "max_branches": max_branches}
        self.cpu, self.gpu = make_pool(max_pages_per_branch=-(-64 // page_size), **sizes), None
        self.gpu = make_pool(max_pages_per_branch=-(-64 // page_size), device=DEVICE, **sizes)
        self.num_written = 0
        for pool in (self.cpu, self.gpu):
            pool.allocate_rows(max_branches)

    def do(self, name, *args):
        """Returns the result, or the numbers of OutOfPages, on which both pools must agree."""
        results = []
        for pool in (self.cpu, self.gpu):
            try:
                results.append(getattr(pool, name)(*args))
            except OutOfPages as error:
                results.append((error.num_needed, error.num_free))
        if isinstance(results[0], torch.Tensor):
            results[1] = results[1].cpu()
            assert torch.equal(*results)
            self._write(results[0])
        else:
            assert results[0] == results[1]
        self.assert_equal()
        return results[0]

    def _write(self, slots):
        """Writes a value of its own into each new slot."""
        for pool in (self.cpu, self.gpu):
            values = torch.arange(len(slots), dtype=torch.float32) + self.num_written
            k = values.to(pool.device)[:, None, None].expand(-1, pool.kv.shape[3], pool.kv.shape[5]).contiguous()
            for layer in range(pool.num_layers):
                ops.append_kv(k + layer, -k, *pool.layer(layer), slots.to(pool.device))
        self.num_written += len(slots)

    def assert_equal(self):
        want, got = defined(self.cpu), defined(self.gpu)
        for name, value in want.items():
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("page_size", [1, 2, 16])
@pytest.mark.parametrize("seed", range(4))
def test_random_histories(through, page_size, seed):
    through(*PAGE_OPS)
    rng = random.Random(seed)
    pair = Pair(page_size, 70 // page_size + 3)
    rows, held, num_refused = list(range(7)), [], 0
    for _ in range(60):
        lens = pair.cpu.seq_lens.tolist()
        some = rng.sample(rows, rng.randint(1, len(rows)))
        call = rng.choice(
            ["append", "append", "append", "fork", "fork", "truncate", "clear", "retain", "drop", "adopt"]
        )
        if call == "append":
            most = rng.choice([1, 3, 20])
            result = pair.do("append", some, [rng.randint(0, min(most, 64 - lens[row])) for row in some])
            num_refused += isinstance(result, tuple)
        elif call == "fork":
            src = [rng.choice(rows) for _ in some]
            cut = [rng.randint(0, lens[row]) for row in src] if rng.random() < 0.3 else None
            pair.do("fork", src, some, cut)
        elif call == "truncate":
            pair.do("truncate", some, [rng.randint(0, lens[row]) for row in some])
        elif call == "clear":
            pair.do("clear", some[:2])
        elif call == "retain" and lens[some[0]] >= page_size:
            held.append(pair.cpu.pages(some[0])[: lens[some[0]] // page_size].tolist())
            pair.do("retain", held[-1])
        elif call == "drop" and held:
            pair.do("drop", held.pop(rng.randrange(len(held))))
        elif call == "adopt" and held and 0 in lens:
            taken = rng.choice(held)
            num_tokens = rng.randint(1, len(taken) * page_size)
            pair.do("adopt", lens.index(0), taken[: -(-num_tokens // page_size)], num_tokens)
    assert num_refused > 0
    pair.gpu.check_integrity(held=[page for taken in held for page in taken])


def test_more_branches_than_threads_of_a_block(through):
    """Scans over rows and pages take more than one pass."""
    through(*PAGE_OPS)
    pair = Pair(2, 9000, max_branches=2500)
    rng = random.Random(0)
    rows = list(range(2500))
    pair.do("append", [0], [31])
    pair.do("fork", [0] * 2499, rows[1:])
    pair.do("append", rows)
    for _ in range(3):
        pair.do("fork", [rng.choice(rows) for _ in rows], rows)
        pair.do("append", rows, [rng.randint(0, 2) for _ in rows])
    pair.do("clear", rng.sample(rows, 2000))


@pytest.fixture
def pool():
    pool = make_pool(device=DEVICE)
    pool.allocate_rows(8)
    pool.append([0, 1], [7, 3])
    pool.fork([0, 0], [2, 3])
    return pool


def everything(pool):
    return {name: getattr(pool, name).cpu() for name in (*STATE_FIELDS, "kv")}


def ids(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def append(pool, rows, q_lens, num_slots):
    slots = torch.full((num_slots,), 7, dtype=torch.int64, device=DEVICE)
    ops.append_slots(pool.state, pool.kv, slots, rows, q_lens)
    return slots.tolist()


def test_out_of_pages_stays_until_it_is_reset(through, pool):
    through(*PAGE_OPS)
    before = everything(pool)
    assert append(pool, ids(0, 1), ids(40, 45), 85) == [-1] * 85
    error, num_free, needed, _ = pool.status.tolist()
    assert (error, num_free) == (pages.OUT_OF_PAGES, int(before["status"][STATUS_NUM_FREE]))
    assert needed > num_free
    assert append(pool, ids(0), None, 1) == [-1]
    ops.fork_branches(pool.state, ids(1), ids(0))
    ops.hold_pages(pool.state, ids(0))
    after = everything(pool)
    after["status"][[STATUS_ERROR, STATUS_NUM_NEEDED]] = 0
    assert all(torch.equal(after[name], value) for name, value in before.items())
    pool.reset_status()
    assert append(pool, ids(0), None, 1)[0] >= 0
    pool.check_integrity()


BAD = {
    "dst out of range": lambda pool: ops.fork_branches(pool.state, ids(0, 0), ids(4, 8)),
    "src negative": lambda pool: ops.fork_branches(pool.state, ids(-1), ids(4)),
    "dst twice": lambda pool: ops.fork_branches(pool.state, ids(0, 1), ids(4, 4)),
    "length beyond the source's": lambda pool: ops.fork_branches(pool.state, ids(0), ids(4), ids(8)),
    "negative length": lambda pool: ops.fork_branches(pool.state, ids(0), ids(4), ids(-1)),
    "append to a row out of range": lambda pool: append(pool, ids(8), None, 1),
    "append to a row twice": lambda pool: append(pool, ids(1, 1), None, 2),
    "negative number of tokens": lambda pool: append(pool, ids(0, 1), ids(-1, 2), 1),
    "more tokens than the table holds": lambda pool: append(pool, ids(0), ids(42), 42),
    "more tokens than slots": lambda pool: append(pool, ids(0), ids(3), 2),
    "hold a free page": lambda pool: ops.hold_pages(pool.state, ids(23)),
    "hold a page out of range": lambda pool: ops.hold_pages(pool.state, ids(24)),
    "drop too often": lambda pool: ops.hold_pages(pool.state, ids(2, 2), False),
    "adopt into a row in use": lambda pool: ops.adopt_pages(pool.state, ids(0), 1, 3),
    "adopt a free page": lambda pool: ops.adopt_pages(pool.state, ids(23), 5, 3),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_change_nothing_but_the_status(through, pool, name):
    through(*PAGE_OPS)
    before = everything(pool)
    slots = BAD[name](pool)
    assert slots is None or set(slots) == {-1}
    assert int(pool.status[STATUS_ERROR]) == pages.BAD_ARGUMENT
    after = everything(pool)
    after["status"][STATUS_ERROR] = 0
    assert all(torch.equal(after[name], value) for name, value in before.items())

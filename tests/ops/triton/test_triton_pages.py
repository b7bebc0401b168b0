"""The Triton kernels of the page ops, in the interpreter: all tensors are those of the CPU ops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.page_cases import STATE_FIELDS, assert_unchanged, make_pool, snapshot
from support.tensors import int32
from support.triton_cases import PageOps, assert_same_error

from treedecode import ops
from treedecode.ops.pages import BAD_ARGUMENT, OK, OUT_OF_PAGES, STATUS_ERROR
from treedecode.triton_kernels import page_state

I32_MAX = 2**31 - 1


class Pair:
    """Two pools with one history: the CPU ops run on one, the kernels on the other."""

    def __init__(self, **sizes):
        self.cpu, self.device = make_pool(**sizes), make_pool(**sizes)
        self.step = 0

    def __getattr__(self, name):
        return getattr(self.cpu, name)

    def call(self, name, *args):
        for pool, module in ((self.cpu, ops), (self.device, PageOps)):
            getattr(module, name)(pool.state, *args)
        self.assert_same(name)

    def append(self, rows, q_lens=None, more_slots=0):
        """Appends on both; returns the slots. Each call has its own value of tokens, which shows a wrong copy."""
        self.step += 1
        slots = []
        for pool, module in ((self.cpu, ops), (self.device, PageOps)):
            size = (rows.numel() if q_lens is None else int(q_lens.sum())) + more_slots
            slots.append(torch.full((size,), 7))
            module.append_slots(pool.state, pool.kv, slots[-1], rows, q_lens)
            for layer in range(pool.num_layers):
                for pages in pool.layer(layer):
                    written = slots[-1][slots[-1] >= 0]
                    pages[written // pool.page_size, written % pool.page_size] = float(self.step)
        assert torch.equal(*slots)
        self.assert_same("append_slots")
        return slots[0]

    def assert_same(self, name):
        num_free = self.cpu.num_free_pages
        for field in (*STATE_FIELDS, "kv"):
            got, want = getattr(self.device, field), getattr(self.cpu, field)
            if field == "free_pages":
                got, want = got[:num_free], want[:num_free]
            assert torch.equal(got, want), f"{field} after {name}"


def random_step(rng, pair, held):
    """Makes one random call; returns the pages that are held after it."""
    rows = int32(*rng.permutation(pair.max_branches)[: rng.integers(1, 9)])
    n, room = len(rows), pair.page_table.shape[1] * pair.page_size
    kind = rng.integers(0, 6)
    if kind < 3:
        max_len = [1, 3, 2 * pair.page_size + 1][kind]
        q_lens = torch.minimum(torch.from_numpy(rng.integers(0, max_len + 1, n)), room - pair.seq_lens[rows]).int()
        if kind == 0 and (pair.seq_lens[rows] < room).all():
            pair.append(rows)
        else:
            pair.append(rows, q_lens, more_slots=int(rng.integers(0, 3)))
    elif kind == 3:
        src = int32(*rng.integers(0, pair.max_branches, n))
        lens = int32(*(int(rng.integers(0, pair.seq_lens[row] + 1)) for row in src))
        pair.call("fork_branches", src, rows, lens if rng.integers(0, 2) else None)
    elif kind == 4:
        pair.call("hold_pages", int32(*held), False)
        held = rng.choice(torch.nonzero(pair.refcount).flatten().numpy(), 5) if pair.refcount.any() else []
        pair.call("hold_pages", int32(*held), True)
    else:
        pair.call("fork_branches", rows[:1], rows[:1], int32(0))
        max_pages = int(min(len(held), pair.page_table.shape[1]))
        num_pages = int(rng.integers(0, max_pages + 1))
        num_tokens = max(0, num_pages * pair.page_size - int(rng.integers(0, pair.page_size)))
        pair.call("adopt_pages", int32(*held[:num_pages]), int(rows[0]), num_tokens)
    return held


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 16]))
def test_random_calls(seed, page_size):
    rng = np.random.default_rng(seed)
    pair = Pair(num_pages=20, page_size=page_size, max_branches=8, num_layers=1)
    held = []
    for _ in range(12):
        held = random_step(rng, pair, held)
        if pair.status[STATUS_ERROR] != OK:
            assert pair.status[STATUS_ERROR] == OUT_OF_PAGES
            pair.cpu.status[STATUS_ERROR] = pair.device.status[STATUS_ERROR] = OK


def test_status_words_are_those_of_the_ops():
    assert (page_state.OK, page_state.OUT_OF_PAGES, page_state.BAD_ARGUMENT) == (OK, OUT_OF_PAGES, BAD_ARGUMENT)
    words = (page_state.ERROR, page_state.NUM_FREE, page_state.NUM_NEEDED, page_state.PEAK_USED)
    assert [int(word) for word in words] == [
        ops.pages.STATUS_ERROR, ops.pages.STATUS_NUM_FREE, ops.pages.STATUS_NUM_NEEDED, ops.pages.STATUS_PEAK_USED
    ]  # fmt: skip


def test_more_rows_than_a_block():
    """Sums are carried from block to block, and sharers are in different blocks."""
    pair = Pair(num_pages=4000, page_size=2, max_branches=1200, max_pages_per_branch=4, num_layers=1)
    rng = np.random.default_rng(0)
    pair.append(int32(*rng.permutation(1200)[:1100]), torch.from_numpy(rng.integers(0, 4, 1100)).int())
    src, dst = rng.integers(0, 1200, 70), rng.permutation(1200)[:70]
    pair.call("fork_branches", int32(*src), int32(*dst))
    pair.call("fork_branches", int32(*[src[0]] * 66), int32(*dst[:66]))
    rows = int32(*rng.permutation(1200))
    pair.append(rows)
    pages = int32(*pair.page_table[:, 0][pair.seq_lens > 0])
    assert len(pages) > 1024
    pair.call("hold_pages", pages)
    pair.call("fork_branches", rows[:70], rows[:70], torch.zeros(70, dtype=torch.int32))
    pair.call("hold_pages", pages[torch.from_numpy(rng.permutation(len(pages)))], False)


def test_more_pages_than_a_block():
    pair = Pair(num_pages=5000, page_size=1, max_branches=4, max_pages_per_branch=1200, num_layers=1)
    pair.append(int32(2, 0), int32(1150, 1040))
    pair.call("fork_branches", int32(2, 0, 2), int32(0, 2, 3), int32(1100, 1030, 1))
    pair.call("fork_branches", int32(0, 3), int32(3, 2))
    pages = pair.page_table[0, :1100].clone()
    pair.call("hold_pages", pages)
    pair.call("fork_branches", int32(0, 2, 3), int32(0, 2, 3), int32(5, 0, 0))
    pair.call("adopt_pages", pages, 2, 1100)


def test_sharers_copy_in_the_order_of_rows_and_the_last_one_writes_in_place():
    pair = Pair()
    pair.append(int32(3), int32(6))
    pair.call("fork_branches", int32(3, 3, 3), int32(0, 5, 1))
    slots = pair.append(int32(5, 3, 0, 1), int32(1, 0, 3, 1))  # row 3 appends nothing, so all of the others copy
    assert pair.status.tolist() == [OK, 24 - 6, 0, 6]
    assert (slots // 4).tolist() == [2, 3, 3, 4, 5]
    pair.append(int32(3))
    assert pair.num_free_pages == 24 - 6


def test_fork_in_place_of_rows_that_are_read():
    pair = Pair()
    pair.append(int32(0, 1, 2, 3), int32(3, 5, 7, 9))
    for src, lens in (((1, 2, 3, 0), None), ((2, 2, 0, 2), None), ((3, 0, 1, 0), (2, 7, 0, 5)), ((0, 0, 0, 0), None)):
        pair.call("fork_branches", int32(*src), int32(0, 1, 2, 3), lens and int32(*lens))
    pair.append(int32(2, 0))  # fewer pages than were in use before: the peak stays
    assert pair.num_pages - pair.num_free_pages < pair.peak_used_pages


def test_nothing_to_do():
    pair = Pair(num_layers=0)
    nothing = int32()
    pair.append(nothing, more_slots=2)
    pair.append(int32(1, 0), int32(0, 0))
    pair.call("fork_branches", nothing, nothing)
    pair.call("hold_pages", nothing, False)
    pair.call("adopt_pages", nothing, 3, 0)


def test_out_of_pages_changes_nothing_and_holds_until_it_is_reset():
    pair = Pair(num_pages=4)
    pair.append(int32(0), int32(6))
    pair.call("fork_branches", int32(0, 0), int32(1, 2))
    before = snapshot(pair.device)
    assert pair.append(int32(0, 1, 2), int32(1, 1, 3), more_slots=1).tolist() == [-1] * 6
    before["status"] = int32(OUT_OF_PAGES, 2, 3, 2)
    assert_unchanged(pair.device, before)
    assert pair.append(int32(3)).tolist() == [-1]
    pair.call("fork_branches", int32(0), int32(3))
    pair.call("hold_pages", int32(0))
    pair.call("hold_pages", int32(0), False)
    pair.call("adopt_pages", int32(0), 3, 4)
    assert_unchanged(pair.device, before)


def refused_calls():
    """Returns (name, a change of the state before or None, arguments) of calls that are refused by value."""
    fork, append, hold, adopt = "fork_branches", "append_slots", "hold_pages", "adopt_pages"
    yield from ((fork, None, args) for args in (
        (int32(0, 8), int32(5, 6)), (int32(0, -1), int32(5, 6)), (int32(I32_MAX), int32(0)), (int32(0), int32(8)),
        (int32(0), int32(-(2**31))), (int32(0, 1), int32(2, 2)), (int32(0), int32(1), int32(7)),
        (int32(0), int32(1), int32(-1)), (int32(*[0] * 9), int32(0, 1, 2, 3, 4, 5, 6, 7, 0)),
    ))  # fmt: skip
    yield from ((append, None, args) for args in (
        (1, int32(8)), (1, int32(-1)), (2, int32(0, 0)), (1, int32(0, 1)), (4, int32(0, 1), int32(4, 1)),
        (4, int32(0, 1), int32(5, -1)), (43, int32(0), int32(43)), (1, int32(0), int32(I32_MAX)),
        (1, int32(0, 1), int32(I32_MAX, I32_MAX)), (0, int32(0)),
    ))  # fmt: skip
    yield from ((hold, None, args) for args in (
        (int32(24),), (int32(-1),), (int32(0, 7),), (int32(0, 0), False), (int32(0, 7), False), (int32(0, -9), False),
        (int32(1, 2, 0, 1), False), (int32(24), False),
    ))  # fmt: skip
    yield from ((adopt, None, args) for args in (
        (int32(0), 0, 4), (int32(7), 2, 4), (int32(24), 2, 4), (int32(0, -1), 2, 8),
    ))  # fmt: skip
    fork_args, append_args = (int32(0, 1), int32(2, 0)), (3, int32(1, 0), int32(2, 1))
    for field, index, value in (
        ("seq_lens", 1, 49), ("seq_lens", 1, -1), ("seq_lens", 1, I32_MAX), ("page_table", (1, 0), 24),
        ("page_table", (1, 0), -(2**31)), ("status", 1, -1), ("status", 1, 25), ("status", 1, -(2**31)),
    ):  # fmt: skip
        yield fork, (field, index, value), fork_args
        yield fork, (field, index, value), (int32(0), int32(1))
        yield append, (field, index, value), append_args
    yield append, ("free_pages", slice(0, 24), 24), append_args
    for value in (-1, 25, I32_MAX):
        yield hold, ("status", 1, value), (int32(0),)
        yield hold, ("status", 1, value), (int32(0), False)
        yield adopt, ("status", 1, value), (int32(0), 2, 4)


@pytest.mark.parametrize(("name", "change", "args"), list(refused_calls()))
def test_refused_values_change_nothing_but_the_status(name, change, args):
    pool = make_pool(num_layers=1)
    PageOps.append_slots(pool.state, pool.kv, torch.empty(9, dtype=torch.int64), int32(0, 1), int32(6, 3))
    if change is not None:
        field, index, value = change
        getattr(pool, field)[index] = value
    before = snapshot(pool)
    slots = None
    if name == "append_slots":
        slots, *args = torch.full((args[0],), 7), *args[1:]
        args = (pool.kv, slots, *args)
    with pytest.raises(ValueError, match="expected"):
        getattr(ops, name)(pool.state, *args)
    assert_unchanged(pool, before)
    getattr(PageOps, name)(pool.state, *args)
    before["status"][STATUS_ERROR] = BAD_ARGUMENT
    assert_unchanged(pool, before)
    assert slots is None or (slots == -1).all()


def test_the_pool_raises_what_a_device_could_only_mark():
    pool = make_pool()
    rows = pool.allocate_rows(2)
    PageOps.fork_branches(pool.state, int32(0, 0), int32(1, 1))
    with pytest.raises(ValueError, match="PagePool: a page op on cpu was given rows, lengths or pages out of range"):
        pool.append(rows)
    assert len(pool.append(rows)) == 2
    pool.check_integrity()


POOL = {"refcount": int32(1, 1, 0), "free_pages": int32(2, 0, 0), "page_table": int32(0, 0, 1, 0).view(2, 2),
        "seq_lens": int32(3, 4), "status": int32(0, 1, 0, 2)}  # fmt: skip
GOOD = {
    "fork_branches": POOL | {"src": int32(0), "dst": int32(1), "lens": None, "page_size": 4},
    "append_slots": POOL | {"kv": torch.zeros(1, 2, 3, 2, 4, 8), "slots": torch.zeros(2).long(), "rows": int32(0, 1),
                            "q_lens": None, "page_size": 4},
    "hold_pages": {name: POOL[name] for name in ("refcount", "free_pages", "status")}
                  | {"pages": int32(0, 1), "hold": True},
    "adopt_pages": {"refcount": POOL["refcount"], "page_table": POOL["page_table"], "seq_lens": int32(3, 0),
                    "status": POOL["status"], "pages": int32(0), "row": 1, "num_tokens": 3, "page_size": 4},
}  # fmt: skip
BAD = {
    "fork_branches": [
        {"refcount": torch.zeros(3)}, {"refcount": int32(1, 1, 1).view(1, 3)}, {"free_pages": int32(1)},
        {"page_table": int32(1, 2)}, {"page_table": int32(0, 0, 1, 0).view(2, 2).T}, {"seq_lens": int32(1)},
        {"status": int32(0, 1, 0)}, {"status": torch.tensor([0, 1, 0, 2])}, {"src": torch.tensor([0])},
        {"dst": int32(0, 1)}, {"lens": int32(0, 1)}, {"lens": torch.zeros(1)}, {"page_size": 0}, {"src": int32(0)[0]},
    ],
    "append_slots": [
        {"kv": torch.zeros(1, 2, 3, 2, 5, 8)}, {"kv": torch.zeros(1, 2, 4, 2, 4, 8)}, {"slots": int32(0, 1)},
        {"kv": torch.zeros(1, 2, 3, 4, 2, 8).transpose(3, 4)}, {"slots": torch.zeros(4).long()[::2]},
        {"slots": torch.zeros(1, 2).long()}, {"rows": torch.tensor([0, 1])}, {"q_lens": int32(1)},
    ],
    "hold_pages": [{"pages": torch.tensor([0])}, {"pages": int32(0, 1, 2, 3)[::2]}, {"free_pages": int32(1)}],
    "adopt_pages": [
        {"row": 2}, {"row": -1}, {"num_tokens": 5}, {"num_tokens": -1}, {"num_tokens": 0}, {"page_size": 2**31},
        {"pages": int32(0, 0, 0), "num_tokens": 12}, {"pages": int32(0)[0]}, {"page_table": torch.zeros(2, 2)},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("op", "change"), [(op, change) for op in BAD for change in BAD[op]])
def test_same_errors_as_the_native_op(op, change):
    assert_same_error(op, GOOD[op], change)

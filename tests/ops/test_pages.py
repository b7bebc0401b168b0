"""The page ops on the CPU: they change the state as the reference does, and refuse to write out of bounds."""

import numpy as np
import pytest
import torch
from support.page_cases import STATE_FIELDS, assert_unchanged, make_pool, snapshot
from support.tensors import int32

from treedecode import ops, reference
from treedecode.ops.pages import STATUS_ERROR, STATUS_NUM_FREE


def test_refused_append_hands_out_no_slots_until_the_status_is_reset():
    pool = make_pool(num_pages=1)
    (row,) = pool.allocate_rows(1)
    before = snapshot(pool)
    slots = torch.full((5,), 7)
    rows, q_lens = torch.tensor([row]), torch.tensor([5], dtype=torch.int32)
    ops.append_slots(pool.state, pool.kv, slots, rows, q_lens)
    assert slots.tolist() == [-1] * 5
    assert pool.status.tolist() == [ops.pages.OUT_OF_PAGES, 1, 2, 0]
    # the error is sticky: later ops do nothing
    slots = torch.full((1,), 7)
    ops.append_slots(pool.state, pool.kv, slots, rows)
    assert slots.tolist() == [-1]
    before["status"] = torch.tensor([ops.pages.OUT_OF_PAGES, 1, 2, 0], dtype=torch.int32)
    assert_unchanged(pool, before)


@pytest.mark.parametrize(
    ("field", "index", "value", "message"),
    [
        ("seq_lens", 1, 49, "seq_lens: expected lengths in 0 .. 48, got 49 at index 1"),
        ("seq_lens", 1, -1, "seq_lens: expected lengths in 0 .. 48, got -1 at index 1"),
        ("seq_lens", 1, 2**31 - 1, "seq_lens: expected lengths in 0 .. 48, got 2147483647"),
        ("page_table", (1, 0), 24, "page_table: expected page ids in 0 .. 23, got 24 at index 12"),
        ("page_table", (1, 0), -(2**31), "page_table: expected page ids in 0 .. 23, got -2147483648"),
        ("status", 1, -1, "status: expected num_free in 0 .. 24, got -1"),
        ("status", 1, 25, "status: expected num_free in 0 .. 24, got 25"),
        ("free_pages", slice(0, 24), 24, "free_pages: expected page ids in 0 .. 23, got 24"),
    ],
)
def test_broken_state_is_refused(field, index, value, message):
    """Lengths and page ids are used as addresses: out of range, they would write to other memory."""
    pool = make_pool()
    pool.append(pool.allocate_rows(3)[:2], [6, 3])
    getattr(pool, field)[index] = value
    before = snapshot(pool)
    slots = torch.empty(3, dtype=torch.int64)
    calls = [lambda: ops.append_slots(pool.state, pool.kv, slots, int32(1, 0), int32(2, 1))]
    if field != "free_pages":
        calls += [
            lambda: ops.fork_branches(pool.state, int32(0, 1), int32(2, 0)),
            lambda: ops.fork_branches(pool.state, int32(0), int32(1)),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert_unchanged(pool, before)


def test_a_page_table_without_columns():
    pool = make_pool()
    pool.append(pool.allocate_rows(1), [6])
    state = pool.state._replace(page_table=torch.zeros(8, 0, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"seq_lens: expected lengths in 0 .. 0, got 6"):
        ops.fork_branches(state, int32(0), int32(1))


def test_arguments_that_are_no_vectors():
    pool = make_pool()
    pool.append(pool.allocate_rows(2)[:1], [6])
    scalar = torch.tensor(0, dtype=torch.int32)
    for call in (
        lambda: ops.hold_pages(pool.state, scalar),
        lambda: ops.adopt_pages(pool.state, scalar, 1, 4),
        lambda: ops.fork_branches(pool.state, scalar, scalar),
    ):
        with pytest.raises(ValueError, match=r"(pages|src): expected shape \[n\] = \[\*\], got \[\]"):
            call()
    with pytest.raises(TypeError, match="pages: expected a tensor, got None"):
        ops.hold_pages(pool.state, None)
    with pytest.raises(TypeError, match="kv: expected a tensor, got None"):
        ops.copy_pages(None, int32(0), int32(1))


def test_ops_match_the_reference_in_every_tensor():
    """Random calls run on two copies of one state; page ids and the free stack must agree too."""
    rng = np.random.default_rng(0)
    native, plain = make_pool(num_pages=20), make_pool(num_pages=20)
    for pool in (native, plain):
        pool.allocate_rows(8)
    held: list[int] = []
    refused = 0
    for step in range(400):
        n = int(rng.integers(1, 9))
        rows = rng.permutation(8)[:n]
        src = rng.integers(0, 8, n)
        lens = [int(rng.integers(0, native.seq_lens[row] + 1)) for row in src]
        kind = rng.integers(0, 6)
        calls = [("fork_branches", int32(*src), int32(*rows), int32(*lens) if kind else None)]
        if kind in (1, 2, 3):
            q_lens = rng.integers(0, 6, n)
            room = 12 * 4 - native.seq_lens[rows].numpy()
            q_lens = np.minimum(q_lens, room)
            calls = [("append_slots", int32(*rows), int32(*q_lens))]
        if kind == 4:
            used = torch.nonzero(native.refcount).flatten().tolist()
            pages = rng.permutation(used)[:3].tolist()
            calls = [("hold_pages", int32(*pages), True), ("hold_pages", int32(*held), False)]
            held = pages
        if kind == 5:
            empty = torch.nonzero(native.seq_lens == 0).flatten().tolist()
            if empty and held:
                calls = [("adopt_pages", int32(*held), empty[0], len(held) * 4 - 1)]
        for name, *args in calls:
            for pool, module in ((native, ops), (plain, reference)):
                if name == "append_slots":
                    slots = torch.empty(int(args[1].sum()) + step % 3, dtype=torch.int64)
                    module.append_slots(pool.state, pool.kv, slots, *args)
                    pool.kv.view(-1)[slots[slots >= 0]] = float(step)  # some content to copy
                    pool.slots = slots
                else:
                    getattr(module, name)(pool.state, *args)
            for field in STATE_FIELDS:
                got, want = getattr(native, field), getattr(plain, field)
                if field == "free_pages":
                    got, want = got[: native.num_free_pages], want[: plain.num_free_pages]
                assert torch.equal(got, want), f"step {step}: {field} after {name}"
            assert torch.equal(native.kv, plain.kv)
            if name == "append_slots":
                assert torch.equal(native.slots, plain.slots)
        if native.status[STATUS_ERROR]:
            refused += 1
            native.status[STATUS_ERROR] = plain.status[STATUS_ERROR] = 0
        native.check_integrity(held)
    assert 5 < refused < 200


def test_copy_pages_matches_reference_and_skips_negative_targets():
    kv = torch.randn(3, 2, 8, 2, 4, 4)
    got, want = kv.clone(), kv.clone()
    args = int32(0, 1, 5, 1), int32(2, 3, -1, 7), int32(4, 1, 2, 0)
    ops.copy_pages(got, *args)
    reference.copy_pages(want, *args)
    assert torch.equal(got, want)
    assert torch.equal(got[:, :, 3, :, 1:], kv[:, :, 3, :, 1:])
    ops.copy_pages(got, args[0], args[1])
    reference.copy_pages(want, args[0], args[1])
    assert torch.equal(got, want)
    assert torch.equal(got[:, :, 7], got[:, :, 1])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((int32(8), int32(0)), "src: expected page ids in 0 .. 7, got 8"),
        ((int32(0), int32(8)), "dst: expected page ids in 0 .. 7, got 8"),
        ((int32(0), int32(1), int32(5)), "num_tokens: expected lengths in 0 .. 4, got 5"),
        ((int32(0), int32(1, 2)), "dst: expected shape the shape of src"),
    ],
)
def test_copy_pages_bad_arguments(args, message):
    kv = torch.zeros(1, 2, 8, 2, 4, 4)
    with pytest.raises(ValueError, match=message):
        ops.copy_pages(kv, *args)
    if "page ids" in message:
        with pytest.raises(ValueError, match="src, dst: expected page ids below 8"):
            reference.copy_pages(kv, *args)
    with pytest.raises(ValueError, match="kv: expected each page's"):
        ops.copy_pages(kv.transpose(3, 4), int32(0), int32(1))


def test_opcheck():
    pool = make_pool()
    rows = pool.allocate_rows(3)
    pool.append(rows, [3, 2, 0])
    native, state = torch.ops.treedecode, pool.state[:5]
    torch.library.opcheck(native.fork_branches, (*state, int32(0, 1), int32(1, 2), None, 4))
    torch.library.opcheck(native.fork_branches, (*state, int32(0, 1), int32(1, 2), int32(1, 1), 4))
    slots = torch.zeros(3, dtype=torch.int64)
    torch.library.opcheck(native.append_slots, (*state, pool.kv, slots, int32(0, 1), int32(1, 2), 4))
    torch.library.opcheck(native.append_slots, (*state, pool.kv, slots, int32(0, 1, 2), None, 4))
    hold = (pool.refcount, pool.free_pages, pool.status, int32(0), True)
    torch.library.opcheck(native.hold_pages, hold)
    pool.clear([2])
    adopt = (pool.refcount, pool.page_table, pool.seq_lens, pool.status, int32(0), 2, 3, 4)
    torch.library.opcheck(native.adopt_pages, adopt)
    torch.library.opcheck(native.copy_pages, (pool.kv, int32(0), int32(5), None))
    torch.library.opcheck(native.copy_pages, (pool.kv, int32(0), int32(5), int32(2)))


def test_slots_are_at_least_as_many_as_tokens():
    pool = make_pool(num_pages=6, page_size=4, max_branches=3)
    before = snapshot(pool)
    for module in (ops, reference):
        with pytest.raises(ValueError, match=r"slots: expected at least"):
            module.append_slots(pool.state, pool.kv, torch.zeros(2, dtype=torch.int64), int32(0, 1), int32(1, 2))
        assert_unchanged(pool, before)


def test_a_row_holds_no_more_tokens_than_its_length_can_say():
    """The table has room for 2^31 + 2^30 tokens; a length beyond 2^31 - 1 would wrap around and be negative."""
    page_size = 2**30
    pool = make_pool(num_pages=3, page_size=page_size, max_branches=1, max_pages_per_branch=3, num_layers=0)
    pool.seq_lens[0], pool.page_table[0, :2] = 2**31 - 3, int32(0, 1)
    pool.refcount[:2] = 1
    pool.status[STATUS_NUM_FREE] = 1  # free pages: the third
    slots = torch.empty(4, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"q_lens: expected lengths from 0 to the room left in the row's page table, 2, got 3"
    ):
        ops.append_slots(pool.state, pool.kv, slots, int32(0), int32(3))
    ops.append_slots(pool.state, pool.kv, slots, int32(0), int32(2))
    assert pool.seq_lens[0] == 2**31 - 1

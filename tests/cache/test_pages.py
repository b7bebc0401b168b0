"""PagePool against a shadow model that keeps every branch's tokens and KV by value, and the page ops against the
reference."""

import numpy as np
import pytest
import torch
from support.page_cases import STATE_FIELDS, Writer, assert_unchanged, make_pool, snapshot

from treedecode import ops, reference
from treedecode.cache.page_pool import OutOfPages


def test_fork_shares_pages_and_append_copies_the_partial_one_once():
    pool = make_pool()
    writer = Writer(pool)
    root, *children = pool.allocate_rows(3).tolist()
    (prompt,) = writer.append([root], [6])
    pool.fork([root, root], children)
    assert pool.num_free_pages == 24 - 2
    assert pool.refcount[:2].tolist() == [3, 3]
    new = writer.append([root, *children], [1, 1, 1])
    # two of the three sharers copied, the last one wrote in place
    assert pool.num_free_pages == 24 - 4
    assert pool.refcount[:4].tolist() == [3, 1, 1, 1]
    assert pool.page_table[[root, *children], 1].tolist() == [2, 3, 1]
    for row, values in zip([root, *children], new, strict=True):
        writer.assert_holds(row, prompt + values)
    pool.check_integrity()


def test_fork_at_a_page_border_copies_nothing():
    pool = make_pool()
    writer = Writer(pool)
    rows = pool.allocate_rows(2)
    (prompt,) = writer.append(rows[:1], [8])
    pool.fork(rows[:1], rows[1:])
    kv = pool.kv.clone()
    pool.append(rows)
    assert torch.equal(pool.kv, kv)
    assert pool.num_free_pages == 24 - 4
    for row in rows:
        writer.assert_holds(row, prompt)


def test_reorder_of_a_permutation():
    pool = make_pool()
    writer = Writer(pool)
    rows = pool.allocate_rows(4)
    values = writer.append(rows, [3, 5, 7, 9])
    used = pool.num_free_pages
    pool.fork(rows[[1, 2, 3, 0]], rows)
    assert pool.num_free_pages == used
    for row, old in zip(rows, [1, 2, 3, 0], strict=True):
        writer.assert_holds(row, values[old])
    pool.check_integrity()


def test_reorder_with_duplicates_and_dropped_rows():
    """A row that is a parent and is overwritten itself; a row nobody continues; a page whose last reference moves."""
    pool = make_pool()
    writer = Writer(pool)
    rows = pool.allocate_rows(4)
    values = writer.append(rows, [3, 5, 7, 9])
    pool.fork(rows[[2, 2, 0, 2]], rows)
    for row, old in zip(rows, [2, 2, 0, 2], strict=True):
        writer.assert_holds(row, values[old])
    pool.check_integrity()
    new = writer.append(rows, [1, 1, 1, 1])
    for row, old, tail in zip(rows, [2, 2, 0, 2], new, strict=True):
        writer.assert_holds(row, values[old] + tail)
    pool.check_integrity()


def test_reorder_swap_with_truncation():
    pool = make_pool()
    writer = Writer(pool)
    rows = pool.allocate_rows(2)
    a, b = writer.append(rows, [10, 11])
    pool.fork(rows[::-1].copy(), rows, [5, 9])
    writer.assert_holds(rows[0], b[:5])
    writer.assert_holds(rows[1], a[:9])
    pool.check_integrity()


def test_last_sharer_writes_in_place_across_calls():
    pool = make_pool()
    rows = pool.allocate_rows(2)
    pool.append(rows[:1], [2])
    pool.fork(rows[:1], rows[1:])
    pool.append(rows[:1])
    free = pool.num_free_pages
    pool.append(rows[1:])
    assert pool.num_free_pages == free


def test_truncate_into_a_shared_page_copies_on_append():
    pool = make_pool()
    writer = Writer(pool)
    rows = pool.allocate_rows(2)
    (prompt,) = writer.append(rows[:1], [8])
    pool.fork(rows[:1], rows[1:], [7])
    (tail,) = writer.append(rows[1:], [1])
    writer.assert_holds(rows[0], prompt)
    writer.assert_holds(rows[1], prompt[:7] + tail)
    pool.truncate(rows, [0, 2])
    writer.assert_holds(rows[1], prompt[:2])
    pool.check_integrity()


def test_copy_on_write_copies_the_tokens_in_use_only():
    pool = make_pool()
    pool.kv.fill_(float("nan"))
    writer = Writer(pool)
    rows = pool.allocate_rows(2)
    (prompt,) = writer.append(rows[:1], [8])
    pool.fork(rows[:1], rows[1:], [6])
    (tail,) = writer.append(rows[1:], [1])
    writer.assert_holds(rows[0], prompt)
    writer.assert_holds(rows[1], prompt[:6] + tail)
    k_pages, _ = pool.layer(0)
    assert k_pages[pool.pages(rows[1])[1], 3].isnan().all()


def test_out_of_pages_is_atomic():
    pool = make_pool(num_pages=4)
    writer = Writer(pool)
    rows = pool.allocate_rows(3)
    writer.append(rows[:1], [6])
    pool.fork(rows[[0, 0]], rows[1:])
    before = snapshot(pool)
    with pytest.raises(OutOfPages, match="out of pages: 3 needed, 2 free") as raised:  # two copies and a new page
        pool.append(rows, [1, 1, 3])
    assert (raised.value.num_needed, raised.value.num_free) == (3, 2)
    assert_unchanged(pool, before)
    pool.append(rows)  # fits exactly
    assert pool.num_free_pages == 0
    pool.check_integrity()


def test_refused_append_hands_out_no_slots_until_the_status_is_reset():
    pool = make_pool(num_pages=1)
    (row,) = pool.allocate_rows(1)
    before = snapshot(pool)
    slots = torch.full((5,), 7)
    rows, q_lens = torch.tensor([row]), torch.tensor([5], dtype=torch.int32)
    ops.append_slots(pool.state, pool.kv, slots, rows, q_lens)
    assert slots.tolist() == [-1] * 5
    assert pool.status.tolist() == [ops.pages.OUT_OF_PAGES, 1, 2, 0]
    # the error is sticky: what follows in a stream of ops does nothing
    slots = torch.full((1,), 7)
    ops.append_slots(pool.state, pool.kv, slots, rows)
    assert slots.tolist() == [-1]
    before["status"] = torch.tensor([ops.pages.OUT_OF_PAGES, 1, 2, 0], dtype=torch.int32)
    assert_unchanged(pool, before)


def test_pages_outlive_their_row_while_retained():
    pool = make_pool()
    writer = Writer(pool)
    row, other = pool.allocate_rows(2)
    (prompt,) = writer.append([row], [9])
    held = pool.pages(row)[:2]
    pool.retain(held)
    pool.release([row])
    pool.check_integrity(held=held)
    pool.adopt(other, held, 7)  # part of the second page only
    writer.assert_holds(other, prompt[:7])
    (tail,) = writer.append([other], [1])
    writer.assert_holds(other, prompt[:7] + tail)
    assert pool.pages(other)[1] != held[1]
    pool.release([other])
    assert pool.num_free_pages == 24 - 2
    pool.drop(held)
    assert pool.num_free_pages == 24
    pool.check_integrity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.fork([0], [5]), "dst_rows: row 5 is not allocated"),
        (lambda p: p.fork([5], [0]), "src_rows: row 5 is not allocated"),
        (lambda p: p.fork([0, 1], [2, 2]), "dst: expected each row once, .* got 2 at index 1"),
        (lambda p: p.fork([0, 1], [2]), r"dst: expected shape the shape of src = \[2\], got \[1\]"),
        (lambda p: p.fork([0], [1], [7]), "lens: expected lengths from 0 to the source's 6, got 7 at index 0"),
        (lambda p: p.fork([0], [1], [-1]), "lens: expected lengths"),
        (lambda p: p.append([0, 0]), "rows: expected each row once"),
        (lambda p: p.append([99]), "rows: row 99 is not allocated"),
        (lambda p: p.append([-1]), "rows: expected rows in 0 .. 7, got -1 at index 0"),
        (lambda p: p.append([[0]]), r"rows: expected shape \[n\] = \[\*\], got \[1, 1\]"),
        (lambda p: p.append([0, 1], [1, -1]), "q_lens: expected lengths from 0 to the room .* got -1 at index 1"),
        (lambda p: p.append([0], [43]), "q_lens: expected .* room left in the row's page table, 42, got 43"),
        (lambda p: p.truncate([0], [7]), "lens: expected"),
        (lambda p: p.release([5]), "rows: row 5 is not allocated"),
        (lambda p: p.release([1, 1]), "dst: expected each row once"),
        (lambda p: p.adopt(0, [0], 4), "row: expected an empty row"),
        (lambda p: p.adopt(2, [0], 5), "num_tokens: expected a length that ends in the last page"),
        (lambda p: p.adopt(2, [7], 4), "pages: expected pages in use"),
        (lambda p: p.adopt(2, [24], 4), "pages: expected page ids in 0 .. 23, got 24"),
        (lambda p: p.adopt(2, [0] * 13, 52), "pages: expected at most as many as a row holds, 12, got 13"),
        (lambda p: p.retain([0, 7]), "pages: expected pages in use, none with refcount 0, got 7 at index 1"),
        (lambda p: p.drop([0, 0]), "pages: expected no page more often than its references, .* 1, got 0 at index 1"),
        (lambda p: p.retain([-1]), "pages: expected page ids in 0 .. 23, got -1"),
    ],
)
def test_bad_arguments_change_nothing(change, message):
    pool = make_pool()
    pool.append(pool.allocate_rows(3)[:2], [6, 3])
    before = snapshot(pool)
    with pytest.raises(ValueError, match=message):
        change(pool)
    assert_unchanged(pool, before)
    pool.check_integrity()


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
    """Lengths and page ids are addresses: out of range they would be written to wherever they point."""
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


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_ops_match_the_reference_in_every_tensor():
    """Random calls on two copies of one state; page ids and the free stack must agree too."""
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
        if native.status[0]:
            refused += 1
            native.status[0] = plain.status[0] = 0
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
    """A table of 2^31 + 2^30 tokens: a length beyond 2^31 - 1 would wrap around and be negative."""
    page_size = 2**30
    pool = make_pool(num_pages=3, page_size=page_size, max_branches=1, max_pages_per_branch=3, num_layers=0)
    pool.seq_lens[0], pool.page_table[0, :2] = 2**31 - 3, int32(0, 1)
    pool.refcount[:2] = 1
    pool.status[1] = 1  # free pages: the third
    slots = torch.empty(4, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"q_lens: expected lengths from 0 to the room left in the row's page table, 2, got 3"
    ):
        ops.append_slots(pool.state, pool.kv, slots, int32(0), int32(3))
    ops.append_slots(pool.state, pool.kv, slots, int32(0), int32(2))
    assert pool.seq_lens[0] == 2**31 - 1

"""Branches of a PagePool hold the values written to them after forks, reorders, truncation and failed calls."""

import pytest
import torch
from support.page_cases import Writer, assert_unchanged, make_pool, snapshot

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
    """A parent is overwritten itself, a row has no children, and the last reference of a page moves."""
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
        (lambda p: p.append([0, 5]), "rows: row 5 is not allocated"),
        (lambda p: p.append([5, 0]), "rows: row 5 is not allocated"),
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

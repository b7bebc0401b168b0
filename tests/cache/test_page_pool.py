"""PagePool: rows, sizes, integers of any kind, and the integrity check."""

import numpy as np
import pytest
import torch
from support.page_cases import make_pool

from treedecode.cache.page_pool import OutOfBranches


def test_pages_come_in_the_documented_order():
    pool = make_pool(page_size=1)
    rows = pool.allocate_rows(3)
    pool.append(rows, [2, 1, 3])
    assert [pool.pages(row).tolist() for row in rows] == [[0, 1], [2], [3, 4, 5]]
    pool.clear(rows[[2, 0]])  # pushed 5 4 3 1 0
    pool.append(rows[:1], [4])
    assert pool.pages(rows[0]).tolist() == [0, 1, 3, 4]


def test_rows_run_out():
    pool = make_pool(max_branches=4)
    assert pool.allocate_rows(3).tolist() == [0, 1, 2]
    with pytest.raises(OutOfBranches, match="2 rows needed, 1 of 4 free"):
        pool.allocate_rows(2)
    assert pool.num_free_rows == 1
    pool.release([1])
    assert pool.allocate_rows(2).tolist() == [1, 3]


def test_integrity_check_names_what_is_broken():
    def broken(change, message):
        pool = make_pool()
        rows = pool.allocate_rows(2)
        pool.append(rows, [5, 5])
        change(pool)
        with pytest.raises(AssertionError, match=message):
            pool.check_integrity()

    def set_at(name, index, value):
        return lambda pool: getattr(pool, name).__setitem__(index, value)

    broken(set_at("refcount", 0, 2), "page 0 has refcount 2 but 1 references")
    broken(set_at("page_table", (1, 0), 0), "page 0 has refcount 1 but 2 references")
    broken(set_at("page_table", (1, 0), 3), "row 1 has a page twice")
    broken(set_at("page_table", (1, 0), 99), "row 1 has a page out of range")
    broken(set_at("free_pages", 0, 22), "on the free stack twice")
    broken(set_at("free_pages", 0, 0), "not the set of pages without references")
    broken(set_at("status", 1, 19), "not the set of pages without references")
    broken(set_at("status", 0, 1), "status has error 1")
    broken(set_at("seq_lens", 5, 1), "row 5 is free but has 1 tokens")
    broken(lambda pool: pool.retain([0]), "page 0 has refcount 2 but 1 references")


def test_arguments_are_integers_of_any_kind():
    pool = make_pool()
    pool.allocate_rows(2)
    pool.append(torch.tensor([1, 0]), (2, 3))
    pool.append(np.array([0, 0, 1, 1], dtype=np.uint8)[::3], np.array([1, 1]))
    pool.append([], [])
    assert pool.seq_lens[:2].tolist() == [4, 3]
    with pytest.raises(TypeError, match="expected integers, got float64"):
        pool.truncate([0], [1.0])
    with pytest.raises(ValueError, match="expected 32-bit integers, got"):
        pool.truncate([0], [2**32])


@pytest.mark.parametrize(
    ("name", "size"), [("num_pages", 0), ("page_size", 0), ("max_branches", 0), ("num_layers", -1)]
)
def test_bad_sizes(name, size):
    with pytest.raises(ValueError, match=f"{name}: expected at least"):
        make_pool(**{name: size})

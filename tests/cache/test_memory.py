"""Sizes of the cache: units, defaults, and errors that name the arguments."""

import os
import sys

import pytest
import torch

from treedecode.cache.memory import kv_memory_bytes, lazy_zeros, out_of_memory_named
from treedecode.cache.page_pool import PagePool

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kv_memory", "num_bytes"),
    [(10, 10), (1e6, 10**6), ("10", 10), ("10 B", 10), ("1.5kB", 1500), ("2GB", 2 * 10**9), ("2 gib", 2 << 30)],
)
def test_sizes(kv_memory, num_bytes):
    assert kv_memory_bytes(kv_memory, CPU, useful=1) == num_bytes


def test_default_is_the_useful_part_of_an_eighth():
    eighth = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8
    assert kv_memory_bytes(None, CPU, useful=1000) == 1000
    assert kv_memory_bytes(None, CPU, useful=1 << 60) == eighth


@pytest.mark.parametrize("kv_memory", ["", "GiB", "2 apples", "inf", "nan"])
def test_strings_that_name_no_size(kv_memory):
    with pytest.raises(ValueError, match=r'^kv_memory: expected bytes or a string like "2GiB", got '):
        kv_memory_bytes(kv_memory, CPU, useful=1)


@pytest.mark.parametrize("kv_memory", [True, float("nan"), float("inf"), [1]])
def test_values_that_are_no_size(kv_memory):
    with pytest.raises(TypeError, match=r'^kv_memory: expected bytes or a string like "2GiB", got '):
        kv_memory_bytes(kv_memory, CPU, useful=1)


def test_a_failed_allocation_names_the_arguments():
    message = "kv_memory: 8EiB, max_branches: 7 take more memory than there is"
    with pytest.raises(MemoryError, match=message), out_of_memory_named("8EiB", 7):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="something else"), out_of_memory_named(None, 7):
        raise RuntimeError("something else")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_pool_takes_memory_with_the_pages_that_are_used():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    pool = PagePool(
        num_layers=4, num_kv_heads=2, head_dim=64, num_pages=2**14, max_branches=4, max_pages_per_branch=2**12,
        dtype=torch.float32,
    )  # fmt: skip
    assert pool.kv.nbytes == 2**30
    made = resident() - before
    assert made < 2**24
    pages = pool.append(pool.allocate_rows(1), [64]) // pool.page_size
    assert not pool.kv[:, :, pages].any()
    pool.kv[:, :, pages] = 1
    assert resident() - before - made < 2**26


def test_more_memory_than_there_is():
    with pytest.raises(MemoryError, match="allocate"):
        lazy_zeros((2**60,), torch.float32, CPU)


def test_lazy_zeros_without_elements():
    assert lazy_zeros((0, 3), torch.bfloat16, CPU).shape == (0, 3)

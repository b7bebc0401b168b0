"""Random histories of a PagePool, compared with a shadow copy of its branches after every call."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.page_cases import Writer, assert_unchanged, make_pool, snapshot

from treedecode.cache.page_pool import OutOfBranches, OutOfPages


class PagesMachine(RuleBasedStateMachine):
    """Calls a pool in any order; `shadow` has the values that each branch must hold."""

    @initialize(page_size=st.sampled_from([1, 2, 16]))
    def start(self, page_size):
        self.pool = make_pool(
            num_pages=96 // page_size + 2, page_size=page_size, max_branches=6, max_pages_per_branch=64 // page_size
        )
        self.writer = Writer(self.pool)
        self.shadow: dict[int, list[float]] = {}  # allocated rows
        self.held: list[tuple[list[int], list[float]]] = []  # retained pages and the values in them
        self.log: list[tuple] = []  # calls that went through, for replay

    def rows(self, data, **sizes):
        return data.draw(st.lists(st.sampled_from(sorted(self.shadow)), unique=True, **sizes), label="rows")

    def do(self, name, *args):
        result = getattr(self.pool, name)(*args)
        self.log.append((name, *args))
        return result

    def append(self, rows, q_lens):
        if any(len(self.shadow[row]) + n > 64 for row, n in zip(rows, q_lens, strict=True)):
            before = snapshot(self.pool)
            with pytest.raises(ValueError, match="q_lens"):
                self.pool.append(rows, q_lens)
            assert_unchanged(self.pool, before)
            return
        before = snapshot(self.pool)
        try:
            new = self.writer.append(rows, q_lens)
        except OutOfPages as error:
            refused = error
        else:
            refused = None
        if refused:
            assert refused.num_needed > refused.num_free == self.pool.num_free_pages
            assert_unchanged(self.pool, before)
            return
        self.log.append(("append", rows, q_lens))
        size = self.pool.page_size
        for row, values in zip(rows, new, strict=True):
            begin = len(self.shadow[row]) // size
            self.shadow[row] = self.shadow[row] + values
            if values:
                written = self.pool.pages(row)[begin:]
                assert (self.pool.refcount[torch.from_numpy(written).long()] == 1).all(), "wrote to a shared page"

    @rule(n=st.integers(1, 4))
    def allocate(self, n):
        if n > self.pool.num_free_rows:
            with pytest.raises(OutOfBranches):
                self.pool.allocate_rows(n)
        else:
            self.shadow.update({int(row): [] for row in self.do("allocate_rows", n)})

    @precondition(lambda self: self.shadow)
    @rule(data=st.data())
    def extend(self, data):
        rows = self.rows(data, min_size=1)
        n = st.integers(0, 20) if data.draw(st.booleans(), label="long") else st.integers(0, 3)
        self.append(rows, data.draw(st.lists(n, min_size=len(rows), max_size=len(rows)), label="q_lens"))

    @precondition(lambda self: self.shadow)
    @rule(data=st.data(), truncated=st.booleans())
    def fork(self, data, truncated):
        dst = self.rows(data)
        src = data.draw(
            st.lists(st.sampled_from(sorted(self.shadow)), min_size=len(dst), max_size=len(dst)), label="src"
        )
        lens = [len(self.shadow[row]) for row in src]
        if truncated:
            lens = [data.draw(st.integers(0, n), label="len") for n in lens]
        self.do("fork", src, dst, lens if truncated else None)
        self.shadow.update({d: self.shadow[s][:n] for s, d, n in zip(src, dst, lens, strict=True)})

    @precondition(lambda self: self.shadow)
    @rule(data=st.data())
    def step(self, data):
        """Takes a beam step: every live row gets a random parent, then one token."""
        rows = sorted(self.shadow)
        parents = data.draw(st.lists(st.sampled_from(rows), min_size=len(rows), max_size=len(rows)), label="parents")
        self.do("fork", parents, rows)
        self.shadow = {row: self.shadow[parent] for row, parent in zip(rows, parents, strict=True)}
        self.append(rows, [1] * len(rows))

    @precondition(lambda self: self.shadow)
    @rule(data=st.data())
    def truncate(self, data):
        rows = self.rows(data, min_size=1)
        lens = [data.draw(st.integers(0, len(self.shadow[row])), label="len") for row in rows]
        self.do("truncate", rows, lens)
        self.shadow.update({row: self.shadow[row][:n] for row, n in zip(rows, lens, strict=True)})

    @precondition(lambda self: self.shadow)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data, keep):
        rows = self.rows(data, min_size=1)
        self.do("clear" if keep else "release", rows)
        for row in rows:
            del self.shadow[row]
            if keep:
                self.shadow[row] = []

    @precondition(lambda self: self.shadow)
    @rule(data=st.data())
    def retain(self, data):
        """Retains whole pages of a row, as a prefix index does."""
        (row,) = self.rows(data, min_size=1, max_size=1)
        num_whole = len(self.shadow[row]) // self.pool.page_size
        pages = self.pool.pages(row)[: data.draw(st.integers(0, num_whole))].tolist()
        if pages:
            self.do("retain", pages)
            self.held.append((pages, self.shadow[row][: len(pages) * self.pool.page_size]))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data):
        pages, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.do("drop", pages)

    @precondition(lambda self: self.held and any(not values for values in self.shadow.values()))
    @rule(data=st.data())
    def adopt(self, data):
        row = data.draw(st.sampled_from([row for row, values in self.shadow.items() if not values]))
        pages, values = data.draw(st.sampled_from(self.held))
        n = data.draw(st.integers(1, len(values)), label="num_tokens")
        self.do("adopt", row, pages[: -(-n // self.pool.page_size)], n)
        self.shadow[row] = values[:n]

    @rule()
    def replay(self):
        """Repeats all calls on a new pool, which must give the same page ids."""
        fresh = make_pool(
            num_pages=self.pool.num_pages,
            page_size=self.pool.page_size,
            max_branches=6,
            max_pages_per_branch=self.pool.page_table.shape[1],
        )
        for name, *args in self.log:
            getattr(fresh, name)(*args)
        for row in self.shadow:
            assert fresh.pages(row).tolist() == self.pool.pages(row).tolist()
        num_free = self.pool.num_free_pages
        assert fresh.free_pages[:num_free].equal(self.pool.free_pages[:num_free])

    @invariant()
    def holds_what_it_must(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity(held=[page for pages, _ in self.held for page in pages])
        for row, values in self.shadow.items():
            assert int(self.pool.seq_lens[row]) == len(values)
            self.writer.assert_holds(row, values)

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        self.pool.release(sorted(self.shadow))
        for pages, _ in self.held:
            self.pool.drop(pages)
        assert self.pool.num_free_pages == self.pool.num_pages
        assert not self.pool.refcount.any()
        assert sorted(self.pool.free_pages.tolist()) == list(range(self.pool.num_pages))


TestPagesMachine = PagesMachine.TestCase
TestPagesMachine.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

"""The prefix index against a brute-force model: a dictionary from token prefixes to single pages."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.page_cases import make_pool

from treedecode._host import PrefixIndex


def int32(values):
    return np.array(values, dtype=np.int32)


class Model:
    """`entries[prefix] = [page, last use]` for every whole-page prefix."""

    def __init__(self, page_size):
        self.page_size = page_size
        self.entries: dict[tuple[int, ...], list[int]] = {}
        self.time = 0

    def prefixes(self, tokens):
        size = self.page_size
        return [tuple(tokens[: (i + 1) * size]) for i in range(len(tokens) // size)]

    def match(self, tokens):
        self.time += 1
        pages = []
        for prefix in self.prefixes(tokens):
            if prefix not in self.entries:
                break
            self.entries[prefix][1] = self.time
            pages.append(self.entries[prefix][0])
        return pages

    def insert(self, tokens, pages):
        known = len(self.match(tokens))
        for prefix, page in list(zip(self.prefixes(tokens), pages, strict=False))[known:]:
            self.entries[prefix] = [page, self.time]
        return list(pages[known : len(self.prefixes(tokens))])

    def evict(self, num_pages, refcount):
        freed = []
        while len(freed) < num_pages:
            inner = {prefix[: -self.page_size] for prefix in self.entries}
            leaves = [p for p, (page, _) in self.entries.items() if p not in inner and refcount[page] == 1]
            if not leaves:
                break
            oldest = min(leaves, key=lambda prefix: self.entries[prefix][1])
            freed.append(self.entries.pop(oldest)[0])
        return freed


class PrefixIndexMachine(RuleBasedStateMachine):
    # Few distinct tokens, so that prefixes meet, part in the middle of a page, and meet again.
    sequences = st.lists(st.integers(0, 2), max_size=14)

    @initialize(page_size=st.integers(1, 4))
    def start(self, page_size):
        self.index = PrefixIndex(page_size)
        self.model = Model(page_size)
        self.refcount = np.ones(4096, np.int32)
        self.next_page = 0

    @rule(tokens=sequences)
    def match(self, tokens):
        pages, num_tokens = self.index.match(int32(tokens))
        assert pages.dtype == np.int32
        assert pages.tolist() == self.model.match(tokens)
        assert num_tokens == len(pages) * self.index.page_size

    @rule(tokens=sequences, partial=st.booleans())
    def insert(self, tokens, partial):
        num_pages = len(tokens) // self.index.page_size
        num_pages += partial and len(tokens) % self.index.page_size != 0
        pages = list(range(self.next_page, self.next_page + num_pages))
        self.next_page += num_pages
        assert self.index.insert(int32(tokens), int32(pages)).tolist() == self.model.insert(tokens, pages)

    @rule(num_pages=st.integers(0, 8))
    def evict(self, num_pages):
        freed = self.index.evict(num_pages, self.refcount).tolist()
        assert freed == self.model.evict(num_pages, self.refcount)

    @precondition(lambda self: self.model.entries)
    @rule(data=st.data())
    def use(self, data):
        """A branch adopts a prefix, or some of its pages; or lets go of it."""
        prefix = data.draw(st.sampled_from(sorted(self.model.entries)))
        for i in range(data.draw(st.integers(0, 2)), len(prefix) // self.index.page_size):
            page = self.model.entries[prefix[: (i + 1) * self.index.page_size]][0]
            self.refcount[page] = 3 - self.refcount[page]

    @rule()
    def clear(self):
        assert sorted(self.index.clear().tolist()) == sorted(page for page, _ in self.model.entries.values())
        self.model.entries.clear()

    @invariant()
    def agrees(self):
        if hasattr(self, "index"):
            self.index.check_integrity()
            assert self.index.pages().tolist() == sorted(page for page, _ in self.model.entries.values())
            assert len(self.index) == len(self.model.entries)


TestPrefixIndexMachine = PrefixIndexMachine.TestCase
TestPrefixIndexMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("page_size", [1, 2, 5])
def test_long_random_run(page_size):
    """More steps than the state machine takes, with eviction in most of them: recency must be exact."""
    rng = np.random.default_rng(page_size)
    index, model = PrefixIndex(page_size), Model(page_size)
    refcount = np.ones(100_000, np.int32)
    next_page = 0
    for _ in range(1500):
        tokens = rng.integers(0, 3, int(rng.integers(0, 8 * page_size)), dtype=np.int32)
        tokens = np.repeat(tokens[: len(tokens) // page_size], page_size)  # pages alike, so that prefixes are shared
        if rng.random() < 0.5:
            assert index.match(tokens)[0].tolist() == model.match(tokens.tolist())
        else:
            pages = np.arange(next_page, next_page + len(tokens) // page_size, dtype=np.int32)
            next_page += len(pages)
            assert index.insert(tokens, pages).tolist() == model.insert(tokens.tolist(), pages.tolist())
        if rng.random() < 0.2 and len(index):
            used = rng.choice(index.pages(), 3)
            refcount[used] = 3 - refcount[used]
        num_pages = int(rng.integers(0, 4))
        assert index.evict(num_pages, refcount).tolist() == model.evict(num_pages, refcount)
    index.check_integrity()
    assert len(index) > 5


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=6, max_size=6), max_size=20))
@settings(deadline=None)
def test_any_token_ids(sequences):
    index, model = PrefixIndex(2), Model(2)
    for i, tokens in enumerate(sequences):
        pages = list(range(3 * i, 3 * i + 3))
        assert index.insert(int32(tokens), int32(pages)).tolist() == model.insert(tokens, pages)
    for tokens in sequences:
        assert index.match(int32(tokens))[0].tolist() == model.match(tokens)


def test_equal_hashes_do_not_make_equal_prefixes():
    """Pages of tokens that collide in the index's 64-bit hash, found by birthday search."""

    def mix(h):
        h = np.atleast_1d(h) * np.uint64(0x9E3779B97F4A7C15)  # arrays wrap around, scalars warn
        return h ^ h >> np.uint64(29)

    first = np.unique(np.random.default_rng(0).integers(0, 2**31, (400_000, 2)), axis=0).astype(np.uint64)
    h = mix(mix(first[:, 0]) ^ first[:, 1])
    # The third token is xored to the low half, so pages whose high halves agree can be made equal.
    order = np.argsort(h >> np.uint64(32), kind="stable")
    equal = np.flatnonzero(np.diff((h >> np.uint64(32))[order].astype(np.int64)) == 0)
    assert len(equal) > 2
    for at in equal[:3]:
        a, b = order[at], order[at + 1]
        pages = np.array([[*first[a], 5], [*first[b], 5 ^ (h[a] ^ h[b])]], np.uint64)
        hashes = mix(mix(mix(pages[:, 0]) ^ pages[:, 1]) ^ pages[:, 2])
        assert hashes[0] == hashes[1], "not a collision"
        tokens = pages.astype(np.uint32).view(np.int32)
        index = PrefixIndex(3)
        index.insert(int32([7, 7, 7]), int32([9]))
        index.insert(tokens[0], int32([0]))
        assert index.match(tokens[1])[1] == 0
        index.insert(tokens[1], int32([1]))
        assert [index.match(t)[0].tolist() for t in tokens] == [[0], [1]]
        index.check_integrity()
        assert index.evict(2, np.ones(10, np.int32)).tolist() == [9, 0]
        assert index.match(tokens[1])[0].tolist() == [1]


def test_eviction_spares_pages_in_use():
    index = PrefixIndex(1)
    index.insert(int32([1, 2, 3, 4]), int32([0, 1, 2, 3]))
    index.insert(int32([1, 2, 5]), int32([0, 1, 4]))
    refcount = int32([1, 1, 1, 2, 1])
    assert index.evict(9, refcount).tolist() == [4]  # 3 is in use, and what leads to it stays with it
    refcount[3] = 1
    assert index.evict(9, refcount).tolist() == [3, 2, 1, 0]


def test_pages_unknown_to_the_refcounts_stay():
    index = PrefixIndex(1)
    index.insert(int32([1]), int32([5]))
    assert index.evict(1, np.ones(5, np.int32)).tolist() == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: i.match(np.arange(4)), TypeError, "tokens: expected dtype int32, got int64"),
        (lambda i: i.match(int32([1, 2, 3, 4])[::2]), ValueError, "tokens: expected a contiguous 1-d array"),
        (lambda i: i.match(int32([[1, 2]])), ValueError, "tokens: expected a contiguous 1-d array, got 2 dimensions"),
        (lambda i: i.insert(int32([1, 2]), int32([])), ValueError, "pages: expected the 1 whole pages .* got 0"),
        (lambda i: i.insert(int32([1, 2]), int32([1, 2])), ValueError, "pages: expected the 1 whole pages .* got 2"),
        (lambda i: i.insert(int32([3] * 4), int32([1, 1])), ValueError, "pages: expected pages .* each once, got 1"),
        (lambda i: i.insert(int32([3, 3]), int32([7])), ValueError, "pages: expected pages .* not hold yet.* got 7"),
        (lambda i: i.insert(int32([3, 3]), int32([-1])), ValueError, "pages: expected pages .* got -1"),
        (lambda i: i.evict(-1, int32([1])), ValueError, "num_pages: expected at least 0, got -1"),
        (lambda i: i.evict(1, np.ones(3)), TypeError, "refcount: expected dtype int32, got float64"),
    ],
)
def test_bad_arguments_change_nothing(call, error, message):
    index = PrefixIndex(2)
    index.insert(int32([5, 6]), int32([7]))
    with pytest.raises(error, match=message):
        call(index)
    index.check_integrity()
    assert index.pages().tolist() == [7]


def test_large_page_ids_take_no_memory():
    def resident_pages():
        return int(Path("/proc/self/statm").read_text().split()[1])

    index = PrefixIndex(1)
    before = resident_pages()
    index.insert(int32([1, 2, 3]), int32([2**31 - 1, 0, 2**30]))
    assert resident_pages() - before < 4096
    assert index.pages().tolist() == [0, 2**30, 2**31 - 1]
    index.check_integrity()
    with pytest.raises(ValueError, match="not hold yet, each once, got 2147483647"):
        index.insert(int32([4]), int32([2**31 - 1]))
    assert sorted(index.clear().tolist()) == [0, 2**30, 2**31 - 1]


def test_bad_page_size():
    with pytest.raises(ValueError, match="page_size: expected at least 1, got 0"):
        PrefixIndex(0)


def test_a_very_deep_tree():
    """A chain of a thousand nodes: nothing recurses, and nothing walks it more than once a call."""
    index = PrefixIndex(1)
    n = 10_000
    tokens, pages = np.zeros(n, np.int32), np.arange(n, dtype=np.int32)
    index.insert(tokens, pages)
    for length in range(n - 1, n - 1000, -1):
        index.match(tokens[:length])
    index.check_integrity()
    assert index.match(tokens)[1] == n
    assert index.evict(n, np.ones(n, np.int32)).tolist() == pages[::-1].tolist()
    index.insert(tokens, pages)
    del index


def test_threads():
    """Many threads match, insert and evict at once; every matched page must hold the tokens it was matched for."""
    page_size, num_threads, rounds = 4, 8, 400
    index = PrefixIndex(page_size)
    next_page = itertools.count()
    content: dict[int, tuple[int, ...]] = {}  # page -> all tokens up to its end; written before the page is inserted
    refcount = np.ones(1 << 20, np.int32)
    errors: list[BaseException] = []
    start = threading.Barrier(num_threads)

    def work(seed):
        rng = np.random.default_rng(seed)
        start.wait()
        for _ in range(rounds):
            tokens = rng.integers(0, 2, 4 * int(rng.integers(1, 9)), dtype=np.int32)
            pages, num_tokens = index.match(tokens)
            for i, page in enumerate(pages.tolist()):
                assert content[page] == tuple(tokens[: (i + 1) * page_size].tolist())
            assert num_tokens == len(pages) * page_size
            new = [next(next_page) for _ in range(len(tokens) // page_size)]
            content.update({p: tuple(tokens[: (i + 1) * page_size].tolist()) for i, p in enumerate(new)})
            taken = index.insert(tokens, int32(new)).tolist()
            assert taken == new[len(new) - len(taken) :]
            if rng.random() < 0.1:
                index.evict(int(rng.integers(1, 40)), refcount)
            if rng.random() < 0.02:
                index.check_integrity()
                index.clear()

    def guarded(seed):
        try:
            work(seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    index.check_integrity()


def test_with_a_pool():
    """Prompts come, adopt what is known, publish what is new, go; the pool's counts stay right under eviction."""
    rng = np.random.default_rng(0)
    pool = make_pool(num_pages=40, page_size=2, max_branches=4)
    index = PrefixIndex(2)
    live: list[int] = []
    evicted = adopted = 0
    for _ in range(300):
        if len(live) == 4 or (live and rng.random() < 0.4):
            pool.release([live.pop(int(rng.integers(len(live))))])
        prompt = rng.integers(0, 2, int(rng.integers(1, 20)), dtype=np.int32)
        (row,) = pool.allocate_rows(1).tolist()
        live.append(row)
        pages, num_tokens = index.match(prompt)
        num_tokens = min(num_tokens, len(prompt) - 1)  # the last token must be computed for its logits
        pool.adopt(row, pages[: -(-num_tokens // 2)], num_tokens)
        adopted += num_tokens
        needed = -(-len(prompt) // 2) + 1
        if pool.num_free_pages < needed:
            freed = index.evict(needed - pool.num_free_pages, pool.refcount.numpy())
            pool.drop(freed)
            evicted += len(freed)
        pool.append([row], [len(prompt) - num_tokens])
        pool.retain(index.insert(prompt, pool.pages(row)))
        pool.check_integrity(held=index.pages())
    assert evicted > 20
    assert adopted > 100
    pool.release(live)
    pool.drop(index.clear())
    assert pool.num_free_pages == 40
    pool.check_integrity()

"""The unshared baseline does the work of the shared search, one branch after another over copied caches."""

import numpy as np
import pytest
import torch
from support.fakes import FakeModel, FakeTokenizer
from support.study_cases import Digits, Length

import treedecode as td
from treedecode.strategies import ChainOfThought, SelfConsistency, TreeOfThoughts
from treedecode.study.unshared_baseline import CopyingPool, UnsharedDecoder

STRATEGIES = [ChainOfThought(), SelfConsistency(6), TreeOfThoughts(depth=3, width=3, keep=2)]


def make_decoder(model):
    return td.Decoder(model, FakeTokenizer(), kv_memory=400 * 4 * 2 * 2 * 16 * 4, page_size=4, max_branches=32)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_texts_are_the_same_one_branch_at_a_time(strategy, monkeypatch):
    model, task = FakeModel(), Digits()
    sharing = make_decoder(model)
    unshared = UnsharedDecoder.like(sharing)
    most_shared = 0
    fork = CopyingPool.fork

    def watched_fork(pool, *args):
        nonlocal most_shared
        fork(pool, *args)
        most_shared = max(most_shared, int(pool.refcount.max()))

    monkeypatch.setattr(CopyingPool, "fork", watched_fork)
    for problem in task.problems(3):
        expected = td.solve(sharing, [problem], strategy=strategy, task=task, verifier=Length())
        begin = len(model.forwards)
        result = td.solve(unshared, [problem], strategy=strategy, task=task, verifier=Length())
        assert all(len(q_lens) == 1 for q_lens in model.forwards[begin:])
        assert result.solutions[0].text == expected.solutions[0].text
        assert result.solutions[0].tree.to_json() == expected.solutions[0].tree.to_json()
        # the ledger computes the counterfactual "without sharing", and this decoder does it
        computed, done = expected.ledger.problems[problem.id], result.ledger.problems[problem.id]
        assert done.generated_tokens == computed.generated_tokens
        assert done.forwards == done.branch_forwards == computed.branch_forwards
        assert done.kv_bytes == done.kv_bytes_copied == computed.kv_bytes_copied
    assert most_shared <= 1
    for decoder in (sharing, unshared):
        decoder.check_integrity()
        assert decoder.num_branches == 0
    assert unshared.pool.num_free_pages == unshared.pool.num_pages


def test_a_branch_goes_to_its_stop_before_the_next_one_begins():
    model = FakeModel()
    unshared = UnsharedDecoder.like(make_decoder(model))
    order = []

    async def work():
        with await unshared.roots(["the a"], sampling=td.Sampling(seed=0)) as root:
            await root.fork(4).extend(max_new_tokens=5, callback=lambda i, token, text: order.append(i))

    unshared.run(work())
    assert order == sorted(order)
    assert len(order) > 4


def test_a_prompt_is_computed_again_each_time():
    model = FakeModel()
    unshared = UnsharedDecoder.like(make_decoder(model))
    for _ in range(2):
        begin = len(model.forwards)
        unshared.generate(["the quick brown fox"], max_new_tokens=1)
        assert sum(map(sum, model.forwards[begin:])) == len(unshared.encode("the quick brown fox"))


def test_forks_have_pages_of_their_own():
    pool = CopyingPool(
        num_layers=1, num_kv_heads=1, head_dim=2, num_pages=12, page_size=4, max_branches=4, max_pages_per_branch=4,
        dtype=torch.float32,
    )  # fmt: skip
    rows = pool.allocate_rows(3)
    pool.append(rows[:1], [6])
    pool.kv.normal_()
    before = pool.kv[:, :, pool.pages(0)].clone()
    pool.fork([0, 0], rows[1:], [6, 3])
    pages = [pool.pages(row) for row in rows]
    assert [len(ids) for ids in pages] == [2, 2, 1]
    assert len(np.unique(np.concatenate(pages))) == 5
    assert (pool.kv[:, :, pages[1]] == before).all()
    assert (pool.kv[:, :, pages[2]] == before[:, :, :1]).all()
    pool.truncate(rows[1:2], [5])
    assert pool.pages(1).tolist() == pages[1].tolist()
    pool.check_integrity()

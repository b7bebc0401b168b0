"""One branch after another over copied caches: the same work as the shared search, in the other way."""

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
def test_the_same_texts_a_branch_at_a_time(strategy, monkeypatch):
    model, task = FakeModel(), Digits()
    ours = make_decoder(model)
    serial = UnsharedDecoder.like(ours)
    most_shared = 0
    fork = CopyingPool.fork

    def watched(pool, *args):
        nonlocal most_shared
        fork(pool, *args)
        most_shared = max(most_shared, int(pool.refcount.max()))

    monkeypatch.setattr(CopyingPool, "fork", watched)
    for problem in task.problems(3):
        shared = td.solve(ours, [problem], strategy=strategy, task=task, verifier=Length())
        begin = len(model.forwards)
        apart = td.solve(serial, [problem], strategy=strategy, task=task, verifier=Length())
        assert all(len(q_lens) == 1 for q_lens in model.forwards[begin:])
        assert apart.solutions[0].text == shared.solutions[0].text
        assert apart.solutions[0].tree.to_json() == shared.solutions[0].tree.to_json()
        # the ledger's counterfactual, which is computed, is what this one does
        mine, other = shared.ledger.problems[problem.id], apart.ledger.problems[problem.id]
        assert other.generated_tokens == mine.generated_tokens
        assert other.forwards == other.branch_forwards == mine.branch_forwards
        assert other.kv_bytes == other.kv_bytes_copied == mine.kv_bytes_copied
    assert most_shared <= 1
    for decoder in (ours, serial):
        decoder.check_integrity()
        assert decoder.num_branches == 0
    assert serial.pool.num_free_pages == serial.pool.num_pages


def test_a_branch_goes_to_its_stop_before_the_next_one_begins():
    model = FakeModel()
    serial = UnsharedDecoder.like(make_decoder(model))
    order = []

    async def work():
        with await serial.roots(["the a"], sampling=td.Sampling(seed=0)) as root:
            await root.fork(4).extend(max_new_tokens=5, callback=lambda i, token, text: order.append(i))

    serial.run(work())
    assert order == sorted(order)
    assert len(order) > 4


def test_a_prompt_is_computed_again_each_time():
    model = FakeModel()
    serial = UnsharedDecoder.like(make_decoder(model))
    for _ in range(2):
        begin = len(model.forwards)
        serial.generate(["the quick brown fox"], max_new_tokens=1)
        assert sum(map(sum, model.forwards[begin:])) == len(serial.encode("the quick brown fox"))


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

"""NextLogits: logits stay with a row for as long as it holds the same tokens."""

import numpy as np
import torch

from treedecode.engine.next_logits import LogitsRow, NextLogits, gather

ROWS = np.array


def test_logits_are_those_of_the_same_tokens_alone():
    logits = LogitsRow(torch.zeros(1, 4), 0)
    kept = NextLogits()
    kept.put(3, logits, 7)
    assert kept.pop(3, 8) is None
    assert kept.pop(3, 7) is None, "a row of another length has lost its logits"
    kept.put(3, logits, 7)
    assert kept.pop(3, 7) is logits
    assert kept.pop(3, 7) is None


def test_forks_share_logits_and_rows_with_other_tokens_lose_them():
    logits = LogitsRow(torch.zeros(1, 4), 0)
    kept = NextLogits()
    kept.fork(ROWS([1]), ROWS([2]))  # nothing to share
    kept.put(1, logits, 7)
    kept.fork(ROWS([1, 1, 5]), ROWS([2, 3, 6]))
    kept.drop(ROWS([3, 9]))
    assert [kept.pop(row, 7) is logits for row in (1, 2, 3, 6)] == [True, True, False, False]
    kept.put(1, logits, 7)
    kept.clear()
    assert kept.pop(1, 7) is None


def test_rows_of_several_forwards_are_gathered():
    one, other = torch.arange(12.0).reshape(3, 4), -torch.arange(8.0).reshape(2, 4)
    rows = [LogitsRow(one, 2), LogitsRow(other, 1), LogitsRow(one, 0), LogitsRow(other, 1)]
    logits, order = gather(rows)
    assert sorted(order) == [0, 1, 2, 3]
    assert torch.equal(logits, torch.stack([rows[i].logits[rows[i].position] for i in order]))

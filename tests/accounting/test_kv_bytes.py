"""Bytes of keys and values that accounts pay for: equal to a count by hand, op by op and captured."""

import numpy as np
import pytest
from support.counting import Count
from support.fake_task import FakeTask, Recorder, talkative_decoder
from support.fakes import FakeModel

import treedecode as td
from treedecode.accounting.meter import Meter

FIELDS = ("prompt_tokens", "generated_tokens", "computed_tokens", "kv_bytes", "kv_bytes_copied", "branch_forwards")


@pytest.mark.parametrize(
    ("q_lens", "tokens"),
    [
        ([1, 1, 1, 1], 9 + 1 + 1 + 5),
        ([1, 0, 1, 1], 9 + 1 + 5),
        ([0, 0, 1, 1], 9 + 5),
        ([0, 1, 0, 1], 9 + 5),
        ([1, 0, 0, 0], 9),
        ([0, 0, 0, 0], 0),
    ],
)
def test_a_row_that_took_no_part_shares_with_none(q_lens, tokens):
    """Three rows hold pages 1 and 2, the fourth holds page 3; pages have 4 tokens."""
    meter = Meter(FakeModel(), page_size=4)
    parent = meter.open()
    account = meter.open(parent)
    pages = np.array([[1, 2], [1, 2], [1, 2], [3, 0]])
    used, cached = pages > 0, np.array([8, 8, 8, 4])
    groups = meter.group_rows(np.full(4, account), pages, used, cached)
    active = np.array(q_lens) > 0
    meter.charge(groups, cached, np.array(q_lens), active, active)
    for payer in (account, parent):
        spent = meter.spending(payer)
        assert spent.kv_bytes == tokens * meter.token_bytes
        assert spent.branch_forwards == sum(q_lens)
        assert spent.forwards == int(sum(q_lens) > 0)


def test_a_shorter_row_between_two_hides_no_page():
    """The second row holds page 2 in part, and copies it before it writes; the others read it once."""
    meter = Meter(FakeModel(), page_size=4)
    account = meter.open()
    pages, cached = np.array([[1, 2], [1, 2], [1, 2]]), np.array([8, 6, 8])
    ones = np.ones(3, np.int64)
    groups = meter.group_rows(np.full(3, account), pages, pages > 0, cached)
    meter.charge(groups, cached, ones, ones > 0, ones > 0)
    assert meter.spending(account).kv_bytes == (9 + 1 + 3) * meter.token_bytes


@pytest.mark.parametrize("num_samples", [2, 6, 9])
def test_captured_steps_cost_what_others_cost(num_samples, monkeypatch):
    def spent(dec):
        strategy, task = td.BestOfN(num_samples=num_samples), FakeTask()
        ledger = td.solve(dec, task.problems(2), strategy=strategy, task=task, verifier=Recorder()).ledger
        return [[getattr(part, name) for name in FIELDS] for part in (*ledger.problems.values(), ledger.total)]

    dec = talkative_decoder()
    with monkeypatch.context() as patch:
        count = Count(dec, patch)
        plain = spent(dec)
    assert plain[-1][FIELDS.index("kv_bytes")] == count.spent[None].kv_bytes
    assert spent(talkative_decoder(captured=True)) == plain

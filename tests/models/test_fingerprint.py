"""Fingerprints of weights depend on names, shapes, types and entries, and can be taken of any tensor."""

import pytest
import torch
from torch import nn

from treedecode.models.fingerprint import fingerprint


class Holder(nn.Module):
    """A module with one buffer."""

    def __init__(self, values, persistent=True):
        super().__init__()
        self.register_buffer("values", values, persistent=persistent)


def test_equal_weights_have_equal_fingerprints():
    first, second = nn.Linear(40, 30), nn.Linear(40, 30)
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        second.weight.mul_(1 + 1e-6)
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize("begin", [0, 999, 500_500])
def test_a_change_of_consecutive_entries_is_seen_wherever_it_is(begin):
    """Of a million entries 64 are looked at, so a sixty-third of them in a row has one of those."""
    values = torch.zeros(1001, 1000)
    before = fingerprint(Holder(values))
    changed = values.clone()
    changed.view(-1)[begin : begin + 1001 * 1000 // 63 + 1] = 1
    assert fingerprint(Holder(changed)) != before


def test_names_shapes_and_types_count():
    values = torch.zeros(6, 4)
    fingerprints = {fingerprint(Holder(v)) for v in (values, values.half(), values.view(4, 6), values.view(24))}
    assert len(fingerprints) == 4
    assert fingerprint(nn.Sequential(Holder(values))) not in fingerprints


def test_buffers_that_are_not_saved_count_too():
    first, second = (fingerprint(Holder(torch.full((3,), x), persistent=False)) for x in (1.0, 2.0))
    assert first != second


@pytest.mark.parametrize(
    ("values", "other"),
    [
        (torch.tensor([1 + 2j, 3 + 4j]), torch.tensor([1 + 2j, 3 + 5j])),
        (torch.tensor([True, False]), torch.tensor([True, True])),
        (torch.tensor([3, 4], dtype=torch.int8), torch.tensor([3, 5], dtype=torch.int8)),
        (torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn), torch.tensor([1.0, 1.0]).to(torch.float8_e4m3fn)),
        (torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([1.0, 3.0]).bfloat16()),
        (torch.tensor(5.0), torch.tensor(6.0)),
        (torch.arange(12.0).view(3, 4).t(), torch.arange(12.0).view(4, 3)),
        (torch.tensor([1.0]).expand(70), torch.tensor([2.0]).expand(70)),
    ],
    ids=["complex", "bool", "int8", "float8", "bfloat16", "scalar", "transposed", "expanded"],
)
def test_all_types_of_entries(values, other):
    assert fingerprint(Holder(values)) == fingerprint(Holder(values.clone()))
    assert fingerprint(Holder(values)) != fingerprint(Holder(other))


@pytest.mark.parametrize(
    "values",
    [
        torch.empty(0, 3),
        torch.empty(3, device="meta"),
        torch.eye(3).to_sparse(),
    ],
    ids=["empty", "meta", "sparse"],
)
def test_tensors_without_readable_entries_count_by_their_shape(values):
    assert fingerprint(Holder(values)) == fingerprint(Holder(values))
    assert fingerprint(Holder(values)) != fingerprint(Holder(torch.zeros(7)))

"""ValueHead: shapes, dtypes and files; and the figures that its training reports, against their definitions."""

from itertools import combinations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from examples.countdown.train_value import log_loss, pass_at_k
from treedecode.allocation.calibration import auc
from treedecode.models.value_head import ValueHead


@pytest.fixture
def head():
    torch.manual_seed(0)
    return ValueHead(32, width=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_are_fp32_whatever_the_hidden_states(head, dtype):
    hidden = torch.randn(7, 32, dtype=dtype)
    values = head(hidden)
    assert values.dtype == torch.float32
    assert values.shape == (7,)
    assert ((values > 0) & (values < 1)).all()
    torch.testing.assert_close(values, head(hidden.float()), rtol=0, atol=0)
    torch.testing.assert_close(torch.logit(values), head.logits(hidden))
    torch.testing.assert_close(head(hidden[3:4]), values[3:4])


def test_the_scale_of_a_hidden_state_makes_no_difference(head):
    hidden = torch.randn(5, 32)
    torch.testing.assert_close(head(3 * hidden), head(hidden), rtol=1e-4, atol=1e-5)


def test_it_can_learn_a_rule(head):
    hidden = torch.randn(512, 32)
    success = (hidden[:, 0] * hidden[:, 1] > 0).float()  # not linear
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(head.logits(hidden), success).backward()
        optimizer.step()
    assert auc(head(hidden).detach().numpy(), success.bool().numpy()) > 0.95


def test_a_saved_head_is_loaded(head, tmp_path):
    path = tmp_path / "head.safetensors"
    head.save(path)
    loaded = ValueHead.load(path)
    hidden = torch.randn(4, 32)
    assert torch.equal(loaded(hidden), head(hidden))
    assert not loaded.training


def test_errors_name_the_argument(head, tmp_path):
    for shape in ((32,), (2, 31), (1, 2, 32)):
        with pytest.raises(ValueError, match="hidden: expected"):
            head(torch.zeros(shape))
    with pytest.raises(ValueError, match="hidden_size: expected"):
        ValueHead(0)
    with pytest.raises(ValueError, match="width: expected"):
        ValueHead(8, width=True)
    with pytest.raises(FileNotFoundError):
        ValueHead.load(tmp_path / "none.safetensors")
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no value head"):
        ValueHead.load(tmp_path / "other.safetensors")
    save_file({"up.weight": torch.zeros(2, 2)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="holds no value head"):
        ValueHead.load(tmp_path / "part.safetensors")


def test_log_loss():
    assert log_loss(np.array([0.5, 0.25]), np.array([True, False])) == pytest.approx(-np.log([0.5, 0.75]).mean())
    assert log_loss(np.array([0.0]), np.array([True])) == pytest.approx(-np.log(1e-7))


def test_pass_at_k_is_the_share_of_subsets_with_a_success():
    right = np.array([[1, 0, 0, 0, 1, 0], [0] * 6, [1] * 6, [0, 0, 1, 0, 0, 0]], bool)
    for k in (1, 2, 5, 6):
        subsets = [[row[list(chosen)].any() for chosen in combinations(range(6), k)] for row in right]
        assert pass_at_k(right, k) == pytest.approx(np.mean(subsets))

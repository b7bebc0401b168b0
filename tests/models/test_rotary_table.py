"""RotaryTable gives the bits of the rotary embedding that it stands for."""

import pytest
import torch
from support.transformers_models import make_model

from treedecode.models.fast_modules import UnsupportedModule
from treedecode.models.rotary_table import RotaryTable
from treedecode.models.transformers import TransformersModel

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 16,
        "long_factor": [3.0] * 16,
    },
}


def rotary(rope_type, dtype=torch.float32):
    model = make_model("llama", dtype, rope_parameters=ROPES[rope_type], max_position_embeddings=8192, head_dim=32)
    return model.model.rotary_emb


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3", "yarn"])
def test_same_bits_as_the_module(rope_type, dtype):
    module = rotary(rope_type, dtype)
    table = RotaryTable(module, dtype)
    # also beyond what is computed at first, and back
    for positions in ([0], [5, 5, 3], [1023, 1024], [3000, 7], [8191], [0, 1, 2]):
        ids = torch.tensor(positions)
        want = module(torch.empty(0, dtype=dtype), position_ids=ids[None])
        assert all(map(torch.equal, table(ids), (values[0] for values in want)))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_refuses_angles_that_depend_on_the_length(rope_type):
    with pytest.raises(UnsupportedModule, match=rope_type):
        RotaryTable(rotary(rope_type), torch.float32)


def test_a_decoder_follows_changed_frequencies():
    model = make_model("llama", torch.float32)
    adapter = TransformersModel(model)
    assert adapter.refresh() == 0
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.mul_(0.5)
    assert adapter.refresh() == 1
    assert adapter.refresh() == 1

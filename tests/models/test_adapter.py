"""ModelAdapter: an adapter of one's own gets the defaults, and one that lacks members is refused by name."""

import pytest
import torch
from support.fakes import FakeModel, FakeTokenizer

import treedecode as td
from treedecode.models import ModelAdapter, TransformersModel, as_adapter
from treedecode.models.adapter import require_hidden_states


class DuckTyped:
    """Has the sizes and a forward, and inherits nothing."""

    num_layers, num_kv_heads, num_qo_heads, head_dim = 1, 1, 1, 16
    vocab_size, max_position, eos_token_ids = 8, 64, (1,)
    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, input_ids, position_ids, context, logit_rows):
        raise NotImplementedError


def test_defaults():
    model = FakeModel()
    assert (model.hidden_size, model.min_prefill, model.module) == (0, None, None)
    assert (model.flops_per_token, model.flops_per_logits) == (0, 0)
    assert model.refresh() == model.refresh(force=True) == model.num_changes == 0
    for gives_none in (lambda: model.forward_hidden(*[None] * 4), lambda: require_hidden_states(model)):
        with pytest.raises(ValueError, match="model: FakeModel has no forward_hidden, so it gives no hidden states"):
            gives_none()


def test_an_adapter_is_taken_as_it_is():
    model = FakeModel()
    assert as_adapter(model) is model
    assert isinstance(model, ModelAdapter)
    with td.Decoder(model, FakeTokenizer(), kv_memory="1MiB") as decoder:
        assert decoder.model is model


def test_members_that_lack_are_named():
    message = "model: DuckTyped lacks hidden_size, .*, forward_hidden, refresh; inherit from .*ModelAdapter"
    with pytest.raises(TypeError, match=message):
        td.Decoder(DuckTyped())

    class Inherits(DuckTyped, ModelAdapter):
        pass

    assert as_adapter(inherits := Inherits()) is inherits


def test_the_adapter_of_transformers_has_every_member():
    members = {*ModelAdapter.__annotations__, "forward", "forward_hidden", "refresh"}
    assert ModelAdapter in TransformersModel.__mro__
    assert not [name for name in ("forward", "forward_hidden", "refresh") if name not in vars(TransformersModel)]
    assert members <= set(dir(FakeModel()))
    with pytest.raises(TypeError, match=r"model: expected a transformers\.PreTrainedModel"):
        as_adapter(torch.nn.Linear(2, 2))

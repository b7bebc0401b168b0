"""FastForward replaces the modules it can, says why it keeps the others, and follows changes of the weights."""

import pytest
import torch
from support.transformers_models import MODELS, last_error, make_model, plain, search
from torch import nn

from treedecode.models.transformers import TransformersModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_common_layers_become_one_function(name, dtype):
    report = TransformersModel(make_model(name, dtype)).optimizations
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}[name]
    assert report == [
        f"3 x {kind}DecoderLayer: one function",
        f"1 x {kind}RMSNorm: one op",
        "1 x Linear: packed weights",
        "all layers and the head in one op",
    ]


def test_other_layers_are_replaced_in_parts():
    report = TransformersModel(make_model("gemma2")).optimizations
    assert report[0].startswith("3 x Gemma2DecoderLayer: kept (consists of input_layernorm, mlp, ")
    assert set(report[1:]) == {
        "13 x Linear: packed weights",
        "3 x Gemma2MLP: gate and up in one product",
        "13 x Gemma2RMSNorm: one op",
        "layer by layer (not all of it has a faster forward)",
    }


@pytest.mark.parametrize("initializer_range", [0.3, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_that_rotate_in_another_way_are_kept(dtype, initializer_range):
    """The probe sees it also where scores are so small that attention is all but uniform."""
    report = TransformersModel(make_model("smollm3", dtype, initializer_range=initializer_range)).optimizations
    assert "2 x SmolLM3DecoderLayer: one function" in report
    assert "1 x SmolLM3DecoderLayer: kept (its result differs)" in report
    report = TransformersModel(make_model("ernie4_5", dtype, initializer_range=initializer_range)).optimizations
    assert any(line.startswith("3 x Ernie4_5DecoderLayer: kept (") for line in report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_that_scale_queries_from_a_position_on_are_kept(dtype):
    """The scale begins at the last position of all, which the probe's tokens include."""
    rope = MODELS["ministral3"]["rope_parameters"] | {"original_max_position_embeddings": 127}
    report = TransformersModel(make_model("ministral3", dtype, rope_parameters=rope)).optimizations
    assert "3 x Ministral3DecoderLayer: kept (its result differs)" in report


@pytest.mark.parametrize(("dtype", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_norm_of_another_dtype_keeps_its_forward(dtype, other):
    model = make_model("llama", dtype)
    model.model.norm.to(other)
    model.lm_head.float()  # what the norm returns is fp32
    adapter = TransformersModel(model)
    assert f"1 x LlamaRMSNorm: kept (weights are {other} in a model of {dtype})" in adapter.optimizations
    tokens, logits = list(search(adapter))[-1]
    want = plain(model, tokens)[-len(logits) :]
    assert logits.dtype == want.dtype == torch.float32
    assert (logits - want).abs().max() < (1e-3 if dtype == torch.float32 else 0.1 * want.abs().max())


class Halved(torch.Tensor):
    """Half of `inner`, as a tensor class of its own with few operators of torch, like classes of quantised weights."""

    @staticmethod
    def make(inner):
        new = torch.Tensor._make_wrapper_subclass(Halved, inner.shape, dtype=inner.dtype, device=inner.device)
        new.inner = inner
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Halved.make(args[0].inner)
        if func is torch.ops.aten.linear.default:
            return func(*(x.inner / 2 if isinstance(x, Halved) else x for x in args))
        raise NotImplementedError(str(func))


@pytest.mark.parametrize("path", ["lm_head", "model.layers.1.mlp.up_proj"])
def test_weights_of_a_class_of_their_own_keep_their_forward(path):
    model = make_model("qwen3")
    linear = model.get_submodule(path)
    linear.weight = nn.Parameter(Halved.make(linear.weight.data), requires_grad=False)
    adapter = TransformersModel(model)
    assert any("kept (weights are a Halved)" in line for line in adapter.optimizations)
    assert last_error(adapter, model) < 1e-3


def test_optimize_false_replaces_nothing():
    assert TransformersModel(make_model("llama"), optimize=False).optimizations == []


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_subclasses_and_hooks_keep_their_forward():
    model = make_model("llama")
    down = model.model.layers[1].mlp.down_proj
    scaled = Scaled(down.in_features, down.out_features)
    scaled.load_state_dict(down.state_dict())
    model.model.layers[1].mlp.down_proj = scaled
    model.model.layers[2].self_attn.o_proj.register_forward_hook(lambda module, args, output: output + 1)
    adapter = TransformersModel(model)
    report = "\n".join(adapter.optimizations)
    assert "1 x LlamaDecoderLayer: one function" in report
    assert "1 x LlamaDecoderLayer: kept (Scaled is not nn.Linear)" in report
    assert "1 x LlamaDecoderLayer: kept (it has forward hooks, which would not run)" in report
    assert last_error(adapter, model) < 1e-3


def test_a_layer_that_computes_something_else_is_noticed():
    model = make_model("llama")
    layer = model.model.layers[1]

    class Doubled(type(layer)):
        def forward(self, hidden_states, **kwargs):
            return super().forward(hidden_states * 1.01, **kwargs)

    layer.__class__ = Doubled
    adapter = TransformersModel(model)
    assert "1 x Doubled: kept (its result differs)" in adapter.optimizations
    assert last_error(adapter, model) < 1e-3


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_changed_weights_are_packed_again(change):
    model = make_model("llama")
    adapter = TransformersModel(model)
    linear = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        if change == "in place":
            linear.weight.mul_(-1.5)
        else:
            linear.weight = nn.Parameter(linear.weight * -1.5)
    assert last_error(adapter, model) < 1e-3

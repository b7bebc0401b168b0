"""Models that bitsandbytes and torchao have quantised, in the drop-in: the tokens of Transformers."""

import pytest
import torch
from support.generate_cases import make_inputs, make_model
from torch import nn

import treedecode

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def replace_linears(model, make):
    """Puts `make(linear)` in place of every linear layer but the head."""
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, make(linear))
    return model


def four_bit(model):
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear):
        new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
        return new.to("cpu")

    return replace_linears(model, make)


def eight_bit(model):
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear):
        new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        return new.to("cpu")

    return replace_linears(model, make)


def int8_weights(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def int8_activations(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("quantise", [four_bit, eight_bit, int8_weights])
def test_quantised_weights(quantise, num_beams):
    model = quantise(make_model())
    for seed in range(2):
        inputs = make_inputs(2, seed)
        want = model.generate(**inputs, **GREEDY, num_beams=num_beams).tolist()
        for _ in range(2):
            got = model.generate(**inputs, **GREEDY, num_beams=num_beams, custom_generate=treedecode.generate)
            assert got.tolist() == want
        assert model.generate(**inputs, **GREEDY, num_beams=num_beams).tolist() == want, "the model is as it was"


def test_quantised_activations_round_as_attention_does():
    """The last bit of attention decides how an activation is rounded, between the attentions of Transformers too."""
    model, inputs = int8_activations(make_model()), make_inputs(1)
    options = {**GREEDY, "max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    want = model.generate(**inputs, **options)
    got = model.generate(**inputs, **options, custom_generate=treedecode.generate)
    [[ours], [theirs]] = got.logits[0], want.logits[0]
    assert (ours - theirs).abs().max() < 0.2 * theirs.std()
    assert (
        len(model.generate(**inputs, **GREEDY, custom_generate=treedecode.generate)[0]) > inputs["input_ids"].shape[1]
    )

"""Whatever a forward depends on is compared: switches of any plain type, adapters, buffers, tensor subclasses."""

import gc
import weakref

import pytest
import torch
from support.generate_cases import make_inputs, make_model
from torch import nn

import treedecode
from treedecode.models.change_detector import ChangeDetector
from treedecode.models.transformers import TransformersModel

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


class Adapters(nn.Module):
    """Adds low-rank products as PEFT does; `switch` says in a way of its own which, and how much of each."""

    def __init__(self, base, switch):
        super().__init__()
        self.base = base
        self.products = nn.ModuleDict(
            {name: nn.Linear(base.in_features, base.out_features, bias=False) for name in "ab"}
        )
        self.switch = switch

    def weights(self):
        switch = self.switch
        if isinstance(switch, dict):
            return switch
        names = "ab"[: int(switch or 0)] if switch is None or isinstance(switch, int) else switch
        return dict.fromkeys(names, 1.0)

    def forward(self, x):
        return self.base(x) + sum(weight * self.products[name](x) for name, weight in self.weights().items())


def with_adapters(switch):
    torch.manual_seed(1)
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.v_proj = Adapters(layer.self_attn.v_proj, switch)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def switch_all(model, switch):
    for layer in model.model.layers:
        layer.self_attn.v_proj.switch = switch


CHANGES = [
    (["a"], ["b"]), (["a"], ["a", "b"]), (("a",), ("b",)), ({"a"}, {"b"}), (frozenset("a"), frozenset("ab")),
    (None, "a"), (0, 2), (True, False), ({"a": 1.0}, {"a": 0.5}), ({"a": 1.0}, {"a": 1.0, "b": 2.0}), ("a", "b"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_drop_in_and_decoder_follow_a_switch(before, after):
    model, inputs = with_adapters(before), make_inputs()
    prompts = [
        row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    decoder = treedecode.Decoder(model, kv_memory="8MiB")
    sampling = treedecode.Sampling(temperature=0)
    for switch in (before, after, before):
        switch_all(model, switch)
        want = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY, custom_generate=treedecode.generate), want)
        outs = decoder.generate(prompts, max_new_tokens=6, sampling=sampling)
        for (out,), row in zip(outs, want[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            assert out.token_ids == row[: len(out.token_ids)]


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_dict_that_is_changed_in_place(name):
    model, inputs = with_adapters({"a": 1.0, "b": 0.0}), make_inputs()
    model.generate(**inputs, **GREEDY, custom_generate=treedecode.generate)
    for layer in model.model.layers:
        layer.self_attn.v_proj.switch[name] += 0.75
    want = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, custom_generate=treedecode.generate), want)


def changes(model):
    """Changes one thing after another, and undoes none."""
    layer = model.model.layers[0]
    yield "attribute", lambda: setattr(layer.self_attn, "scaling", 2 * layer.self_attn.scaling)
    yield "new attribute", lambda: setattr(layer, "scale", 2)
    yield "attribute without a plain value", lambda: setattr(layer, "scale", torch.ones(2))
    yield "config", lambda: setattr(model.config, "hidden_act", "gelu")
    yield "attribute of the root", lambda: setattr(model, "active_adapter", ["a"])
    yield "list of the root in place", lambda: model.active_adapter.append("b")
    yield "buffer", lambda: model.model.rotary_emb.inv_freq.mul_(2)
    yield "new buffer", lambda: layer.register_buffer("extra", torch.zeros(1))
    yield "parameter", lambda: layer.mlp.up_proj.weight.add_(1)
    yield "parameter object", lambda: setattr(layer.mlp, "up_proj", nn.Linear(64, 128, bias=False))
    yield "forward", lambda: setattr(layer.mlp, "forward", lambda x: x)
    yield "forward of the root", lambda: setattr(model, "forward", lambda **kwargs: None)
    yield "hook", lambda: layer.register_forward_hook(lambda *args: None)
    yield "class", lambda: setattr(layer.mlp, "__class__", type("Other", (type(layer.mlp),), {}))


@torch.no_grad()
def test_everything_in_the_list_is_seen():
    model = make_model()
    for name, change in changes(model):
        detector = ChangeDetector(model)
        assert not detector.has_changed(), name
        change()
        assert detector.has_changed(), name


def test_a_write_through_data_is_seen_where_samples_are_taken():
    model = make_model()
    detector = ChangeDetector(model, samples=True)
    model.model.layers[0].mlp.up_proj.weight.data.add_(1)
    assert detector.has_changed()


class Quantised(torch.Tensor):
    """A tensor without a storage that can be read, as libraries of quantised weights have."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.reshape, torch.Tensor.data_ptr, torch.Tensor.__getitem__, torch.Tensor.float):
            raise NotImplementedError(function.__name__)
        return super().__torch_function__(function, types, args, kwargs or {})


class QuantisedLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised), requires_grad=False)

    def forward(self, x):
        return x @ self.weight.as_subclass(torch.Tensor).T

    def state_dict(self, *args, **kwargs):
        raise AssertionError("state_dict changes the weights of some libraries")


def test_quantised_weights_are_compared_by_identity_and_version():
    model, inputs = make_model(), make_inputs()
    for layer in model.model.layers:
        layer.mlp.up_proj = QuantisedLinear(layer.mlp.up_proj)
    for factor in (1.0, 3.0):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(factor)
        want = model.generate(**inputs, **GREEDY)
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **GREEDY, custom_generate=treedecode.generate), want)


@pytest.mark.parametrize("name", ["drop-in", "decoder", "beam search", "adapter", "cached forward"])
def test_autocast_is_refused(name):
    model, inputs = make_model(), make_inputs()
    decoder = treedecode.Decoder(model, kv_memory="8MiB")
    calls = {
        "drop-in": lambda: model.generate(**inputs, **GREEDY, custom_generate=treedecode.generate),
        "decoder": lambda: decoder.generate([[5, 6, 7]], max_new_tokens=2),
        "beam search": lambda: decoder.beam_search([[5, 6, 7]], num_beams=2, max_new_tokens=2),
        "adapter": lambda: TransformersModel(model),
        "cached forward": lambda: treedecode.Decoder(model),
    }
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"^torch.autocast: "):
        calls[name]()
    want = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, custom_generate=treedecode.generate), want)


@pytest.mark.parametrize(
    "options", [GREEDY, GREEDY | {"num_beams": 3}, GREEDY | {"do_sample": True, "num_return_sequences": 3}]
)
def test_a_deleted_model_frees_its_memory_at_once(options):
    gc.collect()
    gc.disable()
    try:
        model = make_model()
        model.generate(**make_inputs(), **options, custom_generate=treedecode.generate)
        decoder = vars(model)["_treedecode"].decoder
        parts = [model, model.lm_head, decoder, decoder.pool, decoder.pool.kv, decoder.model]
        references = list(map(weakref.ref, parts))
        del model, decoder, parts
        assert [reference() for reference in references] == [None] * 6
    finally:
        gc.enable()


def test_a_closed_decoder_frees_its_memory_at_once():
    model = make_model()
    gc.collect()
    gc.disable()
    try:
        with treedecode.Decoder(model, kv_memory="8MiB") as decoder:
            decoder.generate([[5, 6, 7]], num_branches=2, max_new_tokens=3)
            references = [weakref.ref(part) for part in (decoder, decoder.pool, decoder.pool.kv, decoder.model)]
        del decoder
        assert [reference() for reference in references] == [None] * 4
    finally:
        gc.enable()

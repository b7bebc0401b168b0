"""FusedDecoder gives the bits of the forward layer by layer, and refuses models that compute something else."""

import re
import threading

import pytest
import torch
from support.transformers_models import PAGE_SIZE, Pages, last_error, make_model, plain, search, step
from torch import nn

from treedecode import ops
from treedecode.models.transformers import StepContext, TransformersModel

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["llama", "qwen2", "qwen3", "mistral"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE_OP = "all layers and the head in one op"


@pytest.fixture
def calls(monkeypatch):
    """Records the number of tokens of each call of the op."""
    seen, op = [], ops.decoder_forward

    def counted(x, *args):
        seen.append(len(x))
        return op(x, *args)

    monkeypatch.setattr(ops, "decoder_forward", counted)
    return seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_layer_by_layer(isa, calls, name, dtype):
    adapter = TransformersModel(make_model(name, dtype))
    calls.clear()
    fused = list(search(adapter))
    assert calls == [10, 8, 7, 7, 6, 5, 3]
    calls.clear()
    layers = list(search(adapter, by_layer=True))
    assert not calls
    for (tokens, a), (same_tokens, b) in zip(fused, layers, strict=True):
        assert tokens == same_tokens
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
        ("llama", {"num_hidden_layers": 1}),
        ("qwen3", {"num_key_value_heads": 4, "head_dim": 24}),
        ("qwen3", {"num_key_value_heads": 1, "vocab_size": 130, "attention_bias": True}),
    ],
)
def test_same_bits_for_other_sizes(name, config):
    adapter = TransformersModel(make_model(name, torch.bfloat16, **config))
    assert adapter.optimizations[-1] == ONE_OP
    for (_, a), (_, b) in zip(search(adapter), search(adapter, by_layer=True), strict=True):
        assert torch.equal(a, b)


def first_tokens(adapter, by_layer=False):
    """Returns the arguments of a forward over three tokens on pages of their own, and the pages."""
    pages = Pages(adapter)
    slots = pages.append([0], [3])
    table, lens = pages.table[:1], torch.tensor([3], dtype=torch.int32)
    plan = ops.plan_tree(
        table, lens, lens, page_size=PAGE_SIZE, num_qo_heads=adapter.num_qo_heads, num_kv_heads=adapter.num_kv_heads,
        head_dim=adapter.head_dim,
    )  # fmt: skip
    context = StepContext(pages.layer, table, lens, plan, slots, kv=None if by_layer else pages.kv)
    return (torch.tensor([5, 6, 7]), torch.arange(3), context, torch.tensor([2, 0, 2, 2])), pages


@pytest.mark.parametrize("name", NAMES)
def test_same_hidden_states_keys_and_values_as_layer_by_layer(name):
    adapter = TransformersModel(make_model(name, torch.bfloat16))
    (fused, pages), (layers, same_pages) = (first_tokens(adapter, by_layer) for by_layer in (False, True))
    for a, b in zip(adapter.forward_hidden(*fused), adapter.forward_hidden(*layers), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(pages.kv.nan_to_num(7.0), same_pages.kv.nan_to_num(7.0))


def test_a_prepared_forward_runs_on_any_thread_without_the_model():
    model = make_model("qwen3")
    adapter = TransformersModel(model)
    args, pages = first_tokens(adapter)
    want = adapter.forward_hidden(*args)
    pages.kv.fill_(torch.nan)
    prepared, results = adapter.prepare_forward(*args), []
    for module in model.modules():
        module.forward = None
    thread = threading.Thread(target=lambda: results.extend(prepared()))
    thread.start()
    thread.join()
    for a, b in zip(results, want, strict=True):
        assert torch.equal(a, b)


def test_a_prepared_forward_keeps_the_weights_of_its_preparation():
    model = make_model("qwen3")
    adapter = TransformersModel(model)
    args, _ = first_tokens(adapter)
    want = adapter.forward(*args)
    prepared = adapter.prepare_forward(*args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    assert torch.equal(prepared()[0], want)
    assert not torch.equal(adapter.forward(*args), want)


def test_nothing_is_prepared_where_forward_goes_layer_by_layer():
    adapter = TransformersModel(make_model("llama"))
    assert adapter.prepare_forward(*first_tokens(adapter, by_layer=True)[0]) is None
    kept = TransformersModel(make_model("llama"), optimize=False)
    assert kept.prepare_forward(*first_tokens(kept)[0]) is None


def test_pages_may_be_inference_tensors():
    adapter = TransformersModel(make_model("llama"))
    (ids, positions, context, rows), pages = first_tokens(adapter)
    with torch.inference_mode():
        pages.kv = pages.kv.clone()
    inference = StepContext(pages.layer, context.page_table, context.seq_lens, context.plan, context.slots, kv=pages.kv)
    want = adapter.forward(ids, positions, context, rows)
    assert torch.equal(adapter.forward(ids, positions, inference, rows), want)


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_forward_without_tokens(by_layer):
    adapter = TransformersModel(make_model("llama"))
    (_, _, context, _), pages = first_tokens(adapter)
    table, lens = context.page_table[:0], context.seq_lens[:0]
    plan = ops.plan_tree(table, lens, page_size=PAGE_SIZE, num_qo_heads=4, num_kv_heads=2, head_dim=16)
    none = torch.zeros(0, dtype=torch.int64)
    context = StepContext(pages.layer, table, lens, plan, none, kv=None if by_layer else pages.kv)
    logits, hidden = adapter.forward_hidden(none, none, context, none)
    assert logits.shape == (0, 97)
    assert hidden.shape == (0, 48)


def subclass(module, **methods):
    """Gives `module` a class of its own with other methods."""
    module.__class__ = type(f"Own{type(module).__name__}", (type(module),), methods)


def scale_logits(model):
    own = type(model).forward

    def forward(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    subclass(model, forward=forward)


def cap_logits(model):
    own = type(model).forward

    def forward(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out

    subclass(model, forward=forward)


def scale_embedded(model):
    own = type(model.model).forward

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        return own(self, inputs_embeds=self.embed_tokens(input_ids) * 1.5, **kwargs)

    subclass(model.model, forward=forward)


def scale_last_hidden(model):
    own = type(model.model).forward

    def forward(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state * 1.01
        return out

    subclass(model.model, forward=forward)


def layers_in_another_order(model):
    own = type(model.model).forward

    def forward(self, *args, **kwargs):
        layers = self.layers
        self._modules["layers"] = nn.ModuleList([layers[0], layers[2], layers[1]])
        try:
            return own(self, *args, **kwargs)
        finally:
            self._modules["layers"] = layers

    for index, layer in zip((0, 2, 1), model.model.layers, strict=True):
        layer.self_attn.layer_idx = index
    subclass(model.model, forward=forward)


def add_module(model):
    model.model.add_module("norm_of_embeddings", nn.LayerNorm(48))


def hook(path):
    def add(model):
        model.get_submodule(path).register_forward_hook(lambda module, args, output: None)

    add.__name__ = f"hook_on_{path or 'root'}"
    return add


def pre_hook(path):
    def add(model):
        model.get_submodule(path).register_forward_pre_hook(lambda module, args: None)

    add.__name__ = f"pre_hook_on_{path or 'root'}"
    return add


def replace_forward(model):
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)


def another_epsilon(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 0.1


def another_activation(model):
    model.model.layers[1].mlp.act_fn = nn.GELU(approximate="tanh")


def another_width(model):
    mlp = model.model.layers[2].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(48, 64), nn.Linear(48, 64), nn.Linear(64, 48)


def own_head(model):
    subclass(model.lm_head, forward=lambda self, x: nn.functional.linear(x, self.weight * 2))


HOOKED = ["", "model", "model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.1",
          "model.layers.2.self_attn", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.act_fn"]  # fmt: skip
HOOKS = r"\(it has forward hooks, which would not run\)"
DIFFERS = r"\(its result differs\)"
NOT_ALL = r"\(not all of it has a faster forward\)"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (scale_logits, DIFFERS),
        (cap_logits, DIFFERS),
        (scale_embedded, DIFFERS),
        (scale_last_hidden, DIFFERS),
        (layers_in_another_order, r"\(its layers are numbered in a way of their own\)"),
        (add_module, r"\(it does not consist of embed_tokens, rotary_emb, layers and norm\)"),
        *((hook(path), HOOKS) for path in HOOKED),
        *((pre_hook(path), HOOKS) for path in HOOKED),
        (replace_forward, r"\(somebody else replaced its forward\)"),
        (another_epsilon, r"\(its layers differ in epsilon\)"),
        (another_activation, r"\(its layers differ in activation\)"),
        (another_width, r"\(its layers differ in intermediate size\)"),
        (own_head, NOT_ALL),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_other_models_go_layer_by_layer(calls, change, reason, when):
    """The report says why, whether the change comes before the adapter is made or after."""
    model = make_model("llama")
    if when == "before":
        change(model)
    adapter = TransformersModel(model)
    if when == "after":
        assert adapter.optimizations[-1] == ONE_OP
        change(model)
        adapter.refresh(force=change in (another_epsilon, layers_in_another_order))  # plain attributes
    assert len([line for line in adapter.optimizations if line.startswith("layer by layer")]) == 1
    assert re.fullmatch(f"layer by layer {reason}", adapter.optimizations[-1])
    calls.clear()
    assert last_error(adapter, model) < 1e-3
    assert not calls


@pytest.mark.parametrize("path", HOOKED)
def test_hooks_run_and_the_op_comes_back_without_them(calls, path):
    model = make_model("llama")
    adapter = TransformersModel(model)
    ran = []
    handle = model.get_submodule(path).register_forward_hook(lambda *args: ran.append(1))
    step(adapter, Pages(adapter), {0: [5, 6, 7]})
    assert ran
    handle.remove()
    calls.clear()
    step(adapter, Pages(adapter), {0: [5, 6, 7]})
    assert 3 in calls
    assert adapter.optimizations[-1] == ONE_OP


@pytest.mark.parametrize("part", ["model.embed_tokens", "model.layers.1.input_layernorm", "model.layers.0.mlp.up_proj",
                                  "model.layers.2.self_attn.k_norm", "model.norm", "lm_head"])  # fmt: skip
@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_changed_weights_are_followed(calls, part, change):
    model = make_model("qwen3")
    adapter = TransformersModel(model)
    before = list(search(adapter))[-1][1]
    module = model.get_submodule(part)
    with torch.no_grad():
        if change == "in place":
            module.weight.mul_(-1.5)
        else:
            module.weight = nn.Parameter(module.weight * -1.5)
    calls.clear()
    results = list(search(adapter))
    assert calls[-7:] == [10, 8, 7, 7, 6, 5, 3]
    assert not torch.equal(results[-1][1], before)
    for (tokens, a), (_, b) in zip(results, search(adapter, by_layer=True), strict=True):
        assert torch.equal(a, b)
        assert (a - plain(model, tokens)[-len(a) :]).abs().max() < 1e-3

"""TransformersModel: packed branches over shared pages give the logits of separate plain forwards."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from support.transformers_models import MODELS, make_model, plain, search
from transformers import AutoConfig, AutoModelForCausalLM

from treedecode.models.transformers import TransformersModel

pytestmark = pytest.mark.usefixtures("one_thread")


def error_budget(model):
    """Returns a function that gives four times the error of the plain fp32 forward on tokens, against float64."""
    exact = copy.deepcopy(model).double()
    if exact.config.model_type == "gpt_oss":
        exact.set_experts_implementation("eager")  # the others have no float64

    def budget(tokens, plain_logits):
        truth = plain(exact, tokens)
        return 4 * (plain_logits.double() - truth).abs().max() + 1e-6 * truth.abs().max()

    return budget


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_tree_decode_equals_separate_forwards(name, optimize):
    model = make_model(name)
    budget = error_budget(model)
    adapter = TransformersModel(model, optimize=optimize)
    for tokens, logits in search(adapter):
        want = plain(model, tokens)
        error = (logits - want[-len(logits) :]).abs().max()
        assert error <= budget(tokens, want), f"{len(tokens)} tokens: {error}"


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_bf16_error_is_that_of_a_plain_bf16_forward(name, optimize):
    exact, model = make_model(name), make_model(name, torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    adapter = TransformersModel(model, optimize=optimize)
    ours, theirs = [], []
    for tokens, logits in search(adapter):
        truth = plain(exact, tokens)[-len(logits) :]
        ours.append((logits - truth).flatten())
        theirs.append((plain(model, tokens)[-len(logits) :] - truth).flatten())
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    assert ours.pow(2).mean().sqrt() <= 1.25 * theirs.pow(2).mean().sqrt()


def test_sizes_of_the_adapter():
    model = make_model("qwen3")
    adapter = TransformersModel(model)
    sizes = (adapter.num_layers, adapter.num_qo_heads, adapter.num_kv_heads, adapter.head_dim, adapter.vocab_size)
    assert sizes == (3, 4, 2, 16, 97)
    assert (adapter.max_position, adapter.dtype, adapter.device.type) == (128, torch.float32, "cpu")
    assert adapter.eos_token_ids == (2,)


def test_the_model_is_unchanged_between_forwards():
    model = make_model("gemma3_text")
    before = plain(model, [5, 6, 7])
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    adapter = TransformersModel(model)
    list(search(adapter))
    assert model.config._attn_implementation == "eager"
    assert torch.equal(plain(model, [5, 6, 7]), before)
    assert attributes == {name: module.__dict__ for name, module in model.named_modules()}
    with pytest.raises(AttributeError):  # also after a forward that failed
        adapter.forward(
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(2, dtype=torch.int64),
            SimpleNamespace(),
            torch.zeros(1).long(),
        )
    assert model.config._attn_implementation == "eager"
    assert torch.equal(plain(model, [5, 6, 7]), before)


def test_tiny_vocabulary_and_end_tokens_outside_of_it():
    for size in (1, 2, 5):
        model = make_model("llama", vocab_size=size, pad_token_id=None, bos_token_id=None, eos_token_id=None)
        model.generation_config.eos_token_id = [-1, size - 1, size]
        adapter = TransformersModel(model)
        assert adapter.vocab_size == size
        assert adapter.eos_token_ids == (size - 1,)


BIDIRECTIONAL = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}


def unsupported(name, **config):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **config)).eval()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), TypeError, "expected a transformers.PreTrainedModel, got Linear"),
        (lambda: unsupported("bloom", hidden_size=16, n_layer=1, n_head=2, vocab_size=11), ValueError,
         "BloomForCausalLM does not support attention backends"),
        (lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=11, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval(),
         ValueError, "T5ForConditionalGeneration is an encoder-decoder"),
        (lambda: make_model("llama").model, ValueError, "LlamaModel has no language model head"),
        (lambda: make_model("llama").train(), ValueError, r"training mode.*call model.eval\(\)"),
        (lambda: make_model("llama").to("meta"), ValueError, "LlamaForCausalLM are on the meta device"),
        *((lambda name=name: unsupported(name, **BIDIRECTIONAL), ValueError,
           "SelfAttention attends in both directions") for name in ("bert", "roberta", "electra")),
    ],
)  # fmt: skip
def test_unsupported_models_say_why(make, error, message):
    with pytest.raises(error, match=message):
        TransformersModel(make())

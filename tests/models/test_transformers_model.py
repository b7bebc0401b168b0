"""The Transformers adapter: packed branches over shared pages give the logits of separate plain forwards."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from treedecode import ops
from treedecode.models.transformers import StepContext, TransformersModel

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # large enough that attention is far from uniform
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 7  # shorter than the prompt
MODELS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 9.0},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt_oss": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "ministral3": {  # scales queries from position 8 on
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 8,
        },
    },
    "ernie4_5": {},  # rotates neighbouring dimensions
}
PAGE_SIZE = 4


pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(name, dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SMALL | MODELS[name] | overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():  # initialisers leave biases, sinks and norm weights at a constant
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


class Pages:
    """The least page pool that can fork: full pages are shared, the last partial page is copied."""

    def __init__(self, adapter, max_branches=8):
        shape = (adapter.num_layers, 2, 64, adapter.num_kv_heads, PAGE_SIZE, adapter.head_dim)
        self.kv = torch.full(shape, float("nan"), dtype=adapter.dtype)
        self.table = torch.full((max_branches, 32), 2**30, dtype=torch.int32)
        self.lens = [0] * max_branches
        self.used = 0

    def layer(self, index):
        return self.kv[index, 0].transpose(1, 2), self.kv[index, 1].transpose(1, 2)

    def new_page(self):
        self.used += 1
        return self.used * 37 % 64  # scattered

    def fork(self, source, target):
        self.table[target] = self.table[source]
        self.lens[target] = self.lens[source]
        if self.lens[source] % PAGE_SIZE:
            last, page = self.lens[source] // PAGE_SIZE, self.new_page()
            self.kv[:, :, page] = self.kv[:, :, self.table[source, last].item()]
            self.table[target, last] = page

    def append(self, rows, q_lens):
        slots = []
        for row, count in zip(rows, q_lens, strict=True):
            for _ in range(count):
                block, offset = divmod(self.lens[row], PAGE_SIZE)
                if offset == 0:
                    self.table[row, block] = self.new_page()
                slots.append(self.table[row, block].item() * PAGE_SIZE + offset)
                self.lens[row] += 1
        return torch.tensor(slots)


def step(adapter, pages, tokens, by_layer=False):
    """One forward; `tokens` maps row -> new tokens. Returns row -> logits of those tokens."""
    rows = list(tokens)
    q_lens = [len(tokens[row]) for row in rows]
    starts = [pages.lens[row] for row in rows]
    slots = pages.append(rows, q_lens)
    table = pages.table[rows].contiguous()
    lens = torch.tensor([pages.lens[row] for row in rows], dtype=torch.int32)
    plan = ops.plan_tree(
        table,
        lens,
        torch.tensor(q_lens, dtype=torch.int32),
        page_size=PAGE_SIZE,
        num_qo_heads=adapter.num_qo_heads,
        num_kv_heads=adapter.num_kv_heads,
        head_dim=adapter.head_dim,
    )
    ids = torch.cat([torch.tensor(tokens[row]) for row in rows])
    positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, q_lens, strict=True)])
    context = StepContext(pages.layer, table, lens, plan, slots, kv=None if by_layer else pages.kv)
    logits = adapter.forward(ids, positions, context, torch.arange(len(ids)))
    return dict(zip(rows, logits.split(q_lens), strict=True))


def plain(model, tokens):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def search(adapter, by_layer=False):
    """Chunked prefill, fork, decode and a second prompt joining in; yields (row's tokens, logits of the newest)."""
    generator = torch.Generator().manual_seed(1)

    def draw(n):
        return torch.randint(3, 97, (n,), generator=generator).tolist()

    pages, text = Pages(adapter), {0: draw(18), 4: draw(11)}
    first, rest = text[0][:10], text[0][10:]
    yield first, step(adapter, pages, {0: first}, by_layer)[0]
    yield text[0], step(adapter, pages, {0: rest}, by_layer)[0]
    for row in (1, 2):
        pages.fork(0, row)
        text[row] = list(text[0])
    done = 0  # tokens of row 4 already prefilled, in chunks that ride along with the decoding rows
    for tick in range(5):
        tokens = {row: draw(1) for row in (0, 1, 2)}
        if done < 11:
            tokens[4] = text[4][done : done + 4]
            done += 4
        if tick == 3:
            tokens[1] = draw(3)  # forced text
        for row in (0, 1, 2):
            text[row] = text[row] + tokens[row]
        out = step(adapter, pages, tokens, by_layer)
        for row in tokens:
            yield text[row] if row != 4 else text[4][:done], out[row]


def error_budget(model):
    """tokens -> what plain fp32 arithmetic loses on them: the error of the plain forward against float64."""
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


def test_sizes_and_logit_rows():
    model = make_model("qwen3")
    adapter = TransformersModel(model)
    sizes = (adapter.num_layers, adapter.num_qo_heads, adapter.num_kv_heads, adapter.head_dim, adapter.vocab_size)
    assert sizes == (3, 4, 2, 16, 97)
    assert (adapter.max_position, adapter.dtype, adapter.device.type) == (128, torch.float32, "cpu")
    assert adapter.eos_token_ids == (2,)


def test_model_is_left_as_it_was():
    model = make_model("gemma3_text")
    before = plain(model, [5, 6, 7])
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    adapter = TransformersModel(model)
    list(search(adapter))
    assert model.config._attn_implementation == "eager"
    assert torch.equal(plain(model, [5, 6, 7]), before)
    assert attributes == {name: module.__dict__ for name, module in model.named_modules()}
    with pytest.raises(AttributeError):  # also after a forward that failed
        adapter.forward(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), SimpleNamespace(), None)
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

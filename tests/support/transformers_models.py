"""Tiny random Transformers models of every supported kind, and a search on them over shared pages."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from treedecode import ops
from treedecode.models.transformers import StepContext

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


def make_model(name, dtype=torch.float32, **overrides):
    """Makes a random model of a type of `MODELS`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SMALL | MODELS[name] | overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():  # initialisers leave biases, sinks and norm weights at a constant
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


class Pages:
    """A minimal page pool: a fork shares full pages and copies the last partial one. Unused pages hold NaN."""

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
    """Runs one forward over the new tokens of each row, and returns their logits by row.

    Args:
        tokens: row -> new tokens.
        by_layer: the context has no `kv`, so that the model goes layer by layer.
    """
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
    """Returns the logits `[num_tokens, vocab_size]` of the model's own forward without a cache."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def search(adapter, by_layer=False):
    """Prefills a prompt in chunks, forks it and decodes, while a second prompt joins in.

    Yields (tokens of a row so far, logits of the newest of them) for every row of every forward.
    """
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


def last_error(adapter, model):
    """Returns the largest difference of the last logits of a search from those of the model's own forward."""
    tokens, logits = list(search(adapter))[-1]
    return (logits - plain(model, tokens)[-len(logits) :]).abs().max()

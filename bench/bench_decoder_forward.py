"""Times all layers and the head of a decoder in one op, beside the same kernels called from Python, and Transformers.

The models have random weights and the sizes of the countdown model that comes with the package and of SmolLM2-135M.
Each branch's newest token attends over 128 shared and 16 own tokens. The first peer starts from embedded tokens and
angles as ours does; the other two are the whole forward of the model, Transformers' with a cache for each branch.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig

from bench.bench_forward import context_of
from treedecode import ops
from treedecode.models import StepContext, TransformersModel
from treedecode.ops.decoder_forward import LAYER_TENSORS
from treedecode.tasks.countdown import model_path

SHARED, OWN = 128, 16
SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module", params=["countdown", "smollm2"])
def adapter(request):
    torch.manual_seed(0)
    config = SMOLLM2 if request.param == "smollm2" else AutoConfig.from_pretrained(model_path())
    return TransformersModel(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval())


def op_by_op(x, cos, sin, kv, slots, table, lens, plan, rows, w):
    """Computes `decoder_forward` op by op, without biases, head norms, windows, soft caps and sinks."""
    num_tokens, hidden = x.shape
    num_kv_heads, head_dim = kv.shape[3], kv.shape[5]
    heads = [w.num_qo_heads, num_kv_heads, num_kv_heads]
    for i, pages in enumerate(kv):
        layer = w.tensors[i * len(LAYER_TENSORS) : (i + 1) * len(LAYER_TENSORS)]
        t = dict(zip(LAYER_TENSORS, layer, strict=True))
        qkv = ops.packed_linear(ops.rms_norm(x, t["input_norm"], w.eps), t["qkv"], sum(heads) * head_dim)
        q, k, v = qkv.view(num_tokens, -1, head_dim).split(heads, dim=1)
        ops.rotary_embed(q, k, cos, sin)
        k_pages, v_pages = pages[0].transpose(1, 2), pages[1].transpose(1, 2)
        ops.append_kv(k, v, k_pages, v_pages, slots)
        out, _ = ops.tree_attention(q, k_pages, v_pages, table, lens, plan, sm_scale=w.sm_scales[i])
        x = ops.packed_linear(out.view(num_tokens, -1), t["o_proj"], hidden, residual=x)
        normed = ops.rms_norm(x, t["output_norm"], w.eps)
        act = ops.packed_linear(normed, t["gate_up"], w.intermediate_size, gate=w.gate)
        x = ops.packed_linear(act, t["down"], hidden, residual=x)
    states = ops.rms_norm(x[rows], w.tensors[-3], w.eps)
    return ops.packed_linear(states, w.tensors[-2], w.vocab_size), states


@pytest.mark.parametrize("num_branches", [1, 16, 64, 300])
def bench_decoder_forward(compare, adapter, num_branches):
    context = context_of(adapter, num_branches, SHARED, OWN)
    layer_by_layer = StepContext(context.layer, context.page_table, context.seq_lens, context.plan, context.slots)
    ids = torch.randint(adapter.vocab_size, (num_branches,))
    positions, rows = torch.full((num_branches,), SHARED + OWN - 1), torch.arange(num_branches)
    args = adapter.prepare_forward(ids, positions, context, rows).args
    with torch.inference_mode():
        assert all(map(torch.equal, ops.decoder_forward(*args), op_by_op(*args)))
    cache = DynamicCache()
    empty = torch.randn(num_branches, adapter.num_kv_heads, SHARED + OWN - 1, adapter.head_dim).to(adapter.dtype)
    for layer in range(adapter.num_layers):
        cache.update(empty, empty, layer)

    def crop_cache():
        if extra := cache.get_seq_length() - (SHARED + OWN - 1):
            cache.crop(-extra)

    def transformers():
        return adapter.model(input_ids=ids[:, None], position_ids=positions[:, None], past_key_values=cache)

    parameters = {id(p): p for name, p in adapter.model.named_parameters() if "embed_tokens" not in name}
    head = adapter.model.get_output_embeddings().weight  # may be tied to embed_tokens
    count = sum(p.numel() for p in (parameters | {id(head): head}).values())
    kv_token = 2 * adapter.num_layers * adapter.num_kv_heads * adapter.head_dim
    score_token = 4 * adapter.num_layers * adapter.num_qo_heads * adapter.head_dim
    with torch.inference_mode():
        compare(
            lambda: ops.decoder_forward(*args),
            {
                "op by op": lambda: op_by_op(*args),
                "layer by layer": lambda: adapter.forward(ids, positions, layer_by_layer, rows),
                "Transformers": transformers,
            },
            num_bytes=adapter.dtype.itemsize * (count + kv_token * (SHARED + num_branches * OWN)),
            num_flops=num_branches * (2 * count + score_token * (SHARED + OWN)),
            dtype=adapter.dtype,
            prepare=crop_cache,
        )

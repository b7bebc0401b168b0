"""Times one decode step of SmolLM2-135M without sampling: each branch's newest token over 512 shared and 32 own ones.

The peers are the model's own forward with an attention that does nothing, whose time is the most that anything around
attention can gain, and the linear layers alone over weights in oneDNN's layout, whose time is the least that they take.
"""

import pytest
import torch

from examples.smollm2 import gguf_path
from treedecode import ops
from treedecode.models import StepContext, TransformersModel, load_pretrained

SHARED, OWN, PAGE_SIZE = 512, 32, 16


class NoAttention:
    """Takes the place of a StepContext, and neither stores nor reads keys and values."""

    def attend(self, layer_index, q, k, v, **kwargs):
        return q


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def adapter(request):
    return TransformersModel(load_pretrained(gguf_path(), dtype=request.param)[0])


def context_of(adapter, num_branches, num_shared=SHARED, num_own=OWN):
    """Makes the context of branches that share whole pages of a prompt and have whole pages of their own."""
    num_pages = (num_shared + num_branches * num_own) // PAGE_SIZE
    kv = torch.randn(adapter.num_layers, 2, num_pages, adapter.num_kv_heads, PAGE_SIZE, adapter.head_dim)
    kv = kv.to(adapter.dtype)
    shared = torch.arange(num_shared // PAGE_SIZE)
    own = torch.arange(len(shared), num_pages).view(num_branches, -1)
    table = torch.cat([shared.expand(num_branches, -1), own], dim=1).int()
    lens = torch.full((num_branches,), num_shared + num_own, dtype=torch.int32)
    plan = ops.plan_tree(
        table, lens, page_size=PAGE_SIZE, num_qo_heads=adapter.num_qo_heads, num_kv_heads=adapter.num_kv_heads,
        head_dim=adapter.head_dim,
    )  # fmt: skip
    slots = table[:, -1].long() * PAGE_SIZE + PAGE_SIZE - 1
    layers = [(pages[0].transpose(1, 2), pages[1].transpose(1, 2)) for pages in kv]
    return StepContext(layers.__getitem__, table, lens, plan, slots, kv=kv)


def linears_of(model, num_rows):
    """Returns (input, weight) of every linear layer of a step, weights in oneDNN's layout."""
    reorder = torch.ops.mkldnn._reorder_linear_weight
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    with torch.inference_mode():
        packed = [(weight.shape[1], reorder(weight.detach(), num_rows)) for weight in weights]
    inputs = {size: torch.randn(num_rows, size).to(model.dtype) for size, _ in packed}
    return [(inputs[size], weight) for size, weight in packed]


@pytest.mark.parametrize("num_branches", [1, 16, 64])
def bench_forward(compare, adapter, num_branches):
    plain = TransformersModel(adapter.model, optimize=False)
    context, nothing = context_of(adapter, num_branches), NoAttention()
    ids = torch.randint(1000, 40000, (num_branches,))
    positions = torch.full((num_branches,), SHARED + OWN - 1)
    rows = torch.arange(num_branches)
    linears = linears_of(adapter.model, num_branches)

    def linears_alone():
        with torch.inference_mode():
            for x, weight in linears:
                torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    parameters = [p for name, p in adapter.model.named_parameters() if "embed_tokens" not in name]
    parameters.append(adapter.model.get_output_embeddings().weight)  # tied to embed_tokens
    count = sum(p.numel() for p in {id(p): p for p in parameters}.values())
    size = adapter.dtype.itemsize
    kv_token = 2 * adapter.num_layers * adapter.num_kv_heads * adapter.head_dim
    score_token = 4 * adapter.num_layers * adapter.num_qo_heads * adapter.head_dim
    compare(
        lambda: adapter.forward(ids, positions, context, rows),
        {
            "optimize=False": lambda: plain.forward(ids, positions, context, rows),
            "Transformers, no attention": lambda: plain.forward(ids, positions, nothing, rows),
            "ours, no attention": lambda: adapter.forward(ids, positions, nothing, rows),
            "linears alone (oneDNN prepacked)": linears_alone,
        },
        num_bytes=size * (count + kv_token * (SHARED + num_branches * OWN)),
        num_flops=num_branches * (2 * count + score_token * (SHARED + OWN)),
        dtype=adapter.dtype,
    )

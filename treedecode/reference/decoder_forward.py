"""Reference of decoder_forward, by the references of its ops."""

from typing import Any

import torch
from torch import Tensor

from treedecode.reference.append_kv import append_kv
from treedecode.reference.packed_linear import packed_linear
from treedecode.reference.rms_norm import rms_norm
from treedecode.reference.rotary_embed import rotary_embed
from treedecode.reference.tree_attention import tree_attention

_LAYER_TENSORS = 13


def decoder_forward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    slots: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    plan: Any,
    logit_rows: Tensor,
    weights: Any,
) -> tuple[Tensor, Tensor]:
    """See `treedecode.ops.decoder_forward`; rounds where the ops round."""
    w = weights
    num_tokens, hidden_size = x.shape
    num_kv_heads, head_dim = kv.shape[3], kv.shape[5]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, w.eps, unit_offset=w.unit_offset)

    def linear(x: Tensor, weight: Tensor, bias: Tensor, out_features: int, **options: Any) -> Tensor:
        return packed_linear(x, weight, out_features, bias=bias if bias.numel() else None, **options)

    for layer, pages in enumerate(kv):
        (input_norm, qkv, qkv_bias, q_norm, k_norm, o_proj, o_proj_bias, output_norm, gate_up, gate_up_bias, down,
         down_bias, sinks) = w.tensors[layer * _LAYER_TENSORS : (layer + 1) * _LAYER_TENSORS]  # fmt: skip
        heads = [w.num_qo_heads, num_kv_heads, num_kv_heads]
        mixed = linear(norm(x, input_norm), qkv, qkv_bias, sum(heads) * head_dim)
        q, k, v = (part.clone() for part in mixed.view(num_tokens, sum(heads), head_dim).split(heads, dim=1))
        if q_norm.numel():
            q, k = norm(q, q_norm), norm(k, k_norm)
        rotary_embed(q, k, cos, sin)
        k_pages, v_pages = pages[0].transpose(1, 2), pages[1].transpose(1, 2)
        append_kv(k, v, k_pages, v_pages, slots)
        out, _ = tree_attention(
            q, k_pages, v_pages, page_table, seq_lens, plan, sm_scale=w.sm_scales[layer],
            window_left=w.windows[layer], logits_soft_cap=w.soft_caps[layer], sinks=sinks if sinks.numel() else None,
        )  # fmt: skip
        x = linear(out.to(x.dtype).flatten(1), o_proj, o_proj_bias, hidden_size, residual=x)
        act = linear(norm(x, output_norm), gate_up, gate_up_bias, w.intermediate_size, gate=w.gate)
        x = linear(act, down, down_bias, hidden_size, residual=x)
    final_norm, lm_head, lm_head_bias = w.tensors[-3:]
    hidden = norm(x[logit_rows], final_norm)
    return linear(hidden, lm_head, lm_head_bias, w.vocab_size), torch.clone(hidden)

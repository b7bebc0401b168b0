"""decoder_forward: runs all layers of a common decoder, its last norm and its head, in one call on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call, register_fake
from treedecode.ops.plan_tree import TreePlan

# Tensors of one layer in `DecoderWeights.tensors`, in order; `pack_weight` and `pack_bias` lay out the linear ones.
LAYER_TENSORS = (
    "input_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o_proj", "o_proj_bias",
    "output_norm", "gate_up", "gate_up_bias", "down", "down_bias", "sinks",
)  # fmt: skip
HEAD_TENSORS = ("final_norm", "lm_head", "lm_head_bias")


@dataclass(frozen=True)
class DecoderWeights:
    """The weights and constants of a decoder, as `decoder_forward` takes them.

    Attributes:
        tensors: those of LAYER_TENSORS for each layer, then those of HEAD_TENSORS; an empty tensor where there is none.
            Norms are `[hidden_size]` (q_norm and k_norm `[head_dim]`, of every head), linear weights `[num_panels,
            in_features, 16]`, biases `[num_panels * 16]`, sinks `[num_qo_heads]` fp32; all others of the dtype of x.
        sm_scales, soft_caps, windows: of each layer's attention: the factor of q k^T, `logits_soft_cap` and
            `window_left` of `tree_attention`.
        eps, unit_offset: of all norms, as in `rms_norm`.
        gate: "silu" or "gelu_tanh".
        num_qo_heads, intermediate_size, vocab_size: sizes that cannot be read off the padded shapes of tensors.
    """

    tensors: Sequence[Tensor]
    sm_scales: Sequence[float]
    soft_caps: Sequence[float]
    windows: Sequence[int]
    eps: float
    unit_offset: bool
    gate: str
    num_qo_heads: int
    intermediate_size: int
    vocab_size: int


def decoder_forward(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    slots: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    plan: TreePlan,
    logit_rows: Tensor,
    weights: DecoderWeights,
) -> tuple[Tensor, Tensor]:
    """Runs one forward of embedded tokens: layers of norm, attention, residual, norm, gated MLP, residual; norm; head.

    It calls the kernels of the single ops in their order, so the result has the same bits; it saves a round trip to
    Python per op, and does not hold the interpreter's lock.

    Args:
        x: `[num_tokens, hidden_size]`, the embedded query tokens of all branches in row order; fp32, bf16 or fp16,
            contiguous.
        cos, sin: `[num_tokens, head_dim]`, the tokens' angles as for `rotary_embed`; dtype of x.
        kv: `[num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]`, keys (0) and values (1) of all layers, any
            strides with unit head_dim stride; dtype of x. Written at `slots`.
        slots: `[num_tokens]` int64, as for `append_kv`.
        page_table, seq_lens, plan: as for `tree_attention`.
        logit_rows: `[num_logits]` int64, the tokens whose logits are wanted.
        weights: of the model.

    Returns:
        logits `[num_logits, vocab_size]` and hidden `[num_logits, hidden_size]`, the input of the head; dtype of x.

    Raises:
        ValueError: an argument's shape, stride or value does not fit; nothing is written.
        TypeError: an argument's dtype does not fit; nothing is written.
    """
    if USE_REFERENCE:
        return reference.decoder_forward(x, cos, sin, kv, slots, page_table, seq_lens, plan, logit_rows, weights)
    w = weights
    return call(
        torch.ops.treedecode.decoder_forward.default,
        x, cos, sin, kv, slots, page_table, seq_lens, *plan.tensors,
        logit_rows, w.tensors, w.sm_scales, w.soft_caps, w.windows, w.eps, w.unit_offset, w.gate, w.num_qo_heads,
        w.intermediate_size, w.vocab_size,
    )  # fmt: skip


@register_fake("decoder_forward")
def _(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    slots: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    q_indptr: Tensor,
    part_indptr: Tensor,
    chunks: Tensor,
    counts: Tensor,
    order: Tensor,
    row_indptr: Tensor,
    logit_rows: Tensor,
    weights: Sequence[Tensor],
    sm_scales: Sequence[float],
    soft_caps: Sequence[float],
    windows: Sequence[int],
    eps: float,
    unit_offset: bool,
    gate: str,
    num_qo_heads: int,
    intermediate_size: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(logit_rows.shape[0], vocab_size), x.new_empty(logit_rows.shape[0], x.shape[1])

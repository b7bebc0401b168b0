"""rotary_embed: rotary position embedding of queries and keys, in place."""

import torch
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call, register_fake


def rotary_embed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates q and k in place: element i of a head pairs with element i + head_dim / 2.

    With the halves `a, b` of a head, `a' = a cos - b sin` and `b' = b cos + a sin`, each half with its own half of cos
    and sin; computed in fp32 and rounded once.

    Args:
        q: `[num_tokens, num_qo_heads, head_dim]`, fp32, bf16 or fp16, head_dim even, unit stride in head_dim.
        k: `[num_tokens, num_kv_heads, head_dim]`, dtype of q, unit stride in head_dim.
        cos, sin: `[num_tokens, head_dim]`, dtype of q.

    Raises:
        ValueError: an argument's shape or stride does not fit; nothing is written.
        TypeError: an argument's dtype does not fit; nothing is written.

    Source: Su et al., RoFormer, arXiv 2104.09864, with the halves split as GPT-NeoX and Transformers do.
    """
    if USE_REFERENCE:
        return reference.rotary_embed(q, k, cos, sin)
    call(torch.ops.treedecode.rotary_embed.default, q, k, cos, sin)
    return None


@register_fake("rotary_embed")
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    return None

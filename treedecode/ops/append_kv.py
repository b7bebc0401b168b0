"""append_kv: writes keys and values of new tokens into the paged cache."""

import torch
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call, register_fake


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Writes K and V of new tokens to their slots, in place.

    Args:
        k, v: `[num_tokens, num_kv_heads, head_dim]`, fp32, bf16 or fp16, unit stride in the last dimension.
        k_pages, v_pages: `[num_pages, page_size, num_kv_heads, head_dim]`, same dtype, any strides with unit
            head_dim stride.
        slots: `[num_tokens]` int64, `page * page_size + offset`; a negative slot is skipped. No two tokens may
            share a slot: then the slot holds the K and V of any of them, and this is not checked.

    Raises:
        ValueError: an argument's shape or stride is wrong, or a slot is out of range; nothing is written.
        TypeError: an argument's dtype is wrong; nothing is written.
    """
    if USE_REFERENCE:
        return reference.append_kv(k, v, k_pages, v_pages, slots)
    call(torch.ops.treedecode.append_kv.default, k, v, k_pages, v_pages, slots)
    return None


@register_fake("append_kv")
def _(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    return None

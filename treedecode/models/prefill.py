"""Dense attention for long prefills on a GPU, by flash-attn where it is installed, else by torch.

A branch with many query tokens shares no work with others, and a dense product needs no plan.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


@dataclass(frozen=True)
class Prefill:
    """The packed tokens `[q_begin, q_end)` of a forward, the last ones of page-table row `row`, which has `seq_len`."""

    row: int
    q_begin: int
    q_end: int
    seq_len: int


@functools.cache
def flash_attention() -> Callable[..., Any] | None:
    """Returns flash-attn's function, or None where it cannot be imported."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def supports(*, head_dim: int, dtype: torch.dtype, softcap: bool, sinks: bool) -> bool:
    """Returns whether `attend` computes such a layer: it knows no sinks, and soft caps only with flash-attn."""
    has_flash = flash_attention() is not None and dtype != torch.float32 and head_dim <= 256
    return not sinks and (has_flash or not softcap)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None, softcap: float | None
) -> Tensor:
    """Computes causal attention of the last tokens of a sequence over all of it.

    Args:
        q: `[q_len, num_qo_heads, head_dim]`; k, v: `[seq_len, num_kv_heads, head_dim]`, seq_len at least q_len.
        sliding_window: how many keys a query sees, its own included; None = all.
        softcap: as `logits_soft_cap` of `ops.tree_attention`; None = off.

    Returns:
        `[q_len, num_qo_heads, head_dim]`.
    """
    flash = flash_attention()
    if flash is not None and q.is_cuda and q.dtype != torch.float32 and q.shape[2] <= 256:
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        out = flash(
            q[None], k[None], v[None], softmax_scale=scale, causal=True, window_size=window, softcap=softcap or 0.0
        )
        return out[0]
    if softcap:
        raise ValueError("softcap: scaled_dot_product_attention has none")
    q_len, seq_len = q.shape[0], k.shape[0]
    mask: Any = causal_lower_right(q_len, seq_len)
    if sliding_window is not None and sliding_window < seq_len:
        key = torch.arange(seq_len, device=q.device)
        position = torch.arange(seq_len - q_len, seq_len, device=q.device)[:, None]
        mask = (key <= position) & (key > position - sliding_window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)

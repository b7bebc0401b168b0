"""AttentionProbe: a stand-in for attention that records what the layers of a model ask of it."""

from typing import Any

import torch
from torch import Tensor


def probe_positions(count: int, max_position: int, device: Any = None) -> Tensor:
    """Spreads `[count]` positions from 0 to the last one, `max_position - 1`.

    Forwards are compared on tokens there: some models scale queries from a position on, and a comparison at small
    positions would miss it.
    """
    return torch.arange(count, device=device) * (max_position - 1) // (count - 1)


class AttentionProbe:
    """Takes the place of a StepContext for one forward, and records the attention of every layer.

    Its attention needs no cache, but its result depends on q, k, v and the scaling, so that layers can be compared. A
    token looks at the key of the one before: a rotation of both by the same angle would change nothing.

    Attributes:
        calls: layer index and arguments (scaling, sliding_window, softcap, sinks) of each call.
        shapes: (num_qo_heads, num_kv_heads, and the head_dims of q, k and v) that occurred.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, Any]]] = []
        self.shapes: set[tuple[int, ...]] = set()

    def attend(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor, **attention_args: Any) -> Tensor:
        """Records the call, and returns `[num_tokens, num_qo_heads, head_dim]` as `StepContext.attend` does."""
        self.calls.append((layer_index, attention_args))
        self.shapes.add((q.shape[1], k.shape[1], q.shape[2], k.shape[2], v.shape[2]))
        if v.shape[2] != q.shape[2] or k.shape != v.shape:
            return torch.zeros_like(q)
        group = q.shape[1] // k.shape[1]
        key = k.roll(1, 0).repeat_interleave(group, 1).float()
        score = (q.float() * key).sum(-1, keepdim=True) * (attention_args["scaling"] or 1.0)
        # The first term depends on the size of the scores, the second on their pattern where they are small.
        weight = score.sigmoid() + score / score.pow(2).mean().sqrt().clamp_min(1e-30)
        return (v.repeat_interleave(group, 1) * weight).to(q.dtype)

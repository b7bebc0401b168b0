"""What one forward has to know of the pages."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from treedecode import ops


@dataclass(frozen=True)
class StepContext:
    """What attention needs to know of one forward.

    Attributes:
        layer: layer index -> `(k_pages, v_pages)`, each `[num_pages, page_size, num_kv_heads, head_dim]`.
        page_table: `[num_branches, max_pages]` int32.
        seq_lens: `[num_branches]` int32, tokens in the cache including those of this forward.
        plan: the `TreePlan` of these branches.
        slots: `[num_tokens]` int64, where each packed token's K and V go.
    """

    layer: Callable[[int], tuple[Tensor, Tensor]]
    page_table: Tensor
    seq_lens: Tensor
    plan: Any
    slots: Tensor

    def attend(
        self,
        layer_index: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of one layer: stores `k` and `v`, returns `[num_tokens, num_qo_heads, head_dim]`.

        Args:
            q: `[num_tokens, num_qo_heads, head_dim]`, rotated; k, v: `[num_tokens, num_kv_heads, head_dim]`.
            sliding_window: how many keys a query sees, its own included (Transformers' meaning); None = all.
        """
        k_pages, v_pages = self.layer(layer_index)
        ops.append_kv(k, v, k_pages, v_pages, self.slots)
        out, _ = ops.tree_attention(
            q,
            k_pages,
            v_pages,
            self.page_table,
            self.seq_lens,
            self.plan,
            sm_scale=scaling if scaling is not None else q.shape[-1] ** -0.5,
            window_left=-1 if sliding_window is None else sliding_window - 1,
            logits_soft_cap=softcap or 0.0,
            sinks=sinks,
        )
        return out

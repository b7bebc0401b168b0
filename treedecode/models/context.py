"""What one forward has to know of the pages."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treedecode import ops
from treedecode.models import prefill


@dataclass(frozen=True)
class StepContext:
    """What attention needs to know of one forward.

    Attributes:
        layer: layer index -> `(k_pages, v_pages)`, each `[num_pages, page_size, num_kv_heads, head_dim]`.
        page_table: `[num_branches, max_pages]` int32.
        seq_lens: `[num_branches]` int32, tokens in the cache including those of this forward.
        plan: the `TreePlan` of these branches; those of `prefills` have no queries in it.
        slots: `[num_tokens]` int64, where each packed token's K and V go.
        prefills: branches whose attention is dense.
        rest: `[n]` int64, the packed tokens of the other branches; None = all.
        kv: `[num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]`, what `layer` gives views of: for models
            that compute all layers in one call; None = layer by layer.
    """

    layer: Callable[[int], tuple[Tensor, Tensor]]
    page_table: Tensor
    seq_lens: Tensor
    plan: Any
    slots: Tensor
    prefills: tuple[prefill.Prefill, ...] = ()
    rest: Tensor | None = None
    kv: Tensor | None = None

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
        scale = scaling if scaling is not None else q.shape[-1] ** -0.5

        def tree(q: Tensor) -> Tensor:
            out, _ = ops.tree_attention(
                q,
                k_pages,
                v_pages,
                self.page_table,
                self.seq_lens,
                self.plan,
                sm_scale=scale,
                window_left=-1 if sliding_window is None else sliding_window - 1,
                logits_soft_cap=softcap or 0.0,
                sinks=sinks,
            )
            return out

        if not self.prefills:
            return tree(q)
        out = torch.empty_like(q)
        if self.rest is not None and len(self.rest):
            out[self.rest] = tree(q[self.rest])
        for p in self.prefills:
            mine = slice(p.q_begin, p.q_end)
            own_k, own_v = k[mine], v[mine]
            if p.seq_len > p.q_end - p.q_begin:  # earlier tokens are in pages, and so are these by now
                pages = self.page_table[p.row, : -(-p.seq_len // k_pages.shape[1])].long()
                own_k, own_v = (x[pages].flatten(0, 1)[: p.seq_len] for x in (k_pages, v_pages))
            out[mine] = prefill.attend(
                q[mine], own_k, own_v, scale=scale, sliding_window=sliding_window, softcap=softcap
            )
        return out

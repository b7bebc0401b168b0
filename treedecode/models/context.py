"""StepContext: the pages, lengths and plan that attention needs in one forward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from treedecode import ops
from treedecode.models import prefill


@dataclass(frozen=True)
class StepContext:
    """The pages, lengths and plan of one forward, and attention over them.

    Attributes:
        layer: layer index -> `(k_pages, v_pages)`, each `[num_pages, page_size, num_kv_heads, head_dim]`.
        page_table: `[num_branches, max_pages]` int32.
        seq_lens: `[num_branches]` int32, tokens in the cache including those of this forward.
        plan: the `TreePlan` of these branches; those of `prefills` have no queries in it.
        slots: `[num_tokens]` int64, where each packed token's K and V go.
        prefills: branches whose attention is dense.
        tree_tokens: `[n]` int64, the packed tokens of the other branches, whose attention is paged; None = all.
        kv: `[num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]`, the memory that `layer` gives views of, for
            models that compute all layers in one call; None = layer by layer.
    """

    layer: Callable[[int], tuple[Tensor, Tensor]]
    page_table: Tensor
    seq_lens: Tensor
    plan: ops.TreePlan
    slots: Tensor
    prefills: tuple[prefill.Prefill, ...] = ()
    tree_tokens: Tensor | None = None
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
        """Stores `k` and `v` of one layer, and returns its attention `[num_tokens, num_qo_heads, head_dim]`.

        Args:
            q: `[num_tokens, num_qo_heads, head_dim]`, rotated; k, v: `[num_tokens, num_kv_heads, head_dim]`.
            sliding_window: how many keys a query sees, its own included (Transformers' meaning); None = all.
        """
        k_pages, v_pages = self.layer(layer_index)
        ops.append_kv(k, v, k_pages, v_pages, self.slots)
        scale = scaling if scaling is not None else q.shape[-1] ** -0.5

        def tree_attention(q: Tensor) -> Tensor:
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
                return_lse=False,
                checks_plan=layer_index == 0,
            )
            return out

        if not self.prefills:
            return tree_attention(q)
        out = torch.empty_like(q)
        if self.tree_tokens is not None and len(self.tree_tokens):
            out[self.tree_tokens] = tree_attention(q[self.tree_tokens])
        for p in self.prefills:
            tokens = slice(p.q_begin, p.q_end)
            keys, values = k[tokens], v[tokens]
            if p.seq_len > p.q_end - p.q_begin:  # earlier tokens are in pages, and so are these by now
                pages = self.page_table[p.row, : -(-p.seq_len // k_pages.shape[1])].long()
                keys, values = (x[pages].flatten(0, 1)[: p.seq_len] for x in (k_pages, v_pages))
            out[tokens] = prefill.attend(
                q[tokens], keys, values, scale=scale, sliding_window=sliding_window, softcap=softcap
            )
        return out

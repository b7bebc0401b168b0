"""What one forward has to know of the pages."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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

"""merge_states: merges the attention to several sets of keys into the attention to all of them."""

import torch
from torch import Tensor

from treedecode import reference
from treedecode.ops._native import USE_REFERENCE, call, register_fake


def merge_states(part_out: Tensor, part_lse: Tensor, merge_indptr: Tensor) -> tuple[Tensor, Tensor]:
    """Merges partial attention results, weighted by their log-sum-exp.

    State i is the merge of the parts `merge_indptr[i]` to `merge_indptr[i + 1]`: lse = log(sum exp(lse_p)) and
    out = sum exp(lse_p - lse) * out_p, computed in fp32 in the order of the parts. A part without keys (lse -inf)
    has weight 0, and its out may hold anything. (Formula: Milakov & Gimelshein, arXiv:1805.02867.)

    Args:
        part_out: `[num_parts, num_heads, head_dim]`, fp32, bf16 or fp16, unit stride in the last dimension. Keep
            partials in fp32 where you can: rounding them loses more precision than the merge.
        part_lse: `[num_parts, num_heads]` fp32, natural log.
        merge_indptr: `[num_states + 1]` int32, offsets that do not decrease.

    Returns:
        out `[num_states, num_heads, head_dim]` in the dtype of part_out, and lse `[num_states, num_heads]` fp32. A
        state without parts, or with none that has keys: out 0, lse -inf.

    Raises:
        ValueError: an argument's shape or stride is wrong, or an offset is out of range.
        TypeError: an argument's dtype is wrong.
    """
    if USE_REFERENCE:
        out, lse = reference.merge_states(part_out, part_lse, merge_indptr)
        return out.to(part_out.dtype), lse.float()
    out, lse = call(torch.ops.treedecode.merge_states.default, part_out, part_lse, merge_indptr)
    return out, lse


@register_fake("merge_states")
def _(part_out: Tensor, part_lse: Tensor, merge_indptr: Tensor) -> tuple[Tensor, Tensor]:
    num_states = merge_indptr.shape[0] - 1
    return part_out.new_empty(num_states, *part_out.shape[1:]), part_lse.new_empty(num_states, part_lse.shape[1])
